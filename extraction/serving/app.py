"""The ASGI application: middleware, request counter, routes, /health, /metrics, and the handlers of errors."""

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
from extraction.serving.errors import ClientDisconnected, HttpError, code_location, validation_error
from extraction.serving.metrics import CONTENT_TYPE, Metrics
from extraction.serving.middleware import App, Message, Middleware, Receive, Scope, Send
from extraction.serving.service import Service
from extraction.serving.streaming import JsonReply

Log = Callable[[str], None]

MESSAGES = {404: "no such path; see docs/server.md", 405: "this path takes another method; see docs/server.md"}


def make_app(service: Service, metrics: Metrics, log: Log) -> App:
    """Return the application. FastAPI's documentation pages are off: they load scripts of other sites."""
    app = FastAPI(
        title="Traitline", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.include_router(routes.make_router(service))
    app.include_router(openai_routes.make_router(service))
    _add_health(app, service, metrics)
    _add_metrics(app, service, metrics)
    _add_error_handlers(app, log)
    return _RequestCounter(Middleware(app, service.settings), metrics, frozenset(app.openapi()["paths"]))


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        engine, settings = service.engine, service.settings
        content = {
            "status": engine.state,
            "version": __version__,
            "models": dict(service.models.names),
            "rows": engine.n_rows,
            "queue": settings.queue,
            "batch_size": settings.batch_size,
            "uptime_seconds": round(time.time() - metrics.started, 3),
        }
        if engine.state == "ready":
            return JsonReply(content)
        return JsonReply({**content, **engine.unavailable_error().body}, 503)


def _add_metrics(app: FastAPI, service: Service, metrics: Metrics) -> None:
    metrics.add_gauge("rows_now", "Rows that wait or run.", lambda: service.engine.n_rows)
    metrics.add_gauge("queue_limit", "Limit on the rows that wait or run.", lambda: service.settings.queue)
    metrics.add_gauge("ready", "1 while requests are accepted.", lambda: service.engine.state == "ready")

    @app.get("/metrics")
    async def exposition() -> Response:
        return PlainTextResponse(metrics.exposition(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, log: Log) -> None:
    def reply(error: HttpError) -> Response:
        return JsonReply(error.body, error.status, headers=error.headers)

    @app.exception_handler(HttpError)
    async def http_error(_http: HttpRequest, failure: HttpError) -> Response:
        return reply(failure)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_http: HttpRequest, failure: RequestValidationError) -> Response:
        return reply(validation_error(list(failure.errors())))

    @app.exception_handler(HTTPException)
    async def framework_error(_http: HttpRequest, failure: HTTPException) -> Response:
        message = MESSAGES.get(failure.status_code, "the body can't be read as JSON; send one JSON object")
        return reply(HttpError(failure.status_code, message, headers=dict(failure.headers or {})))

    @app.exception_handler(TraitlineError)
    async def unanswerable(_http: HttpRequest, failure: TraitlineError) -> Response:
        return reply(HttpError(422, str(failure)))

    @app.exception_handler(ClientDisconnected)
    async def disconnected(_http: HttpRequest, _failure: ClientDisconnected) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def internal_error(_http: HttpRequest, failure: Exception) -> Response:
        log(f"internal error: {code_location(failure)}")
        return reply(HttpError(500, f"internal error ({type(failure).__name__}); see the server's output"))


class _RequestCounter:
    """ASGI middleware that counts requests by path and status; paths that do not exist count as `other`."""

    def __init__(self, app: App, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, count_and_send)
