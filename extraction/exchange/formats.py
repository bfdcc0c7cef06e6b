"""Table of the vector formats, recognition of a file's format, and one function that reads any of them.

To add a format, write its reader and writer in a module of its own and give it a row in FORMATS; where a file of it is
not recognised yet, add its first bytes to `find_recogniser`. Then add a row to the table in docs/exchange.md. The
commands, the error messages and the tests of round trips read FORMATS.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extraction.core.errors import VectorError
from extraction.core.text import show_path, suggest
from extraction.core.text_files import open_input
from extraction.exchange.array_files import read_numpy, read_traitline, write_numpy, write_traitline
from extraction.exchange.gguf_files import read_gguf, write_gguf, write_repeng
from extraction.exchange.layer_rows import LayerRows, Reader, VectorMetadata, Writer
from extraction.exchange.torch_files import (
    read_assistant_axis,
    read_persona_vectors,
    read_steering_vectors,
    recognise_pickle,
    write_assistant_axis,
    write_persona_vectors,
    write_steering_vectors,
)
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.vectors.direction import Direction

MAX_VECTOR_BYTES = 2_000_000_000


@dataclass(frozen=True)
class VectorFormat:
    """A row of FORMATS.

    `file_name`: the default name of an exported file. `needs_model`: the writer takes the model's type or number of
    layers, which are read from its config.
    """

    write: Writer
    read: Reader
    file_name: str
    needs_model: bool = False


FORMATS: dict[str, VectorFormat] = {
    "gguf": VectorFormat(write_gguf, read_gguf, "{trait}_{method}.gguf"),
    "repeng": VectorFormat(write_repeng, read_gguf, "{trait}_{method}_repeng.gguf", needs_model=True),
    "persona_vectors": VectorFormat(
        write_persona_vectors, read_persona_vectors, "{trait}_response_avg_diff.pt", needs_model=True
    ),
    "assistant_axis": VectorFormat(
        write_assistant_axis, read_assistant_axis, "{trait}_{method}_axis.pt", needs_model=True
    ),
    "steering_vectors": VectorFormat(write_steering_vectors, read_steering_vectors, "{trait}_{method}_steering.pt"),
    "numpy": VectorFormat(write_numpy, read_numpy, "{trait}_{method}.npz"),
    "traitline": VectorFormat(write_traitline, read_traitline, "{trait}_{method}" + TraitRun.DATA_FOLDERS["vectors"]),
}


@dataclass(frozen=True)
class LoadedVector:
    """A direction from a file, the format it was read as, the model's metadata, and notes for the user."""

    direction: Direction
    format: str
    metadata: VectorMetadata
    notes: tuple[str, ...]


def load_direction(
    path: str | os.PathLike[str], *, format: str | None = None, base: int | None = None, model: str | None = None
) -> Direction:
    """Read the direction in a file of any format in FORMATS, without the notes of `read_direction`."""
    return read_direction(path, format=format, base=base, model=model).direction


def read_direction(
    path: str | os.PathLike[str], *, format: str | None = None, base: int | None = None, model: str | None = None
) -> LoadedVector:
    """Read vectors of any format in FORMATS, with notes for the user.

    Args:
        format: a name in FORMATS; None: recognised by the file's content.
        base: the number that the file gives to decoder block 0, where it differs from the format's own: 1 for the GGUF
            files of llama.cpp's generator, whose numbers are one too high.
        model: the name of the model, which becomes the direction's label.

    Raises:
        VectorError: the file is damaged, or of no known format.
    """
    from extraction.vectors.direction import Direction

    checked, name = Path(path), format or recognise(path)
    _check_input(checked)
    rows = find_format(name, "--format").read(checked)
    shift = rows.base if base is None else base
    labels = {**rows.labels, "model": model or rows.labels.get("model")}
    direction = Direction.from_layers(_renumber(rows, shift, show_path(path)), **labels)
    base_notes = rows.base_notes if base is None else (f"number {base} of the file is decoder block 0",)
    return LoadedVector(direction, name, rows.metadata, (*base_notes, *rows.notes))


def recognise(path: str | os.PathLike[str]) -> str:
    """Return the name of a file's format, by its content. Raises VectorError where it is of none."""
    recogniser = find_recogniser(path)
    if recogniser is None:
        raise VectorError(f"{show_path(path)}: not a known format of vectors; give --format {'|'.join(FORMATS)}")
    return recogniser(Path(path))


def find_recogniser(path: str | os.PathLike[str]) -> Callable[[Path], str] | None:
    """Return the function that names a vector file's format, chosen by its first bytes; None for any other file."""
    with open_input(path, MAX_VECTOR_BYTES, VectorError) as file:
        start = file.read(16)
    size = os.stat(path).st_size
    if start.startswith(b"GGUF"):
        return lambda _: "gguf"
    if start.startswith(b"PK"):
        return _recognise_zip
    if start[:1] == b"\x80":  # a pickle from before PyTorch 1.6
        return recognise_pickle
    if start[8:9] == b"{" and 8 < int.from_bytes(start[:8], "little") < size:
        return lambda _: "traitline"
    return None


def _recognise_zip(path: Path) -> str:
    names = _archive_names(path)
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    return recognise_pickle(path)


def _archive_names(path: Path) -> list[str]:
    """List the files in a zip archive. Raises VectorError where it is damaged, or too large when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            names = archive.namelist()
    except Exception as failure:  # zipfile raises NotImplementedError and others too
        raise VectorError(f"{show_path(path)}: a damaged archive; fetch or make it again") from failure
    if size > MAX_VECTOR_BYTES:
        raise VectorError(f"{show_path(path)}: {size} bytes when unpacked; at most {MAX_VECTOR_BYTES} are read")
    return names


def _check_input(path: Path) -> None:
    with open_input(path, MAX_VECTOR_BYTES, VectorError) as file:
        if file.read(2) == b"PK":
            _archive_names(path)


def find_format(name: str, option: str) -> VectorFormat:
    """Look up a format. Raises VectorError with the option and the nearest known name."""
    if name not in FORMATS:
        raise VectorError(f"{option} {name!r}: no format of vectors; {suggest(name, FORMATS)}")
    return FORMATS[name]


def _renumber(rows: LayerRows, base: int, source: str) -> dict[int, Tensor]:
    """Return the vectors by layer, counted from 0."""
    negative = [number for number in rows.vectors if number < base]
    if negative:
        raise VectorError(f"{source}: holds number {min(negative)}, but with --base {base} block 0 is number {base}")
    return {number - base: vector for number, vector in rows.vectors.items()}
