"""Lazy tensors: activations [n, L, D] that stay on the disk and are read some layers at a time.

Every file's sha256 is checked once; a file that changes afterwards is refused. Shapes: n rows, m of them picked,
L layers, k of them, D hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.storage.atomic import REMAKE, reporting_store_errors, store_error, verify_checksum

if TYPE_CHECKING:
    from torch import Tensor

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class TensorFile:
    """One file: the ids of its rows, and its inode, size and mtime when its sha256 was checked."""

    path: Path
    ids: tuple[str, ...]
    stamp: Stamp

    def read(self, name: str, layers: slice) -> Tensor:
        """Read some layers of all rows of a tensor: [n, k, D]."""
        from safetensors import safe_open

        with reporting_store_errors(self.path, "read"):
            if _stamp(os.stat(self.path)) != self.stamp:
                raise store_error(self.path, "was changed while it was in use", REMAKE)
            with safe_open(self.path, framework="pt") as file:
                read_nkD: Tensor = file.get_slice(name)[:, layers]
        return read_nkD


@dataclass(frozen=True)
class LazyTensor:
    """One tensor whose rows lie in several files, in order. `shape` is [n, L, D]; `dtype` is torch's name."""

    name: str
    files: tuple[TensorFile, ...]
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The example id of every row."""
        return tuple(example_id for file in self.files for example_id in file.ids)

    def pick(self, ids: Sequence[str], columns: Sequence[int]) -> LazyRows:
        """Return the rows of these examples at these layer indices, both in the given order."""
        return LazyRows(self, tuple(ids), tuple(columns))


@dataclass(frozen=True)
class LazyRows:
    """Some rows [m, L, D] of a lazy tensor."""

    tensor: LazyTensor
    ids: tuple[str, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[m, L, D]."""
        return len(self.ids), len(self.columns), self.tensor.shape[2]

    def read_layers(self, layers: slice) -> Tensor:
        """Read some layers: [m, k, D], in the stored dtype. Needs memory for the result and one file's layers."""
        import torch

        columns = self.columns[layers]
        first, last = min(columns), max(columns)
        offsets = [column - first for column in columns]
        result = torch.empty((len(self.ids), len(columns), self.shape[2]), dtype=getattr(torch, self.tensor.dtype))
        for file, (sources, places) in zip(self.tensor.files, self._copies_by_file, strict=True):
            if sources:
                result[places] = file.read(self.tensor.name, slice(first, last + 1))[sources][:, offsets]
        return result

    @cached_property
    def _copies_by_file(self) -> list[tuple[list[int], list[int]]]:
        """(rows of the file, rows of the result) for every file. Raises KeyError for an id that no file has."""
        place_of = {example_id: place for place, example_id in enumerate(self.ids)}
        copies = [
            [(row, place_of.pop(example_id)) for row, example_id in enumerate(file.ids) if example_id in place_of]
            for file in self.tensor.files
        ]
        if place_of:
            raise KeyError(next(iter(place_of)))
        return [([row for row, _ in copy], [place for _, place in copy]) for copy in copies]


def open_checked(path: Path) -> TensorFile:
    """Open a file of activations after a check of its sha256. Raises StoreError if that is wrong."""
    from safetensors import safe_open

    stamp = _stamp(verify_checksum(path))
    with reporting_store_errors(path, "read"), safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
    return TensorFile(path, tuple(json.loads(metadata["ids"])), stamp)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns
