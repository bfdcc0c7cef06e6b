"""A double of CUDA graphs for the CPU: records the kernels of a step as they are called, and replays them.

As under CUDA's capture, an operation that reads a value back to the host, or whose output's size depends on values,
raises RuntimeError while it records. On replay no Python of the model runs and every tensor keeps its address, so a
number that a step took from the host is as stale as it would be on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
}


Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]  # function, arguments, keyword arguments, result


class Kernels(TorchDispatchMode):
    """Records calls in order, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in _indices(name, args))
        if name in HOST_READS or by_mask:
            raise RuntimeError(f"operation not permitted while recording: {name}")
        for given, declared in zip(args, func._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self.before += [(tensor, tensor.clone()) for tensor in _tensors(given)]
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def undo(self) -> None:
        """Restore what was written, so that recording has no effect."""
        for tensor, was in reversed(self.before):
            tensor.copy_(was)


def _indices(name: str, args: tuple[Any, ...]) -> list[Any]:
    return list(args[1]) if name in ("index", "index_put_", "_index_put_impl_") else []


class Recorder:
    """Records steps and counts recordings and replays."""

    def __init__(self) -> None:
        self.n_recorded = self.n_replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with patch("torch.cuda.is_current_stream_capturing", return_value=True), Kernels() as kernels:
            work()
        kernels.undo()
        self.n_recorded += 1
        return lambda: self._replay(kernels.calls)

    def _replay(self, calls: list[Call]) -> None:
        self.n_replayed += 1
        for func, args, kwargs, kept in calls:
            found = func(*args, **kwargs)
            for old, new in zip(_tensors(kept), _tensors(found), strict=True):
                if old.data_ptr() != new.data_ptr() and old.numel():
                    old.copy_(new)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [part for part in found if isinstance(part, Tensor)] if isinstance(found, tuple | list) else []
