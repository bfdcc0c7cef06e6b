"""Decode token ids to text, whole or incrementally; the pieces of a stream join to the same text.

A piece never ends inside a character, and never holds the start of a stop string that may still be completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not yet a character


def decode(tokenizer: Any, token_ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """Return the text of a response, up to its first stop string."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int:
    return min((at for at in map(text.find, stops) if at >= 0), default=len(text))


def stable_prefix(text: str, stops: Sequence[str]) -> str:
    """Return the part of an unfinished text that later tokens can not change."""
    text = text[: _first_stop(text, stops)].rstrip(REPLACEMENT)
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text


class IncrementalDecoder:
    """Decoder of one streamed response."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.token_ids: list[int] = []
        self._emitted = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """Append tokens. Returns the text that is new and stable, which may be empty."""
        self.token_ids += token_ids
        text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        return self._new_text(stable_prefix(text, self.stops))

    def finish(self, token_ids: Sequence[int]) -> str:
        """Return the rest of the text. `token_ids`: all tokens of the response."""
        return self._new_text(decode(self.tokenizer, token_ids, self.stops))

    def _new_text(self, text: str) -> str:
        # a tokenizer may rewrite text that it has decoded before (none should): wait until it agrees, or the end
        if not text.startswith(self._emitted):
            return ""
        piece = text[len(self._emitted) :]
        self._emitted = text
        return piece
