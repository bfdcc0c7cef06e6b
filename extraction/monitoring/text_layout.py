"""Tokens on lines of a fixed number of cells, as a typewriter sets them: for pictures."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from extraction.report.markup import visible

RETURN = "\u23ce"  # stands for a line break, which follows
MISSING = "\u25a1"


@dataclass(frozen=True)
class Run:
    """A token's text, or what of it stands on one line. `column` and `width` are in cells."""

    token: int
    line: int
    column: int
    text: str
    width: int


def wrapped(pieces: Sequence[str], tokens: Sequence[str], columns: int) -> list[Run]:
    """Tokens set into lines; a word that doesn't fit begins the next one. A token without text shows its name."""
    runs: list[Run] = []
    line = column = 0
    for token, (piece, name) in enumerate(zip(pieces, tokens, strict=True)):
        for part, is_last in _parts(visible(piece) or visible(name) or MISSING):
            for text in _fitting(part, columns):
                width = cells(text)
                if column and column + width > columns:
                    line, column = line + 1, 0
                runs.append(Run(token, line, column, text, width))
                column += width
            if not is_last:
                line, column = line + 1, 0
    return runs


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """What stands between line breaks, with RETURN at the end of each line, and whether it is the last."""
    *lines, rest = text.replace("\t", "    ").split("\n")
    for part in lines:
        yield part + RETURN, False
    if rest:
        yield rest, True


def _fitting(text: str, columns: int) -> Iterator[str]:
    while cells(text) > columns:
        cut = next(i for i in range(len(text), 0, -1) if cells(text[:i]) <= columns)
        yield text[:cut]
        text = text[cut:]
    yield text


def cells(text: str) -> int:
    """Cells that a text takes: none for marks that stand on the letter before."""
    return sum(not unicodedata.combining(character) for character in text)


def drawable(text: str, has: Callable[[str], bool]) -> str:
    """The text with a box for every character that a font hasn't."""
    return "".join(character if has(character) else MISSING for character in text)
