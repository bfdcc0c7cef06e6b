"""Vectors: find a trait's directions, and validate them on questions and instructions that they were not fitted on.

May import `core` and `storage`. Start at `method_table.METHODS` for the ways to find a direction, and at
`card.build_card` for the validation. `direction.Direction` is the value that the rest of the program passes on.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "DEFAULT_METHODS": "method_table",
    "Direction": "direction",
    "LabelledRows": "splits",
    "METHODS": "method_table",
    "build_card": "card",
    "fit_layers": "methods",
    "split_rows": "splits",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
