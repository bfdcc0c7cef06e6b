"""Rows [n, L, D] that are read a block of layers at a time, and chunks of rows for steps that copy into float64.

A layer's direction depends on that layer alone, so memory has to hold one block of layers. Results from several chunks
of rows may differ in the last bits from those of one chunk.

Shapes: n rows, b rows of a chunk, L layers, k layers of a block, D hidden, d features of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**28
CHUNK_BYTES = 2**28
NORM_CHUNK_BYTES = 2**24  # small enough that the allocator reuses the memory of one chunk for the next
FEATURE_MULTIPLE = 64


class ChunkedRows(Protocol):
    """Rows that need not be in memory (`extraction.storage.lazy_tensors.LazyRows`), or are (`RowsInMemory`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""

    def read_layers(self, layers: slice) -> Tensor:
        """Return some layers of all rows: [n, k, D]."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows that are a tensor already."""

    rows_nLD: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""
        n, n_layers, hidden_size = self.rows_nLD.shape
        return n, n_layers, hidden_size

    def read_layers(self, layers: slice) -> Tensor:
        """Return a view of some layers of all rows: [n, k, D]."""
        return self.rows_nLD[:, layers]


@dataclass(frozen=True)
class LayerBlock:
    """Layers `start` to `stop` (exclusive) of `n_layers`, as indices into the layers that were captured."""

    start: int
    stop: int
    n_layers: int

    @property
    def layers(self) -> slice:
        """Slice that selects the block's layers."""
        return slice(self.start, self.stop)


def layer_blocks(shape: tuple[int, int, int]) -> Iterator[LayerBlock]:
    """Divide the layers of rows [n, L, D] into blocks of at most BLOCK_BYTES in float32, one layer at least."""
    n, n_layers, hidden_size = shape
    step = max(1, BLOCK_BYTES // max(1, 4 * n * hidden_size))
    return (LayerBlock(start, min(start + step, n_layers), n_layers) for start in range(0, n_layers, step))


def rows_per_chunk(shape: Sequence[int], n_bytes: int | None = None) -> int:
    """Return how many rows of [n, L, D] fit into `n_bytes` (default CHUNK_BYTES) of float64, one at least."""
    _, n_layers, hidden_size = shape
    return max(1, (n_bytes or CHUNK_BYTES) // max(1, 8 * n_layers * hidden_size))


def row_chunks(rows_nLD: Tensor, n_bytes: int | None = None) -> tuple[Tensor, ...]:
    """Split rows into views [b, L, D] of at most `n_bytes` (default CHUNK_BYTES) in float64."""
    chunks: tuple[Tensor, ...] = rows_nLD.split(rows_per_chunk(rows_nLD.shape, n_bytes))
    return chunks


def mean_over_rows(rows_nLD: Tensor) -> Tensor:
    """Average rows in float64: [n, L, D] -> [L, D]; in chunks of features, since torch copies them to float64."""
    n, n_layers, _ = rows_nLD.shape
    width = max(FEATURE_MULTIPLE, CHUNK_BYTES // max(1, 8 * n * n_layers) // FEATURE_MULTIPLE * FEATURE_MULTIPLE)
    return torch.cat([chunk_nLd.mean(0, dtype=torch.float64) for chunk_nLd in rows_nLD.split(width, -1)], -1)


def row_norms(rows_nLD: Tensor) -> Tensor:
    """Compute the norm of each row at each layer: float64 [n, L].

    The result is written into one tensor: small results, kept, would fragment the memory that chunks reuse.
    """
    norms_nL = rows_nLD.new_empty(rows_nLD.shape[:2], dtype=torch.float64)
    chunks = row_chunks(rows_nLD, NORM_CHUNK_BYTES)
    for chunk_bLD, norms_bL in zip(chunks, norms_nL.split(len(chunks[0]) or 1), strict=True):
        norms_bL.copy_(chunk_bLD.norm(dim=-1, dtype=torch.float64))
    return norms_nL


def typical_norms(rows: ChunkedRows) -> Tensor:
    """Compute the mean norm of all rows at each layer: float32 [L]."""
    norms = [rows.read_layers(block.layers).float().norm(dim=-1) for block in layer_blocks(rows.shape)]
    return torch.cat(norms, -1).mean(0)
