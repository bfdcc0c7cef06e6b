"""Read and change activations through forward hooks, as context managers.

The only module that calls `register_forward_hook`. A block's output is a plain tensor in transformers 5 and a tuple in
older code; observers always get a tensor [B, T, D] (B rows, T tokens, D hidden).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class StopForward(Exception):
    """Raised by an observer to end the forward pass early; `watch` lets it through to the caller."""


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output: the tensor itself, or the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a module's first argument, positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def watch(modules: Mapping[Any, nn.Module], observe: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Call `observe(key, output)` after each module runs, while the block lasts. `observe` must not change outputs."""

    def hook(key: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        observe(key, hidden_of(output))

    with _attached(modules, hook):
        yield


@contextmanager
def watch_inputs(modules: Mapping[Any, nn.Module], observe: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `observe(key, first input)` after each module runs, while the block lasts."""

    def hook(key: Any, args: Any, kwargs: Any, _output: Any) -> None:
        observe(key, input_of(args, kwargs))

    with _attached(modules, hook):
        yield


@contextmanager
def steer(modules: Mapping[Any, nn.Module], change: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Replace each module's output by `change(key, output)`, a new tensor, while the block lasts."""

    def hook(key: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        changed = change(key, hidden_of(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with _attached(modules, hook):
        yield


@contextmanager
def _attached(modules: Mapping[Any, nn.Module], hook: Callable[[Any, Any, Any, Any], Any]) -> Iterator[None]:
    handles: list[Any] = []

    def keyed(key: Any) -> Callable[..., Any]:
        return lambda _module, args, kwargs, output: hook(key, args, kwargs, output)

    try:
        for key, module in modules.items():
            handles.append(module.register_forward_hook(keyed(key), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
