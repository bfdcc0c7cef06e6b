"""Schemas of requests: strict types, finite numbers, and no field that is not known.

The sampling fields, their bounds and their help are those of `extraction.config.settings`; a route may have other
defaults.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from extraction.config.settings import MaxNewTokens, SamplingSettings, Temperature, TopP
from extraction.config.validation import Model
from extraction.core.text import show, suggest
from extraction.serving.settings import MAX_ALPHA, MAX_DEPTH, MAX_ROWS


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
Stops = Annotated[list[Annotated[Words, Field(min_length=1, max_length=200)]], Field(max_length=4)]
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
    """Formatting of the prompt: by default by the chat template, if the model has one."""

    apply_chat_template: bool | None = None
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
