"""What may stand in a request. Types are strict, numbers are finite, and a field that is not known is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from extraction.core.text import show, suggest
from extraction.serving.settings import MAX_ALPHA, MAX_DEPTH, MAX_ROWS


def wrong(message: str, param: str | None = None) -> PydanticCustomError:
    """An error in our own words; `param` where it is not the field that is being read."""
    return PydanticCustomError("refused", "{said}", {"said": message, "param": param})


def sound_text(value: str) -> str:
    """Text that a tokenizer can read and a terminal can show as JSON."""
    if "\0" in value:
        raise wrong(f"{show(value)} holds a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise wrong(f"{show(value)} holds a lone surrogate; remove it")
    return value


Words = Annotated[str, AfterValidator(sound_text)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=10_000_000)]
Budget = Annotated[int, Field(ge=1, le=1_000_000)]
Stops = Annotated[list[Annotated[Words, Field(min_length=1, max_length=200)]], Field(max_length=4)]
Prompts = Annotated[list[Words], Field(min_length=1, max_length=MAX_ROWS)]


class Body(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise wrong(f"not a known field; {suggest(key, cls.model_fields)}", str(key)[:60])
        return given


class Sampling(Body):
    """How tokens are drawn. Without a seed the server draws one, and says which. Stop strings are not shown."""

    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    top_k: TopK = 0
    seed: Seed | None = None
    stop: Stops = []
    ignore_eos: bool = False


class Formatting(Body):
    """How a prompt is written for the model. Without a word, the chat template is used where the model has one."""

    apply_chat_template: bool | None = None
    system_prompt: Words | None = None


class Generate(Sampling, Formatting):
    """One prompt."""

    prompt: Words
    max_new_tokens: Budget = 80
    stream: bool = False


class GenerateLda(Generate):
    """One prompt for the amplified difference of two models."""

    alpha: Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA)] = 1.0


class GenerateLdaBatch(Sampling, Formatting):
    """Several prompts for the amplified difference of two models."""

    prompts: Prompts
    max_new_tokens: Budget = 80
    alpha: Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA)] = 1.0


class GenerateBatch(Sampling, Formatting):
    """Several prompts, speculated."""

    prompts: Prompts
    max_tokens: Budget = 50
    temperature: Temperature = 0.7
    top_p: TopP = 1.0
    speculation_depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)] | None = None
