"""Which formats there are, how a file is recognised, and the one function that reads any of them."""

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

WRITERS: dict[str, Writer] = {
    "gguf": write_gguf,
    "repeng": write_repeng,
    "persona_vectors": write_persona_vectors,
    "assistant_axis": write_assistant_axis,
    "steering_vectors": write_steering_vectors,
    "numpy": write_numpy,
    "traitline": write_traitline,
}
READERS: dict[str, Reader] = {
    "gguf": read_gguf,
    "repeng": read_gguf,
    "persona_vectors": read_persona_vectors,
    "assistant_axis": read_assistant_axis,
    "steering_vectors": read_steering_vectors,
    "numpy": read_numpy,
    "traitline": read_traitline,
}
OUTPUTS = {  # what a file is called where no name is given
    "gguf": "{trait}_{method}.gguf",
    "repeng": "{trait}_{method}_repeng.gguf",
    "persona_vectors": "{trait}_response_avg_diff.pt",
    "assistant_axis": "{trait}_{method}_axis.pt",
    "steering_vectors": "{trait}_{method}_steering.pt",
    "numpy": "{trait}_{method}.npz",
    "traitline": "{trait}_{method}" + TraitRun.DATA_FOLDERS["vectors"],
}
# what a writer asks about the model, which takes reading its config
ASKS_MODEL = {"repeng", "persona_vectors", "assistant_axis"}


@dataclass(frozen=True)
class LoadedVector:
    """A direction that was read from a file, how, and what a user should know of it."""

    direction: Direction
    format: str
    facts: VectorMetadata
    notes: tuple[str, ...]


def load_direction(
    path: str | os.PathLike[str], *, format: str | None = None, base: int | None = None, model: str | None = None
) -> Direction:
    """The direction in a file of any format that READERS has; see `read_direction` for what is to be said of it."""
    return read_direction(path, format=format, base=base, model=model).direction


def read_direction(
    path: str | os.PathLike[str], *, format: str | None = None, base: int | None = None, model: str | None = None
) -> LoadedVector:
    """Read vectors of any format that READERS has. Raises VectorError.

    `format` None: by the file's content. `base` is the number that the file gives to decoder block 0, where it is
    another than the format's own: 1 for the GGUF files of llama.cpp's generator, which are one late.
    """
    from extraction.vectors.direction import Direction

    checked, name = Path(path), format or recognise(path)
    _check_input(checked)
    rows = _reader(name)(checked)
    shift = rows.base if base is None else base
    labels = {**rows.labels, "model": model or rows.labels.get("model")}
    direction = Direction.from_layers(_shifted(rows, shift, show_path(path)), **labels)
    told = rows.doubt if base is None else (f"number {base} of the file is decoder block 0",)
    return LoadedVector(direction, name, rows.facts, (*told, *rows.notes))


def recognise(path: str | os.PathLike[str]) -> str:
    """A file's format, by its content."""
    found = kind_of_file(path)
    if found is None:
        raise VectorError(f"{show_path(path)}: no file of vectors that is known; give --format {'|'.join(READERS)}")
    return found(Path(path))


def kind_of_file(path: str | os.PathLike[str]) -> Callable[[Path], str] | None:
    """What tells the format of a file of vectors; None for any other file."""
    with open_input(path, MAX_VECTOR_BYTES, VectorError) as file:
        start = file.read(16)
    size = os.stat(path).st_size
    if start.startswith(b"GGUF"):
        return lambda _: "gguf"
    if start.startswith(b"PK"):
        return _recognise_archive
    if start[:1] == b"\x80":  # a pickle of before PyTorch 1.6
        return recognise_pickle
    if start[8:9] == b"{" and 8 < int.from_bytes(start[:8], "little") < size:
        return lambda _: "traitline"
    return None


def _recognise_archive(path: Path) -> str:
    names = _archive_names(path)
    if any(name.endswith(".npy") for name in names):
        return "numpy"
    return recognise_pickle(path)


def _archive_names(path: Path) -> list[str]:
    """What is in a zip archive; VectorError where it is damaged, or would fill the memory when unpacked."""
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


def _reader(name: str) -> Reader:
    if name not in READERS:
        raise VectorError(f"--format {name!r}: no format of vectors; {suggest(name, READERS)}")
    return READERS[name]


def _shifted(rows: LayerRows, base: int, source: str) -> dict[int, Tensor]:
    """The vectors by our layer numbers."""
    early = [number for number in rows.vectors if number < base]
    if early:
        raise VectorError(f"{source}: holds number {min(early)}, but --base says that block 0 is number {base}")
    return {number - base: vector for number, vector in rows.vectors.items()}
