"""Several devices on one processor: tensors that compute here, and say that they are somewhere else.

A device is a label: of the kind `meta`, which torch takes to have no storage. Every operation runs on the processor and
refuses, as a GPU would, tensors of two devices, but for a number and for indices and copies that may come from the
processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
ACROSS = {"aten._to_copy.default", "aten.copy_.default", "aten._copy_from.default", "aten.to.device"}
INDEXING = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default"}


class TwoDevices(AssertionError):
    """An operation met tensors of different devices."""


class Labelled(Tensor):
    """A tensor with a device of its own choosing, over one of the processor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Labelled:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Labelled({self.device}, {self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the processor, with the device that it must have."""
    leaves = list(_leaves((args, *kwargs.values())))
    flat = [value for value in leaves if isinstance(value, Tensor)]
    asked = [value for value in leaves if isinstance(value, torch.device)]
    place = asked[0] if asked else _common(func, flat)
    result = func(*_mapped(_inside, args), **{name: _mapped(_inside, value) for name, value in kwargs.items()})
    known = {id(value.inner): value for value in flat if isinstance(value, Labelled)}

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Labelled):
            return value
        if id(value) in known:
            return known[id(value)] if known[id(value)].device == place else _labelled(value.clone(), place)
        return _labelled(value, place)

    return _mapped(outside, result)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_mapped(change, each) for each in value)
    return change(value)


def _labelled(value: Tensor, place: torch.device) -> Tensor:
    return value if place == CPU else Labelled(value, place)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU
    return value.inner if isinstance(value, Labelled) else value


def _common(func: Any, flat: list[Tensor]) -> torch.device:
    """The device of all operands but numbers (a tensor of dimension 0 on the processor)."""
    if str(func) in ACROSS:
        return flat[0].device
    places = [value.device for value in flat if value.dim() or value.device != CPU]
    if str(func) in INDEXING:
        places = places[:1] + [place for place in places[1:] if place != CPU]
    if len(set(places)) > 1:
        raise TwoDevices(f"{func}: {', '.join(map(str, places))}")
    return places[0] if places else CPU


class _Factories(TorchDispatchMode):
    """`torch.zeros(device=...)` and the like have no operand that would bring them here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor([...], device=...)` makes nothing where the device has no storage."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        device = given.pop("device", None) if func is torch.tensor else None
        made = func(*args, **given)
        return made if device is None else made.to(device)


@contextmanager
def labelled_devices() -> Iterator[None]:
    """Everything within may name any device, such as `meta:1`."""
    with _Factories(), _Literals():
        yield


def place(module: nn.Module, device: str) -> None:
    """Move a module's weights and buffers, all below it included."""
    for inner in module.modules():
        for name, weight in list(inner._parameters.items()):
            if weight is not None:
                moved = Labelled(_inside(weight.data), torch.device(device))
                inner._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in list(inner._buffers.items()):
            if buffer is not None:
                inner._buffers[name] = Labelled(_inside(buffer), torch.device(device))
