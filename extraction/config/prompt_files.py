"""Prompt files in four formats: one prompt a line, a JSON list, one JSON object a line, or a table (CSV, TSV).

A table has a header; the prompts are in its column `prompt`, `question`, `text` or `instruction`, or in its only one. A
column `system` may stand beside it.

An entry of JSON is a text, {"prompt": ...} (or `question`, `text`), an instruction of Alpaca's ({"instruction": ...,
"input": ...}), or a conversation ({"messages": [{"role": ..., "content": ...}]}) of one user's turn, with a system text
before it or none.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from extraction.config.yaml_loader import SourceLocation, text
from extraction.core.errors import TraitError
from extraction.core.text import show, show_path
from extraction.core.text_files import decode_utf8, open_input, read_text, refuse_nul

MAX_FILE_BYTES = 100_000_000
MAX_LINE_BYTES = 1_000_000
CHUNK_BYTES = 65_536


@dataclass(frozen=True)
class PromptEntry:
    """A user message, and its system message (None: none)."""

    prompt: str
    system: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file in their order; duplicates are kept, blank lines skipped and counted."""

    path: str
    prompts: tuple[PromptEntry, ...]
    skipped_blank: int = 0

    @property
    def n_duplicates(self) -> int:
        """Number of prompts that repeat an earlier one."""
        return len(self.prompts) - len(set(self.prompts))

    @property
    def notes(self) -> list[str]:
        """Lines about blank lines and duplicates."""
        counts = {"blank lines skipped": self.skipped_blank, "duplicate prompts": self.n_duplicates}
        return [f"{self.path}: {what}: {count}" for what, count in counts.items() if count]


def read_prompt_set(path: str | os.PathLike[str]) -> PromptSet:
    """Return all prompts of a file. Raises TraitError with the line or the entry."""
    return READERS.get(Path(path).suffix.lower().removeprefix("."), _from_lines)(path)


def _from_lines(path: str | os.PathLike[str]) -> PromptSet:
    lines = _read_lines(path)
    entries = tuple(PromptEntry(line) for _, line in lines if line.strip())
    return _some(PromptSet(show_path(path), entries, len(lines) - len(entries)))


def _from_json_lines(path: str | os.PathLike[str]) -> PromptSet:
    source, lines = show_path(path), _read_lines(path)
    rows = [(number, line) for number, line in lines if line.strip()]
    found = [_entry(_parsed(line, f"{source}:{number}"), _place(f"{source}:{number}")) for number, line in rows]
    return _some(PromptSet(source, tuple(found), len(lines) - len(rows)))


def _from_json(path: str | os.PathLike[str]) -> PromptSet:
    source = show_path(path)
    data = _parsed(read_text(path, MAX_FILE_BYTES, TraitError), source)
    if not isinstance(data, list):
        raise TraitError(f"{source}: {show(data)} is not a list; write [...] around the prompts")
    return _some(PromptSet(source, tuple(_entry(entry, _place(source).at(i)) for i, entry in enumerate(data))))


def _from_table(path: str | os.PathLike[str], delimiter: str) -> PromptSet:
    """Read a table with a header. A quoted field may span lines; rows are named by their last line."""
    source = show_path(path)
    content = read_text(path, MAX_FILE_BYTES, TraitError)
    refuse_nul(content, source, TraitError)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as failure:
        raise TraitError(f"{source}:{reader.line_num}: not a table ({failure}); correct its quotes") from failure
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    column = next((header.index(name) for name in TABLE_COLUMNS if name in header), 0 if len(header) == 1 else None)
    if column is None:
        known = " or ".join(TABLE_COLUMNS)
        raise TraitError(f"{source}:1: no column of prompts among {show(header)}; call it {known} in the first line")
    entries, n_blank = list[PromptEntry](), 0
    for number, row in rows[1:]:
        if not any(field.strip() for field in row):
            n_blank += 1
            continue
        entries.append(_table_entry(row, header, column, _place(f"{source}:{number}")))
    return _some(PromptSet(source, tuple(entries), n_blank))


def _table_entry(row: list[str], header: list[str], column: int, place: SourceLocation) -> PromptEntry:
    if len(row) != len(header):
        raise place.fail(f"{len(row)} fields where the header has {len(header)}; quote a field that holds a separator")
    cells = dict(zip(header, row, strict=True))
    return PromptEntry(_words(row[column], place.at(header[column])), _optional(cells, "system", place))


TABLE_COLUMNS = ("prompt", "question", "text", "instruction")
READERS: dict[str, Callable[[str | os.PathLike[str]], PromptSet]] = {
    "json": _from_json,
    "jsonl": _from_json_lines,
    "ndjson": _from_json_lines,
    "csv": partial(_from_table, delimiter=","),
    "tsv": partial(_from_table, delimiter="\t"),
}


def _some(found: PromptSet) -> PromptSet:
    if not found.prompts:
        raise TraitError(f"{found.path}: no prompt; write some")
    return found


def _place(source: str) -> SourceLocation:
    return SourceLocation(source, error=TraitError)


def _parsed(words: str, place: str) -> Any:
    try:
        return json.loads(words)
    except (ValueError, RecursionError) as failure:
        reason = "nested too deep" if isinstance(failure, RecursionError) else failure
        raise TraitError(f"{place}: not JSON ({reason}); correct it") from failure


# --- lines, within limits of size that are checked before the whole file is read ------------------------------------


def _read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    r"""Return (number from 1, text) of every line of a file; lines end in `\n` or `\r\n` only.

    Raises TraitError, also for more than MAX_FILE_BYTES or MAX_LINE_BYTES, without reading more than that.
    """
    with open_input(path, MAX_FILE_BYTES, TraitError) as file:
        return list(_decoded_lines(file, show_path(path)))


def _decoded_lines(file: BinaryIO, source: str) -> Iterator[tuple[int, str]]:
    offset = 0
    for number, line in enumerate(_raw_lines(file, source), start=1):
        body = line.removesuffix(b"\n")
        body = body.removesuffix(b"\r") if line.endswith(b"\n") else body
        if b"\0" in body:
            raise TraitError(f"{source}:{number}: holds a NUL byte; remove it")
        text = decode_utf8(body, offset, f"{source}:{number}", TraitError)
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _raw_lines(file: BinaryIO, source: str) -> Iterator[bytes]:
    """Yield the file's lines with their ends, with at most one line and one chunk in memory."""
    total, number, pending = 0, 1, b""
    while chunk := file.read(CHUNK_BYTES):
        total += len(chunk)
        if total > MAX_FILE_BYTES:
            raise TraitError(f"{source}: more than {MAX_FILE_BYTES} bytes; split the file")
        *whole, pending = (pending + chunk).split(b"\n")
        for line in whole:
            _check_line(line, number, source)
            yield line + b"\n"
            number += 1
        _check_line(pending, number, source)
    if pending:
        yield pending


def _check_line(line: bytes, number: int, source: str) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise TraitError(f"{source}:{number}: a line of more than {MAX_LINE_BYTES} bytes; is this a prompt file?")


# --- entries --------------------------------------------------------------------------------------------------------


def _entry(value: Any, place: SourceLocation) -> PromptEntry:
    if isinstance(value, str):
        return PromptEntry(_words(value, place))
    for key, read in FORMS.items():
        if isinstance(value, dict) and key in value:
            return read(value, place)
    raise place.fail(f"{show(value)} is no prompt; write a text, or one of {', '.join(FORMS)}")


def _prompt(value: dict[str, Any], place: SourceLocation, *, key: str = "prompt") -> PromptEntry:
    return PromptEntry(_words(value[key], place.at(key)), _optional(value, "system", place))


def _instruction(value: dict[str, Any], place: SourceLocation) -> PromptEntry:
    instruction, given = _words(value["instruction"], place.at("instruction")), _optional(value, "input", place)
    return PromptEntry(f"{instruction}\n\n{given}" if given else instruction, _optional(value, "system", place))


def _conversation(value: dict[str, Any], place: SourceLocation) -> PromptEntry:
    turns = value["messages"]
    at = place.at("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise at.fail(f"{show(turns)} is no list of messages; write role and content of each")
    roles = [turn.get("role") for turn in turns]
    if roles and roles[-1] == "assistant":  # the response of a training example
        roles.pop()
    if roles not in (["user"], ["system", "user"]):
        raise at.fail(f"the roles are {show(roles)}; give one user message, after a system message or alone")
    contents = [_words(turn.get("content"), at.at(i).at("content")) for i, turn in enumerate(turns[: len(roles)])]
    return PromptEntry(contents[-1], contents[0] if len(contents) == 2 else None)


FORMS: dict[str, Callable[[dict[str, Any], SourceLocation], PromptEntry]] = {
    "prompt": _prompt,
    "instruction": _instruction,
    "messages": _conversation,
    "question": partial(_prompt, key="question"),
    "text": partial(_prompt, key="text"),
}


def _optional(value: dict[str, Any], key: str, place: SourceLocation) -> str | None:
    """Return text that may be absent or empty."""
    return None if value.get(key) in (None, "") else _words(value[key], place.at(key))


def _words(value: Any, place: SourceLocation) -> str:
    """Return text that a tokenizer can read: not blank, no NUL, no lone surrogate."""
    words = text(value, place)
    if match := re.search("[\ud800-\udfff]|\0", words):
        raise place.fail(f"{show(words)} holds {show(match[0])}, which is no text; remove it")
    return words
