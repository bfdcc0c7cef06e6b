"""Where in a decoder block an activation is read, found by structure and proven by numbers.

`residual` is the block's output. The other sites are found by probing: a short pass records every module of a block, and
the arithmetic of the residual stream tells them apart:

    residual_mid = residual_in + a * attention        residual_out = residual_mid + b * mlp

`attention` and `mlp` are what the blocks ADD to the stream (Gemma-2 normalises and Granite scales before adding: both
are minded); `residual_mid` is the stream in between. Blocks that run both side by side have no `residual_mid`.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from extraction.errors import ModelError
from extraction.hooks import watch

if TYPE_CHECKING:
    from extraction.models import LanguageModel

SITES = ("residual", "attention", "mlp", "residual_mid")


@dataclass(frozen=True)
class Tap:
    """One place to read: a module's output (or input), times a scale."""

    module: nn.Module
    reads_input: bool = False
    scale: float = 1.0


def taps_of(lm: LanguageModel, sites: tuple[str, ...], layers: tuple[int, ...]) -> tuple[Tap, ...]:
    """The taps of every site by layer, site first. Raises ModelError where a block has no such site."""
    return tuple(_tap(lm, site, layer) for site in sites for layer in layers)


@contextmanager
def watch_taps(taps: tuple[Tap, ...], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `observe(index of the tap, hidden [B, T, D])` whenever a tap is passed."""

    def scaled(point: int, hidden_BTD: Tensor) -> None:
        observe(point, hidden_BTD if taps[point].scale == 1.0 else hidden_BTD * taps[point].scale)

    outputs = {i: tap.module for i, tap in enumerate(taps) if not tap.reads_input}
    with watch(outputs, scaled):
        yield


def _tap(lm: LanguageModel, site: str, layer: int) -> Tap:
    if site == "residual":
        return Tap(lm.layers[layer])
    raise ModelError(f"site {site!r} is unknown: use one of {', '.join(SITES)}")
