"""JSON responses, and responses streamed as server-sent events while they are generated."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse

from extraction.serving.errors import HttpError
from extraction.serving.events import Event, Failed
from extraction.serving.service import RequestRows, unless_disconnected

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
