"""Rows [n, L, D] of which some layers are worked on at a time, since a layer's direction depends on that layer only.

Of a layer with many rows, some rows are worked on at a time, too, where a step makes a copy in float64. What comes of
several pieces may differ in the last bits from what comes of one.

n rows, b of them, L layers, k of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**28
PIECE_BYTES = 2**28
ROW_BYTES = 2**24  # of pieces for what a row gives by itself: small enough for the allocator to use them again
FEATURES = 64  # at a time, or a multiple


class ChunkedRows(Protocol):
    """Rows that need not be in memory (`extraction.storage.lazy_tensors.LazyRows`), or are (`Held`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""

    def at(self, layers: slice) -> Tensor:
        """Some layers of all rows: [n, k, D]."""


@dataclass(frozen=True)
class RowsInMemory:
    """Rows that are in memory."""

    rows_nLD: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""
        n, n_layers, hidden_size = self.rows_nLD.shape
        return n, n_layers, hidden_size

    def at(self, layers: slice) -> Tensor:
        """Some layers of all rows: [n, k, D]."""
        return self.rows_nLD[:, layers]


@dataclass(frozen=True)
class Block:
    """Layers `start` to `stop` of `n_layers`, as places among them; so small that their rows are held at once."""

    start: int
    stop: int
    n_layers: int

    @property
    def layers(self) -> slice:
        """To index layers by."""
        return slice(self.start, self.stop)


def blocks_of(shape: tuple[int, int, int]) -> Iterator[Block]:
    """All layers, as many at a time as fit into BLOCK_BYTES of float32, one at least."""
    n, n_layers, hidden_size = shape
    step = max(1, BLOCK_BYTES // max(1, 4 * n * hidden_size))
    return (Block(start, min(start + step, n_layers), n_layers) for start in range(0, n_layers, step))


def rows_a_piece(shape: Sequence[int], n_bytes: int | None = None) -> int:
    """How many rows of [n, L, D] are worked on at a time: as many as fit into `n_bytes` of float64, one at least.

    PIECE_BYTES of them, unless given.
    """
    _, n_layers, hidden_size = shape
    return max(1, (n_bytes or PIECE_BYTES) // max(1, 8 * n_layers * hidden_size))


def row_pieces(rows_nLD: Tensor, n_bytes: int | None = None) -> tuple[Tensor, ...]:
    """Views of the rows, some at a time: [b, L, D]."""
    pieces: tuple[Tensor, ...] = rows_nLD.split(rows_a_piece(rows_nLD.shape, n_bytes))
    return pieces


def mean_row(rows_nLD: Tensor) -> Tensor:
    """The mean of the rows, float64 [L, D]; some features at a time, since torch copies what it adds up in float64."""
    n, n_layers, _ = rows_nLD.shape
    width = max(FEATURES, PIECE_BYTES // max(1, 8 * n * n_layers) // FEATURES * FEATURES)
    return torch.cat([part_nLd.mean(0, dtype=torch.float64) for part_nLd in rows_nLD.split(width, -1)], -1)


def row_norms(rows_nLD: Tensor) -> Tensor:
    """Each row's norm at each layer, float64 [n, L].

    Written into one tensor: small ones, kept, would each lie in the room that a piece leaves to the next.
    """
    norms_nL = rows_nLD.new_empty(rows_nLD.shape[:2], dtype=torch.float64)
    pieces = row_pieces(rows_nLD, ROW_BYTES)
    for piece_bLD, norms_bL in zip(pieces, norms_nL.split(len(pieces[0]) or 1), strict=True):
        norms_bL.copy_(piece_bLD.norm(dim=-1, dtype=torch.float64))
    return norms_nL


def typical_norms(rows: ChunkedRows) -> Tensor:
    """Each layer's mean norm over all rows: float32 [L]."""
    return torch.cat([rows.at(block.layers).float().norm(dim=-1) for block in blocks_of(rows.shape)], -1).mean(0)
