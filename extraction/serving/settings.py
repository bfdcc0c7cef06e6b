"""Settings of a server: address, token, limits and timeouts. Checked before any model loads."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec

from extraction.core.errors import ConfigError, MissingPackage
from extraction.core.text import show, show_path
from extraction.core.text_files import read_text

TOKEN_VARIABLE = "TRAITLINE_TOKEN"
MIN_TOKEN = 16  # characters: fewer can be guessed
MAX_TOKEN_BYTES = 4096
MAX_BODY = 1_000_000  # bytes
MAX_ROWS = 32  # prompts, or choices, of one HTTP request
MAX_DEPTH = 16  # of speculation
MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Settings:
    """Settings of a server. Times in seconds, the rest in sequences and tokens.

    `max_total_tokens` counts prompt and response together; the models' context is a limit too. `queue` counts the
    sequences that wait or run. `grace`: how long a stopping server goes on with the requests that have begun.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    batch_size: int = 32
    max_total_tokens: int = 2048
    max_new_tokens: int = 1024
    queue: int = 256
    timeout: float = 600.0
    body_timeout: float = 10.0
    grace: float = 30.0
    depth: int = 4

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.token is None:
            raise ConfigError(
                f"--host {show(self.host)}: anybody who reaches that address could use the server; set "
                f"{TOKEN_VARIABLE} or give --token-file, or take 127.0.0.1"
            )
        if self.max_new_tokens >= self.max_total_tokens:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}: leaves no room for a prompt in --max-total-tokens "
                f"{self.max_total_tokens}; give less"
            )

    @property
    def most_requests(self) -> int:
        """Number of HTTP requests with a body that are held at a time; each may hold a million bytes."""
        return self.queue + 64

    @property
    def hosts(self) -> frozenset[str]:
        """Names that a Host header may hold, besides addresses if the server listens beyond this machine."""
        named = {"localhost", "127.0.0.1", "::1", self.host, *self.names}
        if not is_loopback(self.host):
            named |= {socket.gethostname(), socket.getfqdn()}
        return frozenset(name.lower() for name in named)


def check_installed() -> None:
    """Raise MissingPackage where the extra `serve` is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise MissingPackage(f"traitline serve: needs {' and '.join(missing)}; pip install 'traitline[serve]'")


def is_loopback(host: str) -> bool:
    """Return True if an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_token(path: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the secret that every request must carry: from a file, else the environment, else None. Never shown.

    Raises ConfigError if it is too short, or can't stand in a header.
    """
    if path is not None:
        place, text = show_path(path), read_text(path, MAX_TOKEN_BYTES).strip()
    elif environment.get(TOKEN_VARIABLE):
        place, text = TOKEN_VARIABLE, environment[TOKEN_VARIABLE].strip()
    else:
        return None
    if len(text) < MIN_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(
            f"{place}: a token has {MIN_TOKEN} or more printable ASCII characters and no space; "
            "make one with `openssl rand -hex 32`"
        )
    return text


def bind(settings: Settings) -> socket.socket:
    """Bind the address before the models load, so that one in use fails at once. The socket does not listen yet."""
    with ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            taken = undo.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except (OSError, UnicodeError, OverflowError) as failure:
            raise unusable(settings, failure) from failure
        undo.pop_all()
        return taken


def unusable(settings: Settings, failure: Exception) -> ConfigError:
    """Return the error of an address that can't be bound."""
    reason = str(getattr(failure, "strerror", None) or failure).lower()
    return ConfigError(
        f"--host {show(settings.host)} --port {settings.port}: {reason}; give another, or --port 0 for any free one"
    )


def address_of(taken: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
