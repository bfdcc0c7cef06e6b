"""Strict YAML that keeps the line of every value, and three checks for records that are not settings.

Settings are checked by `extraction.config.validation`. The checks at the end serve the formats of other programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from extraction.core.errors import ConfigError
from extraction.core.text import show, show_path, suggest
from extraction.core.text_files import decode_utf8, open_input, refuse_nul

Rule = Callable[[Any, "SourceLocation"], Any]
Key = str | int

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 20


# --- locations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceLocation:
    """Where a value stands: a file's line and key, or an option of the command line if `source` is None."""

    source: str | None
    lines: Mapping[tuple[Key, ...], int] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    error: type[ConfigError] = ConfigError

    def at(self, key: Key) -> SourceLocation:
        """Return the location of one entry of this value."""
        return replace(self, keys=(*self.keys, key))

    def __str__(self) -> str:
        if self.source is None:
            return "--" + next((key for key in reversed(self.keys) if isinstance(key, str)), "").replace("_", "-")
        outward = (self.keys[:n] for n in range(len(self.keys), -1, -1))
        line = next((self.lines[keys] for keys in outward if keys in self.lines), 1)
        where = f"{self.source}:{line}" if self.lines else self.source
        return where + (f": '{'.'.join(map(str, self.keys))}'" if self.keys else "")

    def fail(self, problem: str) -> ConfigError:
        """Return the error to raise: the location, then the problem with its remedy."""
        return self.error(f"{self}: {problem}")


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """The data of a YAML file, and the location of every value."""

    data: Any
    place: SourceLocation


def read_document(path: str | os.PathLike[str], error: type[ConfigError] = ConfigError) -> Document:
    """Return the data of one YAML file with the line of every value.

    Refused: duplicate keys, aliases, anchors, tags, several documents, deep nesting, NUL, invalid UTF-8, lone
    surrogates. `yes`, `no`, `on` and dates stay text, as in YAML 1.2.
    """
    source = show_path(path)
    with open_input(path, MAX_YAML_BYTES, error) as file:
        raw = file.read(MAX_YAML_BYTES + 1)
    return parse_document(raw, source, error)


def parse_document(raw: bytes, source: str, error: type[ConfigError] = ConfigError) -> Document:
    """Parse the bytes of a YAML file; messages call it `source`."""
    if len(raw) > MAX_YAML_BYTES:
        raise error(f"{source}: more than {MAX_YAML_BYTES} bytes; split the file")
    text = decode_utf8(raw, 0, source, error).removeprefix("\ufeff")
    refuse_nul(text, source, error)
    try:
        node = _Loader(text).get_single_node()
        lines: dict[tuple[Key, ...], int] = {}
        data = None if node is None else _value(node, (), lines)
    except yaml.YAMLError as failure:
        raise error(_yaml_message(failure, text, source)) from failure
    if data is None:
        raise error(f"{source}: is empty; it needs 'key: value' lines")
    return Document(data, SourceLocation(source, lines, error=error))


class _Loader(yaml.SafeLoader):
    """Load the plain types of YAML 1.2; refuse anchors, aliases, tags and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node of plain data. Raises _Refused for anything else."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _Refused(f"'{event.anchor}' is an anchor or alias; write the value out", event.start_mark)
        if event.tag:
            raise _Refused(f"the tag {show(event.tag)} is not allowed; remove it", event.start_mark)
        if self.depth >= MAX_YAML_DEPTH:
            raise _Refused(f"nested more than {MAX_YAML_DEPTH} deep; flatten it", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]{1,18}$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))

_SCALARS: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a config file must not hold."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def _value(node: Any, keys: tuple[Key, ...], lines: dict[tuple[Key, ...], int]) -> Any:
    """Return the data under a node, and put the line of every value into `lines`."""
    lines[keys] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return dict(_entries(node, keys, lines))
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*keys, i), lines) for i, item in enumerate(node.value)]
    if node.tag in _SCALARS:
        return _SCALARS[node.tag](node.value)
    return _text(node)


def _entries(node: Any, keys: tuple[Key, ...], lines: dict[tuple[Key, ...], int]) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag in _SCALARS:
            raise _Refused(f"the key {show(key_node.value)} is not text; quote it", key_node.start_mark)
        key, line = _text(key_node), key_node.start_mark.line + 1
        if key in seen:
            raise _Refused(f"the key {show(key)} stands on line {seen[key]} too; keep one", key_node.start_mark)
        seen[key] = line
        yield key, _value(value_node, (*keys, key), lines)
        lines[(*keys, key)] = line


def _text(node: Any) -> str:
    r"""Return text, with the surrogate pairs of JSON (`\ud83d\ude00`) joined. Refuses lone surrogates and NUL."""
    try:
        text = str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _Refused(f"{show(node.value)} holds a lone surrogate; remove it", node.start_mark) from None
    if "\0" in text:
        raise _Refused(f"{show(text)} holds a NUL character; remove it", node.start_mark)
    return text


def _yaml_message(failure: yaml.YAMLError, text: str, source: str) -> str:
    if isinstance(failure, yaml.reader.ReaderError):
        line = text[: failure.position].count("\n") + 1
        return f"{source}:{line}: holds the control character U+{ord(text[failure.position]):04X}; remove it"
    if isinstance(failure, yaml.MarkedYAMLError) and failure.problem_mark is not None:
        line = failure.problem_mark.line + 1
        remedy = "" if isinstance(failure, _Refused) else "; check the indentation and the quotes"
        return f"{source}:{line}: {' '.join(str(failure.problem).split())}{remedy}"
    return f"{source}: {' '.join(str(failure).split())}; check the file"


# --- rules ----------------------------------------------------------------------------------------------------------


def text(value: Any, place: SourceLocation) -> str:
    """Check a text that is not blank."""
    if not isinstance(value, str):
        remedy = (
            "write some" if value is None else "quote it" if isinstance(value, bool | int | float) else "write text"
        )
        raise place.fail(f"{show(value)} is not text; {remedy}")
    if not value.strip():
        raise place.fail(f"{show(value)} is empty; write some text")
    return value


def items(rule: Rule) -> Rule:
    """Return a check of a list whose entries all pass `rule`."""

    def check(value: Any, place: SourceLocation) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise place.fail(f"{show(value)} is not a list; write it as [a, b]")
        return tuple(rule(item, place.at(i)) for i, item in enumerate(value))

    return check


def section(table: Mapping[str, Rule], required: Iterable[str] = ()) -> Rule:
    """Return a check of a mapping with the keys of `table`."""

    def check(value: Any, place: SourceLocation) -> dict[str, Any]:
        """Return the checked values by key."""
        if not isinstance(value, Mapping):
            raise place.fail(f"{show(value)} is not a mapping; write 'key: value' lines")
        for key in value:
            if key not in table:
                raise place.at(key).fail(f"{show(key)} is not a known key; {suggest(key, table)}")
        for key in required:
            if key not in value:
                raise place.fail(f"{key!r} is missing; add a line '{key}: ...'")
        return {key: table[key](item, place.at(key)) for key, item in value.items()}

    return check
