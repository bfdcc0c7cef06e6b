"""Rows [n, L, D] of which some layers are worked on at a time, since a layer's direction depends on that layer only.

n rows, L layers, k of them, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**28


class Layered(Protocol):
    """Rows that need not be in memory (`extraction.slices.Picked`), or are (`Held`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[n, L, D]."""

    def at(self, layers: slice) -> Tensor:
        """Some layers of all rows: [n, k, D]."""


@dataclass(frozen=True)
class Held:
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


def typical_norms(rows: Layered) -> Tensor:
    """Each layer's mean norm over all rows: float32 [L]."""
    return torch.cat([rows.at(block.layers).float().norm(dim=-1) for block in blocks_of(rows.shape)], -1).mean(0)
