"""Values between the formats and the rest: numbered vectors that a reader returns, metadata and bytes of a writer.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from extraction.core.errors import VectorError

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.vectors.direction import Direction


@dataclass(frozen=True)
class VectorMetadata:
    """Facts about the model that some formats store: its Hugging Face `model_type` and number of blocks, if known."""

    model_type: str | None = None
    n_layers: int | None = None


@dataclass(frozen=True)
class LayerRows:
    """A file's vectors [D] by the file's own numbers; `base` is the number that it gives to decoder block 0.

    `notes` are for the user; `base_notes` only where the user has not confirmed the base with `--base`.
    """

    vectors: Mapping[int, Tensor]
    base: int = 0
    labels: Mapping[str, str | None] = field(default_factory=dict)
    metadata: VectorMetadata = VectorMetadata()
    notes: tuple[str, ...] = ()
    base_notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrittenFile:
    """A file's bytes, with notes for the user."""

    data: bytes
    notes: tuple[str, ...] = ()


Reader = Callable[[Path], LayerRows]
Writer = Callable[["Direction", VectorMetadata], WrittenFile]


def dense_rows(direction: Direction, n_layers: int | None) -> tuple[Tensor, tuple[str, ...]]:
    """Return [n_layers, D], row k of decoder block k, zeros where the direction has no layer, with notes for the user.

    Raises VectorError where the number of layers is unknown, or less than the direction needs.
    """
    import torch

    from extraction.vectors.direction import format_layers

    if n_layers is None:
        raise VectorError("this format has a row for every layer, and the model is not known here: give --model NAME")
    if direction.layers[-1] >= n_layers:
        raise VectorError(f"layer {direction.layers[-1]}: the model has {n_layers} layers, counted from 0")
    rows_LD = torch.zeros(n_layers, direction.hidden_size)
    rows_LD[list(direction.layers)] = direction.direction_LD
    absent = [layer for layer in range(n_layers) if layer not in direction.layers]
    return rows_LD, (f"{format_layers(absent)}: no vector, so zeros in the file",) if absent else ()


def nonzero_rows(rows_LD: Tensor, path: Path) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """Return the rows [D] of a tensor [L, D] that are not zero, by number, with notes for the user."""
    if rows_LD.ndim != 2 or not rows_LD.is_floating_point():
        kind = f"{rows_LD.dtype} {list(rows_LD.shape)}".removeprefix("torch.")
        raise VectorError(f"{path}: a tensor of {kind}; floats [rows, hidden] are needed")
    zero = [i for i, row in enumerate(rows_LD) if not row.any()]
    notes = (f"rows of zeros were left out, since they hold no vector: {', '.join(map(str, zero))}",) if zero else ()
    return {i: row for i, row in enumerate(rows_LD) if i not in zero}, notes
