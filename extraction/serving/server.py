"""Start, run and stop a server: bind the address, load the models, then listen; drain at the first signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from extraction.serving.app import make_app
from extraction.serving.engine_thread import EngineThread
from extraction.serving.metrics import Metrics
from extraction.serving.models import Choice, ServedModels, load_models
from extraction.serving.service import Service
from extraction.serving.settings import Settings, address_of, bind, unusable

Log = Callable[[str], None]

KEEP_ALIVE_SECONDS = 30  # of an idle connection
FLUSH_SECONDS = 5  # for finished responses to reach their clients


def serve(settings: Settings, choice: Choice, log: Log) -> None:
    """Serve until a signal arrives. Raises ConfigError and ModelError before it listens."""
    with contextlib.closing(bind(settings)) as listener:
        models = load_models(choice, log)
        gc.collect()
        HttpServer(models, settings, listener, log).run()


class HttpServer(uvicorn.Server):
    """One server with its engine. The first SIGTERM or SIGINT drains it, the second ends the process at once."""

    def __init__(self, models: ServedModels, settings: Settings, listener: socket.socket, log: Log) -> None:
        self.settings, self.listener, self.log = settings, listener, log
        self.metrics = Metrics()
        self.engine = EngineThread(models.queue_factory(settings), settings.queue, self.metrics, log)
        self.service = Service(models, settings, self.engine)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False
        super().__init__(
            uvicorn.Config(
                make_app(self.service, self.metrics, log),
                http=protocol_with_timeout(settings.body_timeout),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `shut_down` or a signal."""
        gc.freeze()  # the objects of libraries and models live as long as the server: no collection has to visit them
        self.engine.start()
        try:
            super().run(sockets or [self.listener])
        finally:
            gc.unfreeze()
            self.engine.stop()
            self.service.prompt_encoder.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log the address. Raises ConfigError."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as failure:  # another process listened there first
            raise unusable(self.settings, failure) from failure
        names = self.service.models.names
        models = ", ".join(f"{role} {name}" for role, name in names.items() if name is not None)
        self.log(f"listening on {address_of(self.listener)} ({models})")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end the process at the second."""
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        self.shut_down()

    def shut_down(self) -> None:
        """Refuse new requests, finish the running ones, then stop. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Finish the accepted rows within the grace time. Meanwhile requests get 503, and /health the reason."""
        self.engine.drain()
        n_rows = self.engine.n_rows
        self.log(f"stopping: {n_rows} rows to finish" if n_rows else "stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.grace):
                while self.engine.n_rows:
                    await asyncio.sleep(0.02)
        if self.engine.n_rows:
            self.log(f"not finished within {self.settings.grace:g} s: {self.engine.n_rows} rows")
            await asyncio.to_thread(self.engine.stop)
        self.should_exit = True


def protocol_with_timeout(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with a limit on the seconds until a request's headers have arrived.

    A client that sends its headers slowly would otherwise hold a connection for as long as it likes.
    """

    class HeaderTimeoutProtocol(H11Protocol):
        """One connection."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Start the timer."""
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            """Stop the timer once a request has begun; start it again after its response."""
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._start_timer()
            else:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the timer."""
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self.timer is None:
                self.timer = self.loop.call_later(seconds, self._close_if_idle)

        def _stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _close_if_idle(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return HeaderTimeoutProtocol
