"""Responses as JSON, or streamed as server-sent events while they are generated; and the text of their tokens.

The pieces of a stream join to the text of the whole response. A piece never ends inside a character, and never holds
the start of a stop string that may still be completed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse

from extraction.serving.batch_queue import Event, Failed
from extraction.serving.errors import HttpError
from extraction.serving.service import RequestRows, unless_disconnected

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


IndexedEvents = AsyncIterator[tuple[int, Event]]  # (index of the row, its event)
MakeChunks = Callable[[IndexedEvents], AsyncIterator[dict[str, Any]]]

DONE = "data: [DONE]\n\n"
# control characters and marks of direction, which a terminal interprets also inside JSON's quotes
UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def to_safe_json(content: Any) -> str:
    """Return compact JSON in which characters that a terminal or browser would interpret are escaped."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class JsonReply(JSONResponse):
    """A JSON response that ends with a newline."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return (to_safe_json(content) + "\n").encode()


class _EventStream(StreamingResponse):
    """Server-sent events until all rows have ended. The rows are cancelled when the response ends early."""

    def __init__(self, lines: AsyncIterator[str], rows: RequestRows) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self.rows = rows

    async def __call__(self, *asgi: Any) -> None:
        try:
            async with asyncio.timeout_at(self.rows.deadline + 1):
                await super().__call__(*asgi)
        except TimeoutError:  # the client does not read: close the connection
            return
        finally:
            self.rows.cancel()


async def stream_chunks(http: HttpRequest, rows: RequestRows, make_chunks: MakeChunks) -> StreamingResponse:
    """Stream the chunks that `make_chunks` makes of the rows' events.

    An error before the first event raises HttpError, so that it has its own status; a later one is the last chunk.
    """
    try:
        first = await unless_disconnected(http, rows.next_event())
        if isinstance(first[1], Failed):
            raise first[1].error
    except BaseException:
        rows.cancel()
        raise
    return _EventStream(_to_lines(make_chunks(_prepend(first, rows.events()))), rows)


async def _prepend(first: tuple[int, Event], others: IndexedEvents) -> IndexedEvents:
    yield first
    async for event in others:
        yield event


async def _to_lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {to_safe_json(chunk)}\n\n"
    except HttpError as error:
        yield f"data: {to_safe_json(error.body)}\n\n"
    yield DONE
