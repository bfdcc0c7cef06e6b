"""Make click options: those of settings have the type, the bounds, the default and the help of `config.settings`.

A group of options is a tuple of click decorators; `command(...)` makes a command with groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from extraction.cli.terminal import Command
from extraction.config.settings import EXPERIMENT_SETTINGS, MODEL_SETTINGS, SAMPLING, Setting
from extraction.config.validation import Bounds
from extraction.core.text import show, suggest
from extraction.judging.registry import JUDGE_NAMES

CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --batch_size is --batch-size
}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Group = tuple[Decorator, ...]


class NumberType(click.ParamType[Any]):
    """A number within the bounds of a setting."""

    name = "number"

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Return the number; raise click.BadParameter with the value and the bounds."""
        try:
            number = int(value) if self.bounds.is_whole else float(value)
        except ValueError:
            kind = "a whole number" if self.bounds.is_whole else "a number"
            self.fail(f"{show(value)} is not {kind}; give {self.bounds}", param, ctx)
        if number not in self.bounds:
            self.fail(f"{show(number)} is out of range; give {self.bounds}", param, ctx)
        return number


class WordType(click.ParamType[Any]):
    """One of the words that a setting allows."""

    name = "word"

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the word; raise click.BadParameter with the nearest one that is allowed."""
        if value not in self.words:
            self.fail(f"{show(value)} is not known; {suggest(value, self.words)}", param, ctx)
        return str(value)


class ListType(click.ParamType[Any]):
    """Values with commas between; the settings check them."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the values, as numbers if the setting has numbers."""
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(","))
        if param is None or param.name != "judge_price":
            return parts
        try:
            return tuple(map(float, parts))
        except ValueError:
            return value


def setting_type(setting: Setting) -> click.ParamType[Any]:
    """Return the type of a setting's option."""
    bounds = setting.bounds
    if bounds is not None:
        return NumberType(bounds)
    if setting.choices:
        return WordType(setting.choices)
    if setting.name == "judge":
        return WordType(JUDGE_NAMES)
    return ListType() if setting.option.metavar in ("A,B", "IN,OUT") else click.STRING


def _range(setting: Setting) -> str:
    bounds = setting.bounds
    if bounds is None:
        words = JUDGE_NAMES if setting.name == "judge" else setting.choices
        return f"{', '.join(words)}; " if words else ""
    low = f"above {bounds.low:g}" if bounds.above else f"{bounds.low:g}"
    return f"{low} or more; " if bounds.high >= 2**63 - 1 else f"{low} to {bounds.high:.0f}; "


def setting_option(name: str, *, source: str | None = "the experiment's", default: Any = None) -> Decorator:
    """Return the option of a setting of an experiment or a model.

    Without the option the value is that of `source` ("the run's"), or with `default` that one.
    """
    setting = MODEL_SETTINGS[name] if name in MODEL_SETTINGS else EXPERIMENT_SETTINGS[name]
    if isinstance(setting.default, bool):
        return click.option(setting.flag, is_flag=True, default=None, help=setting.help)
    if default is not None:
        text = f"{default:g}"
    elif source == "the experiment's":
        text = f"{source}, else {setting.default_text}"
    else:
        text = source or setting.default_text
    return click.option(
        setting.flag,
        name,
        type=setting_type(setting),
        metavar=setting.option.metavar,
        default=default,
        help=f"{setting.help}  [{_range(setting)}default: {text}]",
    )


def setting_options(names: Iterable[str], *, source: str = "the experiment's") -> Group:
    """Return the options of several settings."""
    return tuple(setting_option(name, source=source) for name in names)


def sampling_options(defaults: Mapping[str, float]) -> Group:
    """Return the options of sampling, with the defaults of a command that reads no experiment."""
    values = {name: EXPERIMENT_SETTINGS[name].default for name in SAMPLING} | dict(defaults)
    return tuple(setting_option(name, source=None, default=value) for name, value in values.items())


def number_option(flag: str, default: float, low: float, high: float, text: str, **kwargs: Any) -> Decorator:
    """Return an option that takes a number within bounds, and shows its default."""
    bounds = Bounds(low, high, kwargs.pop("above", False), isinstance(default, int))
    metavar = kwargs.pop("metavar", "N" if bounds.is_whole else "S")
    return click.option(
        flag, type=NumberType(bounds), metavar=metavar, default=default, show_default=True, help=text, **kwargs
    )


def options(*groups: Group) -> Decorator:
    """Return a decorator that puts groups of options on a command, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def command(name: str, *groups: Group, cls: type[Command] = Command) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a command with these options."""
    make = click.command(name, cls=cls, context_settings=CONTEXT)
    return lambda function: make(options(*groups)(function))
