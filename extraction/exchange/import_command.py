"""Import files as vectors or as a trait, by their format or content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from extraction.core.errors import ConfigError
from extraction.core.text import show_path, suggest
from extraction.exchange.formats import FORMATS, find_recogniser
from extraction.exchange.trait_formats import TRAIT_FORMATS
from extraction.exchange.trait_transfer import import_trait
from extraction.exchange.vector_transfer import import_vectors


def import_files(
    files: Sequence[str],
    name: str,
    *,
    root: str | None = None,
    format: str | None = None,
    base: int | None = None,
    model: str | None = None,
    force: bool = False,
) -> list[str]:
    """Import a vector or a trait under a name. Returns lines for the user. Raises VectorError or TraitError."""
    if format is not None and format not in {**FORMATS, **TRAIT_FORMATS}:
        raise ConfigError(f"--format {format!r}: not known; {suggest(format, {**FORMATS, **TRAIT_FORMATS})}")
    if not _is_vector(files, format):
        if base is not None or model is not None:
            raise ConfigError("--base and --model are for vectors; these are files of a trait: leave them out")
        return import_trait(files, name, root=root, format=format, force=force)
    if len(files) != 1:
        raise ConfigError(f"{len(files)} files, of which {show_path(files[0])} holds vectors; import one at a time")
    return import_vectors(files[0], name, root=root, format=format, base=base, model=model, force=force)


def _is_vector(files: Sequence[str], format: str | None) -> bool:
    """Return True for vectors: by the format, or where it is of both (persona_vectors) by the first file's content."""
    if format is not None and (format in FORMATS) != (format in TRAIT_FORMATS):
        return format in FORMATS
    return not Path(files[0]).is_dir() and find_recogniser(files[0]) is not None
