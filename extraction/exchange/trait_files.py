"""Read trait files of other programs (JSON, a JSON object a line, or a prompt a line), and write a trait as YAML.

The content decides the kind of a file, its name the part: a side, the definition or the steering questions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extraction.config.yaml_loader import SourceLocation
from extraction.core.errors import TraitError
from extraction.core.text import show, show_path
from extraction.core.text_files import read_text, refuse_nul

MAX_TRAIT_BYTES = 100_000_000
_PARTS = {
    "positive": re.compile(r"(.*[._-])?pos(itive)?", re.IGNORECASE),
    "negative": re.compile(r"(.*[._-])?neg(ative)?", re.IGNORECASE),
    "definition": re.compile(r"definition", re.IGNORECASE),
    "steering": re.compile(r"steering", re.IGNORECASE),
}


@dataclass(frozen=True)
class TraitFile:
    """Content of one file.

    `kind`: `json` (any value), `rows` (a JSON object a line) or `lines` (text). `part`: positive, negative, definition,
    steering, or None where the name matches none. `blank`: number of blank lines left out.
    """

    path: Path
    kind: str
    data: Any
    part: str | None
    blank: int = 0

    @property
    def place(self) -> SourceLocation:
        """Location of the file, for messages."""
        return SourceLocation(show_path(self.path), error=TraitError)


def read_trait_files(paths: Sequence[str], *, as_text: bool = False) -> list[TraitFile]:
    """Read files; in a folder, those named by a part. `as_text`: read lines, even where they look like JSON."""
    return [read_trait_file(path, as_text=as_text) for entry in paths for path in _expand_folder(Path(entry))]


def read_trait_file(path: Path, *, as_text: bool = False) -> TraitFile:
    """Read one UTF-8 file without its byte order mark and carriage returns. Raises TraitError."""
    source = show_path(path)
    text = read_text(path, MAX_TRAIT_BYTES, TraitError)
    refuse_nul(text, source, TraitError)
    if not text.strip():
        raise TraitError(f"{source}: is empty; a trait needs both sides")
    kind, data, blank = _parse_content(text, source, as_text=as_text or part_from_name(path) == "definition")
    _refuse_surrogates(data, source)
    return TraitFile(path, kind, data, part_from_name(path), blank)


def part_from_name(path: str | os.PathLike[str]) -> str | None:
    """Return the part of a trait that a file's name matches: positive, negative, definition, steering or None."""
    return next((part for part, pattern in _PARTS.items() if pattern.fullmatch(Path(path).stem)), None)


def trait_yaml(content: dict[str, Any]) -> bytes:
    """Format a trait as a file of configs/traits. Texts are in double quotes, so that any text reads back unchanged."""
    return ("\n".join(_yaml_lines(content)) + "\n").encode()


def _expand_folder(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [entry for entry in sorted(path.iterdir()) if entry.is_file() and part_from_name(entry)]
    if not files:
        raise TraitError(f"{show_path(path)}: no file in this folder is named positive or negative; give the files")
    return files


def _parse_content(text: str, source: str, *, as_text: bool) -> tuple[str, Any, int]:
    """Return (kind, data, number of blank lines)."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    full = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if as_text or text.lstrip()[0] not in "[{":
        return "lines", [line.strip() for _, line in full], len(lines) - len(full)
    try:
        return "json", _parse_json(text), 0
    except ValueError as failure:
        if len(full) == 1 or not all(line.lstrip().startswith("{") for _, line in full):
            remedy = "correct it, or give --format prompts if these are prompts"
            raise TraitError(f"{source}: not JSON ({failure}); {remedy}") from failure
    return "rows", [_parse_row(line, f"{source}:{number}") for number, line in full], len(lines) - len(full)


def _parse_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = _parse_json(line)
    except ValueError as failure:
        raise TraitError(f"{place}: not a JSON object ({failure}); correct the line") from failure
    return dict(row)


def _parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, also for nesting that is too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse_surrogates(data: Any, source: str) -> None:
    """Raise TraitError for half a surrogate pair or NUL, which JSON can escape and no UTF-8 text file can hold."""
    match = next((match for words in _all_texts(data) if (match := re.search("[\ud800-\udfff]|\0", words))), None)
    if match:
        raise TraitError(f"{source}: {show(match[0])} is not a character of text; remove it")


def _all_texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, with keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _all_texts(item)


def _yaml_lines(value: Any, indent: str = "") -> list[str]:
    """Return the YAML lines of a mapping, a list or a text."""
    if isinstance(value, str):
        return [yaml.dump(value, default_style='"', allow_unicode=True, width=float("inf")).removesuffix("\n")]
    if isinstance(value, dict):
        heads = [(f"{indent}{key}:", item, indent + "  ") for key, item in value.items()]
    else:
        heads = [(f"{indent}-", item, indent + "  ") for item in value]
    lines: list[str] = []
    for head, item, inner in heads:
        below = _yaml_lines(item, inner)
        if isinstance(item, str):
            lines.append(f"{head} {below[0]}")
        elif head.endswith("-"):  # a mapping's first key stands beside its dash
            lines += [f"{head} {below[0].lstrip()}", *below[1:]]
        else:
            lines += [head if below else f"{head} []", *below]
    return lines
