"""The body of `traitline import`: a file of vectors, or the files of a trait, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from extraction.core.errors import ConfigError
from extraction.core.text import show_path, suggest
from extraction.exchange.formats import READERS, kind_of_file
from extraction.exchange.trait_forms import FORMS
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
    """Import a vector or a trait under a name. Returns what to say. Raises VectorError or TraitError."""
    if format is not None and format not in {**READERS, **FORMS}:
        raise ConfigError(f"--format {format!r}: not known; {suggest(format, {**READERS, **FORMS})}")
    if not _is_vector(files, format):
        if base is not None or model is not None:
            raise ConfigError("--base and --model are for vectors; these files are a trait's")
        return import_trait(files, name, root=root, format=format, force=force)
    if len(files) != 1:
        raise ConfigError(f"{len(files)} files, of which {show_path(files[0])} holds vectors; import one at a time")
    return import_vectors(files[0], name, root=root, format=format, base=base, model=model, force=force)


def _is_vector(files: Sequence[str], format: str | None) -> bool:
    """By the format where only one of the two has it (persona_vectors is both), else by the first file's content."""
    if format is not None and (format in READERS) != (format in FORMS):
        return format in READERS
    return not Path(files[0]).is_dir() and kind_of_file(files[0]) is not None
