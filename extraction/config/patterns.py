"""Regular expressions that users write: checked before use, and matched against a bounded text.

Python's `re` backtracks. A pattern that repeats a repeat, as `(a+)+$`, can take time that doubles with every character;
such patterns are refused. Others may still take time that grows with the square of the text, so the text is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from extraction.core.errors import ConfigError
from extraction.core.text import show

MAX_PATTERN = 300  # characters
MAX_TEXT = 20_000  # characters of a text that are matched
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)  # escapes and classes as one part
_VARIABLE = re.compile(r"[*+]|\{\d*,\d*\}")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}|\{(?:[2-9]|\d{2,})\}")


def check_pattern(pattern: str, fail: Callable[[str], Exception] = ConfigError) -> str:
    """Return a pattern that is safe to match; raise what `fail` makes of the reason otherwise."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as failure:
        raise fail(f"{show(pattern)} is not a regular expression ({failure}); correct it") from failure
    if len(pattern) > MAX_PATTERN or compiled.fullmatch(""):
        raise fail(
            f"{show(pattern)} matches nothing at all (the empty text), or is over {MAX_PATTERN} characters; narrow it"
        )
    if repeats_a_repeat(pattern):
        raise fail(f"{show(pattern)} repeats a repeat, which can take for ever to match; leave the outer repeat out")
    return pattern


def search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the first match within the first MAX_TEXT characters."""
    return pattern.search(text[:MAX_TEXT])


def count(pattern: re.Pattern[str], text: str) -> int:
    """Return the number of matches within the first MAX_TEXT characters; a match of no character does not count."""
    return sum(match.end() > match.start() for match in pattern.finditer(text[:MAX_TEXT]))


def repeats_a_repeat(pattern: str) -> bool:
    """Return True if a group that holds a repeat of any number (`*`, `+`, `{2,}`) is itself repeated."""
    holds, closed = [False], False  # for each open group; whether a group that holds a repeat has just ended
    for part in _PARTS.findall(pattern):
        if _REPEAT.fullmatch(part):
            if closed:
                return True
            holds[-1] |= bool(_VARIABLE.fullmatch(part))
        closed = part == ")" and len(holds) > 1 and holds.pop()
        holds[-1] |= closed
        if part == "(":
            holds.append(False)
    return False
