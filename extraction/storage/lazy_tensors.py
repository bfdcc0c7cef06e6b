"""A stored tensor [n, L, D] that stays on the disk: its files are checked once, then some layers are read at a time.

A file that has changed since then is refused. Shapes: n rows, m of them picked, L layers, k of them, D hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.storage.atomic import REMAKE, checked_payload, reporting_store_errors, store_error

if TYPE_CHECKING:
    from torch import Tensor

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class FilePart:
    """One file: the ids of its rows, and the stamp that it had when its sha256 was found to be right."""

    path: Path
    ids: tuple[str, ...]
    stamp: Stamp

    def read(self, name: str, layers: slice) -> Tensor:
        """Some layers of all rows of a tensor: [n, k, D], in memory only as long as it is used."""
        from safetensors import safe_open

        with reporting_store_errors(self.path, "read"):
            if _stamp(os.stat(self.path)) != self.stamp:
                raise store_error(self.path, "was changed while it was in use", REMAKE)
            with safe_open(self.path, framework="pt") as file:
                read_nkD: Tensor = file.get_slice(name)[:, layers]
        return read_nkD


@dataclass(frozen=True)
class StoredTensors:
    """One tensor of several files, row after row. `shape` is [n, L, D]; `dtype` as torch names it."""

    name: str
    parts: tuple[FilePart, ...]
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The example of every row."""
        return tuple(example_id for part in self.parts for example_id in part.ids)

    def pick(self, ids: Sequence[str], columns: Sequence[int]) -> PickedRows:
        """The rows of these examples at these places among the layers, both in the order asked for."""
        return PickedRows(self, tuple(ids), tuple(columns))


@dataclass(frozen=True)
class PickedRows:
    """Some rows [m, L, D] of a stored tensor, to be read some layers at a time."""

    stored: StoredTensors
    ids: tuple[str, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[m, L, D]."""
        return len(self.ids), len(self.columns), self.stored.shape[2]

    def read_layers(self, layers: slice) -> Tensor:
        """[m, k, D], in the dtype that is stored; takes the room of the result and of one file."""
        import torch

        columns = self.columns[layers]
        first, last = min(columns), max(columns)
        offsets = [column - first for column in columns]
        result = torch.empty((len(self.ids), len(columns), self.shape[2]), dtype=getattr(torch, self.stored.dtype))
        for part, (sources, places) in zip(self.stored.parts, self._moves, strict=True):
            if sources:
                result[places] = part.read(self.stored.name, slice(first, last + 1))[sources][:, offsets]
        return result

    @cached_property
    def _moves(self) -> list[tuple[list[int], list[int]]]:
        """By file: which of its rows are wanted, and where they go. KeyError for an id that no file has."""
        place_of = {example_id: place for place, example_id in enumerate(self.ids)}
        moves = [
            [(row, place_of.pop(example_id)) for row, example_id in enumerate(part.ids) if example_id in place_of]
            for part in self.stored.parts
        ]
        if place_of:
            raise KeyError(next(iter(place_of)))
        return [([row for row, _ in move], [place for _, place in move]) for move in moves]


def checked_part(path: Path) -> FilePart:
    """A file whose bytes are those that were written. Raises StoreError where they aren't."""
    from safetensors import safe_open

    stamp = _stamp(checked_payload(path))
    with reporting_store_errors(path, "read"), safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
    return FilePart(path, tuple(json.loads(metadata["ids"])), stamp)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns
