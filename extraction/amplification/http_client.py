"""Calls of a Traitline server: JSON there and back, by the standard library.

The token comes from the environment, goes to the address that was given and nowhere else, and is never shown.
"""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from extraction.core.errors import ConfigError, RequestError
from extraction.core.text import one_line, show

TOKEN = "TRAITLINE_TOKEN"
MAX_ANSWER_BYTES = 100_000_000
SHOWN = 300  # characters of what a server says
LONGEST_WAIT = 60.0
BUSY = 429


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class HttpServer:
    """An address, such as http://127.0.0.1:8000. Raises ConfigError for one that is none, or that holds a secret."""

    address: str
    timeout: float = 600.0
    wait: Callable[[float], None] = field(default=time.sleep, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            secret = bool(parts.username or parts.password or parts.query or parts.fragment or "@" in self.address)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            secret, sound = "@" in self.address, False
        if secret:
            raise ConfigError(f"--server-url holds more than an address; leave it out, and put the token in {TOKEN}")
        if not sound or not self.address.isascii() or not self.address.isprintable() or " " in self.address:
            raise ConfigError(
                f"--server-url {show(self.address)}: not an http or https address; write it as http://127.0.0.1:8000"
            )
        token = os.environ.get(TOKEN, "")
        if not token.isascii() or not (token or "-").isprintable() or " " in token:
            raise ConfigError(f"{TOKEN}: no token; it may hold printable ASCII characters without spaces")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one call; asked a second time where the server is busy. Raises RequestError."""
        try:
            return self._post(path, body)
        except _Busy as busy:
            self.wait(busy.seconds)
        try:
            return self._post(path, body)
        except _Busy as busy:
            raise RequestError(f"{self.address}{path}: {busy}; ask less at a time, or later") from busy

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        url = self.address.rstrip("/") + path
        data = json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url, data, headers, method="POST")
        try:
            with self._opener().open(request, timeout=self.timeout) as answer:
                return _read(answer.read(MAX_ANSWER_BYTES + 1), url)
        except urllib.error.HTTPError as failure:
            with failure:
                raise _refusal(failure, url) from failure
        except (OSError, ValueError, HTTPException) as failure:  # no route, no answer in time, or no HTTP
            reason = getattr(failure, "reason", None) or failure
            raise RequestError(f"{url}: {_brief(reason)}; is the server running?") from failure

    def _opener(self) -> urllib.request.OpenerDirector:
        """Without a proxy where the server is on this machine, whatever the environment says."""
        handlers: list[Any] = [_NoRedirects()]
        if _is_here(urlsplit(self.address).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)


class _Busy(RequestError):
    """The server asks to come again."""

    def __init__(self, said: str, seconds: float) -> None:
        super().__init__(said)
        self.seconds = seconds


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _read(data: bytes, url: str) -> dict[str, Any]:
    if len(data) > MAX_ANSWER_BYTES:
        raise RequestError(f"{url}: answers with more than {MAX_ANSWER_BYTES} bytes; ask less at a time")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise RequestError(
            f"{url}: the answer is not JSON ({_brief(data[:60].decode('utf-8', 'replace'))}); is it a Traitline server?"
        ) from failure
    if not isinstance(answer, dict):
        raise RequestError(f"{url}: the answer is not a JSON object; is it a Traitline server?")
    return answer


def _refusal(failure: urllib.error.HTTPError, url: str) -> RequestError:
    said = f"status {failure.code}: {_said(failure.read(100_000))}"
    if failure.code == BUSY:
        return _Busy(said, _retry_after(failure.headers.get("Retry-After", "")))
    return RequestError(f"{url}: {said}")


def _said(data: bytes) -> str:
    """The message in an error's body."""
    try:
        return message_in(json.loads(data)) or "no reason given"
    except (ValueError, RecursionError):
        return _brief(data.decode("utf-8", "replace")) or "no reason given"


def message_in(body: Any) -> str:
    """What a body says that went wrong, wherever servers put it; on one line, not too long."""
    found = body
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail", "msg") if key in found), str(found))
    return _brief(found)


def _brief(said: Any) -> str:
    return one_line(said)[:SHOWN]


def _retry_after(text: str) -> float:
    """The seconds that a server asks to wait, up to a minute; 1 where it does not say."""
    try:
        seconds = float(text)
    except ValueError:
        return 1.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 1.0
