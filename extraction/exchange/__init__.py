"""Exchange: read and write vectors and traits in the formats of other programs.

May import `core`, `config`, `model`, `storage` and `vectors`. Start at `formats.FORMATS` for vectors, at
`trait_formats.TRAIT_FORMATS` for traits, and at `formats.load_direction` to read a vector in a script.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "FORMATS": "formats",
    "TRAIT_FORMATS": "trait_formats",
    "export_trait": "trait_transfer",
    "export_vectors": "vector_transfer",
    "import_files": "import_command",
    "load_direction": "formats",
    "read_direction": "formats",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
