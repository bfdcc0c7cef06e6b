"""The web application: routes, health, metrics, and what errors look like."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from extraction import __version__
from extraction.core.errors import TraitlineError
from extraction.serving import openai_routes, routes
from extraction.serving.errors import HttpError, of_validation, where
from extraction.serving.metrics import CONTENT_TYPE, Metrics
from extraction.serving.middleware import App, Message, Middleware, Receive, Scope, Send
from extraction.serving.service import ClientGone, Service
from extraction.serving.streaming import Reply

Say = Callable[[str], None]

STATUS = {404: "no such path; see docs/server.md", 405: "this path takes another method"}


def make_app(desk: Service, meter: Metrics, say: Say) -> App:
    """Guard, counters and routes as one ASGI application. Pages that load scripts (FastAPI's docs) are off."""
    app = FastAPI(
        title="Traitline", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.include_router(routes.routes(desk))
    app.include_router(openai_routes.routes(desk))
    _add_pages(app, desk, meter)
    _add_errors(app, say)
    return _Counting(Middleware(app, desk.settings), meter, frozenset(app.openapi()["paths"]))


def _add_pages(app: FastAPI, desk: Service, meter: Metrics) -> None:
    meter.add_gauge("rows_now", "Rows that wait or run.", lambda: desk.scheduler.n_rows)
    meter.add_gauge("queue_limit", "Limit on the rows that wait or run.", lambda: desk.settings.queue)
    meter.add_gauge("ready", "1 while requests are accepted.", lambda: desk.scheduler.state == "ready")

    @app.get("/health")
    async def health() -> Response:
        scheduler = desk.scheduler
        state = {"status": scheduler.state, "version": __version__, "models": dict(desk.served.names)}
        load = {
            "rows": scheduler.n_rows,
            "queue": desk.settings.queue,
            "batch_size": desk.settings.batch_size,
            "uptime_seconds": round(time.time() - meter.started, 3),
        }
        good = scheduler.state == "ready"
        return Reply({**state, **load} if good else {**state, **load, **scheduler.refusal().body}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(meter.exposition(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI, say: Say) -> None:
    @app.exception_handler(HttpError)
    async def refused(_http: HttpRequest, failure: HttpError) -> Response:
        return Reply(failure.body, failure.status, headers=failure.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_http: HttpRequest, failure: RequestValidationError) -> Response:
        told = of_validation(list(failure.errors()))
        return Reply(told.body, told.status)

    @app.exception_handler(HTTPException)
    async def http(_http: HttpRequest, failure: HTTPException) -> Response:
        said = STATUS.get(failure.status_code, "the body can't be read as JSON; send one JSON object")
        told = HttpError(failure.status_code, said, headers=dict(failure.headers or {}))
        return Reply(told.body, told.status, headers=told.headers)

    @app.exception_handler(TraitlineError)
    async def wrong(_http: HttpRequest, failure: TraitlineError) -> Response:
        return Reply(HttpError(422, str(failure)).body, 422)

    @app.exception_handler(ClientGone)
    async def gone(_http: HttpRequest, _failure: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def broken(_http: HttpRequest, failure: Exception) -> Response:
        say(f"internal error: {where(failure)}")
        return Reply(
            HttpError(500, f"internal error ({type(failure).__name__}); the server's output says where").body, 500
        )


class _Counting:
    """Counts requests by path and status; a path that does not exist is counted as `other`."""

    def __init__(self, app: App, meter: Metrics, paths: frozenset[str]) -> None:
        self.app, self.meter, self.paths = app, meter, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.meter.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, sending)
