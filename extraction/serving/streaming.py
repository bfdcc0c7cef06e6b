"""Server-sent events: a response while it is being made."""

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
from extraction.serving.service import RequestRows, unless_gone

Events = AsyncIterator[tuple[int, Event]]
Pieces = Callable[[Events], AsyncIterator[dict[str, Any]]]

END = "data: [DONE]\n\n"
# what a terminal would obey, or show in another order, even inside of JSON's quotes
UNSAFE = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def dumps(content: Any) -> str:
    """JSON that a terminal and a browser take for text."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Reply(JSONResponse):
    """A JSON answer."""

    def render(self, content: Any) -> bytes:
        """As bytes, with a line's end for people with curl."""
        return (dumps(content) + "\n").encode()


class _Stream(StreamingResponse):
    """Events until all rows have ended; whatever happens, the rows are taken back then."""

    def __init__(self, lines: AsyncIterator[str], rows: RequestRows) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self.rows = rows

    async def __call__(self, *asgi: Any) -> None:
        try:
            async with asyncio.timeout_at(self.rows.ends_at + 1):
                await super().__call__(*asgi)
        except TimeoutError:  # the client does not read: hang up
            return
        finally:
            self.rows.close()


async def stream(http: HttpRequest, rows: RequestRows, pieces: Pieces) -> StreamingResponse:
    """Answer with what `pieces` makes of the rows' events. What fails before the first token has its own status."""
    try:
        first = await unless_gone(http, rows.next())
        if isinstance(first[1], Failed):
            raise first[1].error
    except BaseException:
        rows.close()
        raise
    return _Stream(_lines(pieces(_after(first, rows.all()))), rows)


async def _after(first: tuple[int, Event], others: Events) -> Events:
    yield first
    async for each in others:
        yield each


async def _lines(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for each in objects:
            yield f"data: {dumps(each)}\n\n"
    except HttpError as refused:
        yield f"data: {dumps(refused.body)}\n\n"
    yield END
