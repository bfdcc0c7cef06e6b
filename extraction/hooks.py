"""Read and change activations: the only caller of `register_forward_hook`.

A block's output is a plain tensor in transformers 5 and a tuple in older code; here it is always a tensor [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class Enough(Exception):
    """Raised by an observer that has seen all it wants: ends the forward pass early (`watch` lets it through)."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a module's output, whether bare or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watch(modules: Mapping[Hashable, nn.Module], observe: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Call `observe(key, output)` after each module runs, while the block lasts. Outputs must not be changed."""

    def hook_for(key: Hashable) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            observe(key, hidden_of(output))

        return hook

    with _attached({key: (module, hook_for(key)) for key, module in modules.items()}):
        yield


@contextmanager
def steer(modules: Mapping[Hashable, nn.Module], change: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Replace each module's output by `change(key, output)`, a new tensor, while the block lasts."""

    def hook_for(key: Hashable) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            changed = change(key, hidden_of(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with _attached({key: (module, hook_for(key)) for key, module in modules.items()}):
        yield


@contextmanager
def _attached(hooks: Mapping[Hashable, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        handles.extend(module.register_forward_hook(hook) for module, hook in hooks.values())
        yield
    finally:
        for handle in handles:
            handle.remove()
