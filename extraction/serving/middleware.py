"""Who may ask at all: the first thing that a request meets. The body is read here, within its limits."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from extraction.core.text import show
from extraction.serving.errors import HttpError
from extraction.serving.settings import MAX_BODY, Settings, is_loopback

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DRAINED = 16 * MAX_BODY  # read and thrown away, so that whoever sends too much still hears why
BODILESS = ("GET", "HEAD", "OPTIONS")
SAFE = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


class Gone(Exception):
    """The client left before its request was read."""


class Middleware:
    """ASGI in, ASGI out: token, Host, Origin, size and slowness of the body."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.n_bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websockets here; the server closes them
        try:
            headers = Headers(scope=scope)
            check_host(headers, self.settings)
            check_token(headers, self.settings.token)
            if scope["method"] in BODILESS:
                return await self.app(scope, receive, _safely(send))
            with self._held():
                body = await read_body(headers, receive, self.settings.body_timeout)
                check_type(scope["method"], headers, body)
                return await self.app(scope, _again(body, receive), _safely(send))
        except Gone:
            return None
        except HttpError as refused:
            response = JSONResponse(refused.body, refused.status, headers={**refused.headers, "connection": "close"})
            return await response(scope, receive, _safely(send))

    @contextmanager
    def _held(self) -> Iterator[None]:
        """A place among the requests whose bodies are in memory. Raises Refused where all are taken."""
        if self.n_bodies >= self.settings.most_requests:
            said = f"{self.n_bodies} requests are being answered; try again in 1 s"
            raise HttpError(429, said, code="requests", headers={"retry-after": "1"})
        self.n_bodies += 1
        try:
            yield
        finally:
            self.n_bodies -= 1


def check_host(headers: Headers, settings: Settings) -> None:
    """A page of a foreign site, or of a foreign name for this address (DNS rebinding), gets nothing."""
    host = headers.get("host", "")
    name = _name_of(host)
    if name not in settings.hosts and (is_loopback(settings.host) or not _is_address(name)):
        raise HttpError(
            403,
            f"Host {show(host)}: not a name of this server; use its address, or start it with --allow-host",
            code="host",
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise HttpError(403, f"Origin {show(origin)}: pages of other sites may not ask this server", code="origin")


def check_token(headers: Headers, token: str | None) -> None:
    """Compared in a time that does not tell how much of it was right."""
    if token is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    if scheme.lower() != "bearer" or not right:
        said = "wrong token" if given else "no token"
        raise HttpError(
            401,
            f"{said}; send the header Authorization: Bearer TOKEN",
            code="token",
            headers={"www-authenticate": "Bearer"},
        )


def check_type(method: str, headers: Headers, body: bytes) -> None:
    """JSON alone: what a form of a web page can send is no JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise HttpError(415, f"Content-Type {show(kind)}: send the header Content-Type: application/json", code="type")
    if body[:3] == b"\xef\xbb\xbf":
        raise HttpError(400, "the body starts with a byte order mark; send UTF-8 without it", code="json_invalid")


async def read_body(headers: Headers, receive: Receive, seconds: float) -> bytes:
    """The whole body, chunked or not, if it comes in time and is not too long."""
    chunks: list[bytes] = []
    size, more = 0, True
    declared = headers.get("content-length", "0")
    too_long = not declared.isascii() or not declared.isdecimal() or int(declared[:20]) > MAX_BODY
    try:
        async with asyncio.timeout(seconds):
            while more and size <= DRAINED:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                too_long = too_long or size > MAX_BODY
                if not too_long:
                    chunks.append(chunk)
    except TimeoutError:
        if not too_long:
            raise HttpError(
                408, f"the body took more than {seconds:g} s to arrive; send it at once", code="body_timeout"
            ) from None
    if too_long:
        raise HttpError(413, f"the body has more than {MAX_BODY} bytes; send less at a time", code="body_size")
    return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _safely(send: Send, added: Mapping[str, str] = SAFE) -> Send:
    """Headers that keep a browser from taking an answer for anything but data."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in added.items():
                headers[name] = value
        await send(message)

    return sending


def _name_of(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
