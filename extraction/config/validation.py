"""Checks by pydantic whose errors are Traitline's: one line with the file and line, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar, cast

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from extraction.config.yaml_loader import SourceLocation
from extraction.core.errors import ConfigError
from extraction.core.text import show, suggest

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
T = TypeVar("T")


def problem(message: str, *keys: str | int) -> PydanticCustomError:
    """Return an error of a validator; `keys` lead from the checked value to the part that is wrong."""
    return PydanticCustomError("setting", "{problem}", {"problem": message, "keys": keys})


class Model(BaseModel):
    """A mapping of known keys: frozen, strict types, finite numbers."""

    model_config = STRICT

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise problem(f"{show(data)} is not a mapping; write 'key: value' lines")
        for key in data:
            if key not in cls.model_fields:
                raise problem(f"{show(key)} is not a known key; {suggest(key, cls.model_fields)}", key)
        return data


def _some_text(value: str) -> str:
    if not value.strip():
        raise problem(f"{show(value)} is empty; write some text")
    return value


Text = Annotated[str, AfterValidator(_some_text)]


def distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that no item stands there twice."""
    for i, item in enumerate(items):
        if item in items[:i]:
            raise problem(f"{show(item)} stands there twice; keep one", i)
    return items


def nonempty(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check that there is an item."""
    if not items:
        raise problem("[] names nothing; give at least one")
    return items


# --- bounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The range of a number; `above` excludes the lower end. NaN is in no range."""

    low: float
    high: float
    above: bool
    is_whole: bool

    def __contains__(self, value: Any) -> bool:
        return bool((self.low < value if self.above else self.low <= value) and value <= self.high)

    def __str__(self) -> str:
        noun = "a whole number" if self.is_whole else "a number"
        low, high = (f"{end}" if self.is_whole else f"{end:g}" for end in (self.low, self.high))
        if self.is_whole and self.high >= 2**63 - 1:
            return f"{noun} from {low} up"
        return f"{noun} above {low}, up to {high}" if self.above else f"{noun} from {low} to {high}"


def spec_bounds(info: FieldInfo) -> Bounds | None:
    """Return the bounds of a number's field; None where it has none."""
    found: dict[str, Any] = {}
    for item in info.metadata:
        for kind, key in ((annotated_types.Ge, "ge"), (annotated_types.Gt, "gt"), (annotated_types.Le, "le")):
            if isinstance(item, kind):
                found[key] = getattr(item, key)
    if "le" not in found:
        return None
    low = found["gt"] if "gt" in found else found["ge"]
    return Bounds(low, found["le"], "gt" in found, info.annotation is int)


# --- errors ---------------------------------------------------------------------------------------------------------


def validate(kind: type[T], data: Any, place: SourceLocation) -> T:
    """Return `data` as `kind`. Raises the place's error, for the first thing that is wrong."""
    try:
        if is_dataclass(kind):  # a strict one takes no mapping
            return cast(T, kind(**data))
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as failure:
        raise _config_error(kind, failure.errors(include_url=False)[0], place) from failure


def checked(kind: type[T], **values: Any) -> T:
    """Return a model of these values. Raises ConfigError: the name, the value and the remedy."""
    try:
        return kind(**values)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
        keys = ".".join(map(str, error["loc"]))
        raise ConfigError(f"{keys} {_words(kind, error)}") from failure


def _config_error(kind: Any, error: Any, place: SourceLocation) -> ConfigError:
    keys: Sequence[str | int] = (*error["loc"], *error.get("ctx", {}).get("keys", ()))
    if error["type"] == "missing":
        keys = keys[:-1]
    for key in keys:
        place = place.at(key)
    return place.fail(_words(kind, error))


def _words(kind: Any, error: Any) -> str:
    """Return what is wrong with the value, and the remedy."""
    name, value, context = error["type"], error["input"], error.get("ctx", {})
    if name == "setting":
        return str(context["problem"])
    if name == "missing":
        return "{0!r} is missing; add a line '{0}: ...'".format(error["loc"][-1])
    if name == "literal_error":
        known = re.findall("'([^']*)'", context["expected"])
        return f"{show(value)} is not known; {suggest(value, known)}"
    if name in TYPE_WORDS:
        bounds = _bounds_at(kind, error["loc"])
        span = str(bounds) if bounds else _one_bound(context)
        remedy = "write some" if value is None else "quote it" if isinstance(value, int | float) else "write text"
        return f"{show(value)} is {TYPE_WORDS[name].format(span=span, remedy=remedy)}"
    return f"{show(value)}: {error['msg'][:1].lower()}{error['msg'][1:]}; correct it"


TYPE_WORDS = {
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than_equal"), "out of range; give {span}"),
    **dict.fromkeys(("finite_number", "int_parsing_size"), "out of range; give {span}"),
    "string_type": "not text; {remedy}",
    "int_type": "not a whole number; give {span}",
    "int_from_float": "not a whole number; give {span}",
    "float_type": "not a number; give {span}",
    "bool_type": "not true or false; write one of them, unquoted",
    "list_type": "not a list; write it as [a, b]",
    "tuple_type": "not a list; write it as [a, b]",
    "dict_type": "not a mapping; write 'key: value' lines",
}


def _bounds_at(kind: Any, keys: Sequence[str | int]) -> Bounds | None:
    for key in keys:
        fields = getattr(kind, "model_fields", {})
        if key not in fields:
            return None
        info = fields[key]
        kind = info.annotation
    return spec_bounds(info) if keys else None


def _one_bound(context: Mapping[str, Any]) -> str:
    words = {"ge": "a number from {} up", "gt": "a number above {}", "le": "a number up to {}"}
    return next((text.format(context[key]) for key, text in words.items() if key in context), "another")
