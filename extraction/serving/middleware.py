"""Access control of every request, before any route: Host, Origin, token, and the size and arrival of the body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from extraction.core.text import show
from extraction.serving.errors import ClientDisconnected, HttpError
from extraction.serving.settings import MAX_BODY, Settings, is_loopback

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_DISCARDED_BYTES = 16 * MAX_BODY  # of a body that is too long: read, so that its sender receives the error
METHODS_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


class Middleware:
    """ASGI middleware that checks a request, reads its whole body, and calls `app` with it."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.n_bodies = 0  # requests whose bodies are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a valid request on; answer any other with its error."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a websocket: uvicorn closes it
        send = _add_security_headers(send)
        try:
            headers = Headers(scope=scope)
            check_host(headers, self.settings)
            check_token(headers, self.settings.token)
            if scope["method"] in METHODS_WITHOUT_BODY:
                return await self.app(scope, receive, send)
            with self._limit_bodies():
                body = await read_body(headers, receive, self.settings.body_timeout)
                check_content(scope["method"], headers, body)
                return await self.app(scope, _replay(body, receive), send)
        except ClientDisconnected:
            return None
        except HttpError as error:
            response = JSONResponse(error.body, error.status, headers={**error.headers, "connection": "close"})
            return await response(scope, receive, send)

    @contextmanager
    def _limit_bodies(self) -> Iterator[None]:
        """Count a request whose body is in memory. Raises HttpError 429 at the limit."""
        if self.n_bodies >= self.settings.most_requests:
            message = f"{self.n_bodies} requests are being answered, the limit; try again in 1 s"
            raise HttpError(429, message, code="requests", headers={"retry-after": "1"})
        self.n_bodies += 1
        try:
            yield
        finally:
            self.n_bodies -= 1


def check_host(headers: Headers, settings: Settings) -> None:
    """Refuse requests of web pages: a foreign Origin, or a foreign Host (DNS rebinding). Raises HttpError 403."""
    host = headers.get("host", "")
    name = _host_name(host)
    if name not in settings.hosts and (is_loopback(settings.host) or not _is_ip_address(name)):
        message = f"Host {show(host)}: not a name of this server; use its address, or start it with --allow-host"
        raise HttpError(403, message, code="host")
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        message = f"Origin {show(origin)}: a page of another site can not use this server; call it from a program"
        raise HttpError(403, message, code="origin")


def check_token(headers: Headers, token: str | None) -> None:
    """Compare the bearer token in constant time. Raises HttpError 401."""
    if token is None:
        return
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    equal = hmac.compare_digest(sent.strip().encode("utf-8", "replace"), token.encode())
    if scheme.lower() != "bearer" or not equal:
        message = f"{'wrong' if sent else 'no'} token; send the header Authorization: Bearer TOKEN"
        raise HttpError(401, message, code="token", headers={"www-authenticate": "Bearer"})


def check_content(method: str, headers: Headers, body: bytes) -> None:
    """Refuse a POST that is not declared as JSON, as a web page's form is, and a byte order mark. Raises HttpError."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and content_type != "application/json":
        message = f"Content-Type {show(content_type)}: send the header Content-Type: application/json"
        raise HttpError(415, message, code="type")
    if body[:3] == b"\xef\xbb\xbf":
        raise HttpError(400, "the body starts with a byte order mark; send UTF-8 without it", code="json_invalid")


async def read_body(headers: Headers, receive: Receive, seconds: float) -> bytes:
    """Read a body of at most MAX_BODY bytes, chunked or not. Raises HttpError 408, 413, and ClientDisconnected."""
    chunks: list[bytes] = []
    size, more = 0, True
    declared = headers.get("content-length", "0")
    too_long = not declared.isascii() or not declared.isdecimal() or int(declared[:20]) > MAX_BODY
    try:
        async with asyncio.timeout(seconds):
            while more and size <= MAX_DISCARDED_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                too_long = too_long or size > MAX_BODY
                if not too_long:
                    chunks.append(chunk)
    except TimeoutError:
        if not too_long:
            late = f"the body took more than {seconds:g} s to arrive; send it at once"
            raise HttpError(408, late, code="body_timeout") from None
    if too_long:
        raise HttpError(413, f"the body has more than {MAX_BODY} bytes; send less at a time", code="body_size")
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once more, then the connection's later messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _add_security_headers(send: Send) -> Send:
    """Return a `send` that adds the headers which keep a browser from interpreting a response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with_headers


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
