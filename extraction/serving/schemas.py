"""Schemas of requests: strict types, finite numbers, and no field that is not known.

The sampling fields, their bounds and their help are those of `extraction.config.settings`; a route may have other
defaults. Of OpenAI's requests, a field that is not served is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from extraction.config.settings import MaxNewTokens, SamplingSettings, Temperature, TopP
from extraction.config.validation import Model
from extraction.core.text import show, suggest
from extraction.serving.settings import MAX_ALPHA, MAX_DEPTH, MAX_ROWS

MAX_STOPS = 4
MAX_STOP_LENGTH = 200  # characters


def wrong(message: str, param: str | None = None) -> PydanticCustomError:
    """Return an error with a message of ours; `param` names the field if it is not the one that is being checked."""
    return PydanticCustomError("refused", "{said}", {"said": message, "param": param})


def sound_text(value: str) -> str:
    """Return text that a tokenizer can read and that JSON can hold; raise otherwise."""
    if "\0" in value:
        raise wrong(f"{show(value)} holds a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise wrong(f"{show(value)} holds a lone surrogate; remove it")
    return value


Words = Annotated[str, AfterValidator(sound_text)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stops = Annotated[list[Annotated[Words, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]
Prompts = Annotated[list[Words], Field(min_length=1, max_length=MAX_ROWS)]
Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA)]


class Body(Model):
    """A JSON object of known fields."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise wrong(f"not a known field; {suggest(key, cls.model_fields)}", str(key)[:60])
        return data


class Sampling(Body, SamplingSettings):
    """Sampling fields. Without a seed the server draws one and returns it. Stop strings are not shown."""

    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    seed: Seed | None = None
    stop: Stops = Field(default_factory=list)
    ignore_eos: bool = False


class Formatting(Body):
    """Formatting of the prompt: by default by the chat template, if the model has one.

    `literal`: without the template, control tokens in the prompt are plain text.
    """

    apply_chat_template: bool | None = None
    literal: bool = False
    system_prompt: Words | None = None


class Generate(Sampling, Formatting):
    """One prompt."""

    prompt: Words
    max_new_tokens: MaxNewTokens = 80
    stream: bool = False


class GenerateLda(Generate):
    """One prompt for the amplified difference of two models."""

    alpha: Alpha = 1.0


class GenerateLdaBatch(Sampling, Formatting):
    """Several prompts for the amplified difference of two models."""

    prompts: Prompts
    max_new_tokens: MaxNewTokens = 80
    alpha: Alpha = 1.0


class GenerateBatch(Sampling, Formatting):
    """Several prompts, decoded speculatively."""

    prompts: Prompts
    max_tokens: MaxNewTokens = 50
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    speculation_depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)] | None = None


# --- OpenAI's requests ----------------------------------------------------------------------------------------------


def _only(*allowed: Any) -> BeforeValidator:
    """Refuse every value but None and `allowed`, which ask for nothing that this server lacks."""

    def check(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in (None, *allowed)):
            raise wrong(f"{show(value)} is not supported by this server; leave it out")
        return value

    return BeforeValidator(check)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _prompts(value: Any) -> Any:
    """Return one text or list of token ids, or a list of either, as a tuple of them."""
    if isinstance(value, str) or _is_ids(value):
        return (value if isinstance(value, list) else sound_text(value),)
    alike = isinstance(value, list) and (all(isinstance(each, str) for each in value) or all(map(_is_ids, value)))
    if not alike or not 1 <= len(value) <= MAX_ROWS:
        raise wrong(f"{show(value)} given; send text, token ids, or a list of 1 to {MAX_ROWS} of either")
    return tuple(sound_text(each) if isinstance(each, str) else each for each in value)


def _stops(value: Any) -> Any:
    """Return no, one or up to four stop strings as a list."""
    listed = [] if value is None else [value] if isinstance(value, str) else value
    sound = isinstance(listed, list) and all(
        isinstance(each, str) and 0 < len(each) <= MAX_STOP_LENGTH for each in listed
    )
    if not sound or len(listed) > MAX_STOPS:
        raise wrong(
            f"{show(value)} given; send a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOPS}"
        )
    return [sound_text(each) for each in listed]


def _content(value: Any) -> Any:
    """Return text, or the joined parts of a list of texts."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise wrong(f"{show(value)} given; send text")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str) or set(part) - {"type", "text"}:
            raise wrong(f"{show(part)} is not a part of text; this server reads text alone")
    return sound_text("".join(part["text"] for part in parts))


class StreamOptions(Body):
    """Fields that a stream ends with."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, _only(False)] = None


class _OpenAIRequest(Body, SamplingSettings):
    """Fields of both endpoints. Sampling fields that OpenAI does not have are those of vLLM: top_k, min_p."""

    model: Words
    temperature: Temperature | None = None  # type: ignore[assignment]
    top_p: TopP | None = None  # type: ignore[assignment]
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: Annotated[str | None, AfterValidator(lambda value: None)] = None
    presence_penalty: Annotated[Any, _only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, _only(0, 0.0)] = None
    logit_bias: Annotated[Any, _only({})] = None


class Completions(_OpenAIRequest):
    """POST /v1/completions: a text that is continued as it is, without a chat template.

    Control tokens in it are control tokens, as with vLLM; `literal` (not OpenAI's) makes them plain text.
    """

    prompt: Annotated[tuple[str | list[int], ...], BeforeValidator(_prompts)]
    max_tokens: MaxNewTokens | None = 16
    literal: bool = False
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[Any, _only()] = None
    best_of: Annotated[Any, _only(1)] = None
    suffix: Annotated[Any, _only("")] = None


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]


class ChatCompletions(_OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: MaxNewTokens | None = None
    max_completion_tokens: MaxNewTokens | None = None
    logprobs: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
