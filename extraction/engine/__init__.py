"""The engine: left-padded continuous batching, with activations captured in the same forward pass.

May import `core`, `config`, `model` and `activations`. Start at `batch.ContinuousBatch` for the decode loop and at
`generate.generate` for the way in.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Completion": "requests",
    "ContinuousBatch": "batch",
    "Request": "requests",
    "Sample": "sampler",
    "generate": "generate",
    "teacher_force": "generate",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
