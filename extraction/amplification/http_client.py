"""HTTP client of a Traitline server: JSON requests and replies over httpx2.

The token comes from the environment, is sent to the configured address only, and is never part of a message.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from extraction.core.errors import ConfigError, RequestError
from extraction.core.text import one_line, show

if TYPE_CHECKING:
    import ssl

    import httpx2

TOKEN_VARIABLE = "TRAITLINE_TOKEN"
MAX_REPLY_BYTES = 100_000_000
MAX_ERROR_BYTES = 100_000
MAX_MESSAGE_CHARS = 300  # of a server's message, shown in ours
MAX_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class HttpClient:
    """Client of one server. Raises ConfigError for an invalid address or token, and for an address with credentials.

    Args:
        address: Such as http://127.0.0.1:8000. Named --server-url in messages.
        timeout: Seconds to wait for a connection, and for each part of the reply.
        sleep: Replaced in tests.
    """

    address: str
    timeout: float = 600.0
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            secret = bool(parts.username or parts.password or parts.query or parts.fragment or "@" in self.address)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            secret, valid = "@" in self.address, False
        if secret:
            raise ConfigError(
                f"--server-url holds more than an address; give the address alone, and the token in {TOKEN_VARIABLE}"
            )
        if not valid or not self.address.isascii() or not self.address.isprintable() or " " in self.address:
            raise ConfigError(
                f"--server-url {show(self.address)}: not an http or https address; write it as http://127.0.0.1:8000"
            )
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token.isascii() or not (token or "-").isprintable() or " " in token:
            raise ConfigError(f"{TOKEN_VARIABLE}: invalid token; use printable ASCII characters without spaces")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object that the server replies with.

        Status 429, and 503 with a Retry-After header, are retried once after the seconds that the server asks for, at
        most a minute. Redirects are not followed. Raises RequestError.
        """
        import httpx2

        url = self.address.rstrip("/") + path
        try:
            with self._open() as client:
                try:
                    return self._post(client, url, body)
                except _Busy as busy:
                    self.sleep(busy.retry_seconds)
                return self._post(client, url, body)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as failure:
            reason = _truncate(failure) or type(failure).__name__
            raise RequestError(f"{url}: {reason}; is the server running?") from failure

    def _post(self, client: httpx2.Client, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        content = json.dumps(body, allow_nan=False).encode()
        with client.stream("POST", url, content=content, headers=headers) as response:
            if not response.is_success:
                raise _status_error(response, url)
            return _parse(_read_up_to(response, MAX_REPLY_BYTES + 1), url)

    def _open(self) -> httpx2.Client:
        """Return a client that follows no redirects. A server on this machine is never asked through a proxy."""
        import httpx2

        loopback = _is_loopback(urlsplit(self.address).hostname or "")
        context = _ssl_context()
        transport = httpx2.HTTPTransport(verify=context) if loopback else None  # None: the environment's proxies apply
        return httpx2.Client(transport=transport, verify=context, timeout=self.timeout, follow_redirects=False)


class _Busy(RequestError):
    """The server refuses for now and asks to retry after some seconds."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@cache
def _ssl_context() -> ssl.SSLContext:
    """Return the one TLS configuration of the process; loading the certificates takes tens of milliseconds."""
    import httpx2

    return httpx2.create_ssl_context()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _read_up_to(response: httpx2.Response, limit: int) -> bytes:
    """Return the undecoded body, cut off after `limit` bytes."""
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) >= limit:
            break
    return bytes(data[:limit])


def _parse(data: bytes, url: str) -> dict[str, Any]:
    if len(data) > MAX_REPLY_BYTES:
        raise RequestError(f"{url}: the reply has more than {MAX_REPLY_BYTES} bytes; lower --batch-size")
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError) as failure:
        start = _truncate(data[:60].decode("utf-8", "replace"))
        raise RequestError(f"{url}: the reply is not JSON ({start}); is it a Traitline server?") from failure
    if not isinstance(reply, dict):
        raise RequestError(f"{url}: the reply is not a JSON object; is it a Traitline server?")
    return reply


def _status_error(response: httpx2.Response, url: str) -> RequestError:
    status, retry_after = response.status_code, response.headers.get("Retry-After")
    message = f"{url}: status {status}: {_error_text(_read_up_to(response, MAX_ERROR_BYTES))}"
    if status == 429 or (status == 503 and retry_after is not None):
        return _Busy(f"{message}; lower --batch-size, or try later", _retry_seconds(retry_after or ""))
    return RequestError(message)


def _error_text(data: bytes) -> str:
    try:
        text = message_in(json.loads(data))
    except (ValueError, RecursionError):
        text = _truncate(data.decode("utf-8", "replace"))
    return text or "no reason given"


def message_in(body: Any) -> str:
    """Return the message of a JSON error body in one line, under whichever of the usual keys it stands."""
    found = body
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail", "msg") if key in found), str(found))
    return _truncate(found)


def _truncate(text: Any) -> str:
    return one_line(text)[:MAX_MESSAGE_CHARS]


def _retry_seconds(header: str) -> float:
    """Parse a Retry-After header: 0 to MAX_RETRY_SECONDS, and 1 where it holds no number."""
    try:
        seconds = float(header)
    except ValueError:
        return 1.0
    return min(max(seconds, 0.0), MAX_RETRY_SECONDS) if math.isfinite(seconds) else 1.0
