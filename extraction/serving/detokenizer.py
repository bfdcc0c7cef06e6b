"""Tokens to text: all at once, or piece by piece as they come, with the same text in the end.

A piece never ends inside a character, and never shows the beginning of a stop string that may still be completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet


def text_of(tokenizer: Any, token_ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of a response, up to its first stop string."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int:
    return min((at for at in map(text.find, stops) if at >= 0), default=len(text))


def stable_text(text: str, stops: Sequence[str]) -> str:
    """What of an unfinished text will stay as it is."""
    text = text[: _first_stop(text, stops)].rstrip(UNFINISHED)
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text


class Stream:
    """One response's text as it grows."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.token_ids: list[int] = []
        self.shown = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """More tokens came: the text to show now, which may be empty."""
        self.token_ids += token_ids
        text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        return self._show(stable_text(text, self.stops))

    def end(self, token_ids: Sequence[int]) -> str:
        """All tokens are there: the rest of the text."""
        return self._show(text_of(self.tokenizer, token_ids, self.stops))

    def _show(self, text: str) -> str:
        # a decoder that takes back what it wrote (which none should) is waited for, until the end
        if not text.startswith(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.shown = text
        return piece
