"""Read text files line by line, within limits of size that are checked before the whole file is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from extraction.core.errors import TraitError
from extraction.core.text import show_path
from extraction.core.text_files import decode_utf8, open_input

MAX_FILE_BYTES = 100_000_000
MAX_LINE_BYTES = 1_000_000
CHUNK_BYTES = 65_536


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file. Ids count the prompts, lines the file's lines from 1."""

    id: str
    text: str
    line: int


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file. Blank lines are skipped; duplicates are kept and have their own ids; both are counted."""

    path: str
    prompts: tuple[PromptLine, ...]
    skipped_blank: int
    n_duplicates: int


def read_prompt_file(path: str | os.PathLike[str]) -> PromptFile:
    r"""Return the prompts of a file, one a line: UTF-8, lines end in `\n` or `\r\n` only, outer spaces are kept.

    Raises TraitError, also for more than MAX_FILE_BYTES or MAX_LINE_BYTES, without reading more than that.
    """
    source, lines = show_path(path), read_lines(path)
    prompts = [(number, text) for number, text in lines if text.strip()]
    if not prompts:
        raise TraitError(f"{source}: {len(lines)} lines and no prompt; write one prompt a line")
    return PromptFile(
        path=source,
        prompts=tuple(PromptLine(f"p{i:04d}", text, number) for i, (number, text) in enumerate(prompts)),
        skipped_blank=len(lines) - len(prompts),
        n_duplicates=len(prompts) - len(Counter(text for _, text in prompts)),
    )


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Return (number from 1, text) of every line of a file; limits and errors as of `read_prompt_file`."""
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
