"""The HTTP server: plain, amplified and speculative generation, batched over all clients.

A request passes `middleware` (access, size of the body), `routes` or `openai_routes` (one function an endpoint),
`service` (prompts to rows), `engine_thread` and `batch_queue` (the decode steps), and returns as events of its rows.

May import every package below it; needs the extra `serve`. Start at `app.make_app` for the endpoints and at
`server.serve` to run one.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Choice": "models",
    "HttpServer": "server",
    "ServedModels": "models",
    "Settings": "settings",
    "load_models": "models",
    "make_app": "app",
    "serve": "server",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
