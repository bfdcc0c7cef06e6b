"""Start, listen, and stop: the address is taken first, then the models load, and only then is anybody heard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from extraction.serving.app import make_app
from extraction.serving.connections import impatient
from extraction.serving.engine_thread import EngineThread
from extraction.serving.metrics import Metrics
from extraction.serving.models import Choice, ServedModels, load_served
from extraction.serving.service import Service
from extraction.serving.settings import Settings, address_of, bind, unusable

Say = Callable[[str], None]

KEEP_ALIVE = 30  # seconds that a connection may be idle
LAST_WORDS = 5  # seconds for what is finished to reach its reader


def serve(settings: Settings, choice: Choice, say: Say) -> None:
    """Load the models and answer until a signal comes. Raises ConfigError, ModelError before it listens."""
    with contextlib.closing(bind(settings)) as taken:
        HttpService(load_served(choice, say), settings, taken, say).run()


class HttpService(uvicorn.Server):
    """One server with its engine. The first SIGTERM or SIGINT drains, the second ends the process at once."""

    def __init__(self, served: ServedModels, settings: Settings, taken: socket.socket, say: Say) -> None:
        self.settings, self.taken, self.say = settings, taken, say
        self.meter = Metrics()
        self.scheduler = EngineThread(served.opener(settings), settings.queue, self.meter, say)
        self.desk = Service(served, settings, self.scheduler)
        self.stopping: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.signalled = False
        super().__init__(
            uvicorn.Config(
                make_app(self.desk, self.meter, say),
                http=impatient(settings.body_timeout),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until told to stop."""
        self.scheduler.start()
        try:
            super().run(sockets or [self.taken])
        finally:
            self.scheduler.stop()
            self.desk.prompter.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        self.loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as failure:  # somebody else listened there first
            raise unusable(self.settings, failure) from failure
        names = self.desk.served.names
        models = ", ".join(f"{role} {name}" for role, name in names.items() if name is not None)
        self.say(f"listening on {address_of(self.taken)} ({models})")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; another: end."""
        if self.signalled:
            os._exit(128 + sig)
        self.signalled = True
        self.shut_down()

    def shut_down(self) -> None:
        """Take nothing more, finish what runs, then end. May be called from any thread."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        if self.stopping is None:
            self.stopping = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """The door stays open meanwhile, so that who asks hears 503 and who looks at /health sees why."""
        self.scheduler.drain()
        n_rows = self.scheduler.n_rows
        self.say(f"stopping: {n_rows} rows to finish" if n_rows else "stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.grace):
                while self.scheduler.n_rows:
                    await asyncio.sleep(0.02)
        if self.scheduler.n_rows:
            self.say(f"not finished within {self.settings.grace:g} s: {self.scheduler.n_rows} rows")
            await asyncio.to_thread(self.scheduler.stop)
        self.should_exit = True
