"""Errors, records and small helpers that every package uses. Imports nothing of the project."""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "ConfigError": "errors",
    "Example": "records",
    "Markers": "records",
    "ModelError": "errors",
    "NaturalPrompt": "records",
    "Prompt": "records",
    "Response": "records",
    "StoreError": "errors",
    "Trait": "records",
    "TraitlineError": "errors",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
