"""Activations: what is captured of a model while it generates, pooled or per token, and where in a layer it is read.

May import `core`, `config` and `model`. Pass a `Capture` (pooled), `TokenProjections` or `TokenInternals` (per token)
to `extraction.engine.generate`. Start at `sites` for where activations are read and at `pooled` for how a hook follows
the rows of a running batch.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Capture": "pooled",
    "CaptureHook": "pooled",
    "CaptureSpec": "pooled",
    "TokenInternals": "per_token",
    "TokenProjections": "per_token",
    "parts_of": "internals",
    "stream_of": "internals",
    "taps_of": "sites",
    "watch_taps": "sites",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
