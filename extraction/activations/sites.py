"""Where in a decoder block an activation is read, found by structure and proven by numbers.

`residual` is the block's output. The other sites are found by probing: a short pass records every module of a block,
and the arithmetic of the residual stream tells them apart:

    residual_mid = residual_in + a * attention        residual_out = residual_mid + b * mlp

`attention` and `mlp` are what the blocks ADD to the stream (Gemma-2 normalises and Granite scales before adding: both
are minded); `residual_mid` is the stream in between. Blocks that run both side by side have no `residual_mid`.

Shapes: T tokens, D hidden, L layers, P points, K anything that is linear in the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extraction.core.errors import ActivationError, ModelError
from extraction.model.hooks import watch, watch_inputs

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

SITES = ("residual", "attention", "mlp", "residual_mid")


@dataclass(frozen=True)
class Tap:
    """One place to read: a module's output (or input), times a scale."""

    module: nn.Module
    reads_input: bool = False
    scale: float = 1.0


def taps_of(lm: LanguageModel, sites: tuple[str, ...], layers: tuple[int, ...]) -> tuple[Tap, ...]:
    """The taps of every site by layer, site first. Raises ModelError where a block has no such site."""
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise ModelError(f"site {unknown[0]!r} is unknown: use one of {', '.join(SITES)}")
    _check_layers(lm, layers)
    found = {layer: {"residual": Tap(lm.layers[layer])} for layer in layers}
    if set(sites) != {"residual"}:
        for layer, passes in _probe(lm, layers).items():
            found[layer].update(_found_by_numbers(passes))
    return tuple(_pick(found, site, layer) for site in sites for layer in layers)


@dataclass(frozen=True)
class Points:
    """The three POINTS of each layer, as `taps`, layer by layer.

    Where attention and MLP run side by side no module sees the stream in between: there the middle tap is what
    attention adds.
    """

    taps: tuple[Tap, ...]
    side_by_side: tuple[bool, ...]

    def summed(self, found_TLPK: Tensor) -> Tensor:
        """Whatever is linear in the taps, as it is at the points."""
        found_TLPK = found_TLPK.clone()
        for i, parallel in enumerate(self.side_by_side):
            if parallel:
                found_TLPK[:, i, 1] += found_TLPK[:, i, 0]
        return found_TLPK


def points_of(lm: LanguageModel, layers: tuple[int, ...]) -> Points:
    """The points of these layers. Raises ModelError where a block is not a residual one."""
    _check_layers(lm, layers)
    middles = {layer: _middle(layer, passes) for layer, passes in _probe(lm, layers).items()}
    taps = (
        tap
        for layer in layers
        for tap in (Tap(lm.layers[layer], reads_input=True), middles[layer][0], Tap(lm.layers[layer]))
    )
    return Points(tuple(taps), tuple(middles[layer][1] for layer in layers))


def _middle(layer: int, passes: list[_Pass]) -> tuple[Tap, bool]:
    """The stream after attention; or, True, what attention adds to it where no module is given that stream."""
    sites = _found_by_numbers(passes)
    if "residual_mid" in sites:
        return sites["residual_mid"], False
    if "attention" in sites:
        return sites["attention"], True
    *inner, block = passes
    assert block.given_TD is not None
    for reader in inner:  # blocks that scale their sum (Gemma-4): only the first half of the arithmetic holds
        if reader.given_TD is not None and _adder(inner, reader.given_TD - block.given_TD, reader.given_TD) is not None:
            return Tap(reader.module, reads_input=True), False
    raise ModelError(
        f"layer {layer}: what attention adds to the residual stream can't be told from the rest of the block; "
        "this architecture can't be read token by token"
    )


@contextmanager
def watch_taps(taps: tuple[Tap, ...], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `observe(index of the tap, hidden [B, T, D], or [B * T, D])` whenever a tap is passed."""

    def scaled(point: int, hidden_BTD: Tensor) -> None:
        observe(point, hidden_BTD if taps[point].scale == 1.0 else hidden_BTD * taps[point].scale)

    outputs = {i: tap.module for i, tap in enumerate(taps) if not tap.reads_input}
    inputs = {i: tap.module for i, tap in enumerate(taps) if tap.reads_input}
    with watch(outputs, scaled), watch_inputs(inputs, scaled):
        yield


def _check_layers(lm: LanguageModel, layers: tuple[int, ...]) -> None:
    beyond = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if beyond:
        raise ModelError(f"layer {beyond[0]} is out of range: the model has layers 0 to {lm.n_layers - 1}")


def _pick(found: dict[int, dict[str, Tap]], site: str, layer: int) -> Tap:
    if site not in found[layer]:
        raise ModelError(
            f"layer {layer} has no site {site!r} (its attention and MLP may run side by side); "
            f"use one of {', '.join(found[layer])}"
        )
    return found[layer][site]


@dataclass(frozen=True)
class _Pass:
    """What one module inside a block was given and gave, [T, D] each, in float32 (None: another shape)."""

    name: str
    module: nn.Module
    given_TD: Tensor | None
    gave_TD: Tensor | None


def _probe(lm: LanguageModel, layers: tuple[int, ...]) -> dict[int, list[_Pass]]:
    """Run a few tokens through the model; note every module inside the blocks as it completes, the block last."""
    names = {
        (layer, name): module
        for layer in layers
        for name, module in lm.layers[layer].named_modules(remove_duplicate=True)
    }
    given: dict[Any, Any] = {}
    gave: dict[Any, Any] = {}

    def note(notes: dict[Any, Any]) -> Callable[[Any, Any], None]:
        # a copy: some models add to a module's output in place afterwards
        return lambda key, value: notes.__setitem__(key, value.clone() if isinstance(value, Tensor) else None)

    ids_BT = torch.arange(1, 7, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    with torch.inference_mode(), watch(names, note(gave)), watch_inputs(names, note(given)):
        lm.last_logits(ids_BT, use_cache=False)
    shape = (ids_BT.shape[1], lm.hidden_size)
    passes: dict[int, list[_Pass]] = {layer: [] for layer in layers}
    for (layer, name), output in gave.items():
        tensors = (_as_TD(given[layer, name], shape, lm.device), _as_TD(output, shape, lm.device))
        passes[layer].append(_Pass(name, names[layer, name], *tensors))
    for layer in layers:
        _refuse_non_finite(lm, layer, passes[layer][-1])
    return passes


def _refuse_non_finite(lm: LanguageModel, layer: int, block: _Pass) -> None:
    """Where numbers are not numbers, they say nothing of a block's structure."""
    for value_TD, words in ((block.given_TD, "what goes into"), (block.gave_TD, "what comes out of")):
        if value_TD is not None and not value_TD.isfinite().all():
            raise ActivationError(
                f"{words} layer {layer} is NaN or infinite in {str(lm.dtype).removeprefix('torch.')}, whatever the "
                "text: load the model with --dtype bfloat16 or float32"
            )


def _as_TD(value: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """[T, D] of a batch of one, also where a module works on flattened tokens.

    On one device: what is given to the first block of the next device still is on the one before.
    """
    if value is None or value.shape[-1] != shape[1] or value.numel() != shape[0] * shape[1]:
        return None
    return value.reshape(shape).to(device, torch.float32)


def _found_by_numbers(passes: list[_Pass]) -> dict[str, Tap]:
    """Sites of one block: the stream between attention and MLP, and what each of them adds."""
    *inner, block = passes
    assert block.given_TD is not None
    assert block.gave_TD is not None
    for reader in inner:
        if reader.given_TD is None:
            continue
        attention = _adder(inner, reader.given_TD - block.given_TD, reader.given_TD)
        mlp = _adder(inner, block.gave_TD - reader.given_TD, block.gave_TD)
        if attention is not None and mlp is not None:
            return {"attention": attention, "mlp": mlp, "residual_mid": Tap(reader.module, reads_input=True)}
    return _side_by_side(inner, block.gave_TD - block.given_TD, block.gave_TD)


def _adder(inner: list[_Pass], added_TD: Tensor, stream_TD: Tensor) -> Tap | None:
    """The last module whose output, scaled, is what was added to the stream."""
    if not _differs(added_TD, 0 * added_TD, stream_TD):
        return None
    for candidate in reversed(inner):
        if candidate.gave_TD is None or not candidate.gave_TD.any():
            continue
        scale = float((added_TD * candidate.gave_TD).sum() / candidate.gave_TD.square().sum())
        scale = 1.0 if abs(scale - 1) < 1e-2 else scale
        if not _differs(added_TD, scale * candidate.gave_TD, stream_TD):
            return Tap(candidate.module, scale=scale)
    return None


def _side_by_side(inner: list[_Pass], added_TD: Tensor, stream_TD: Tensor) -> dict[str, Tap]:
    """Parallel blocks: one module with attention in its name, and one without, whose outputs sum to what was added."""
    known = [candidate for candidate in reversed(inner) if candidate.gave_TD is not None]
    for attention in (candidate for candidate in known if "att" in candidate.name):
        for mlp in (candidate for candidate in known if "att" not in candidate.name):
            if not _differs(added_TD, attention.gave_TD + mlp.gave_TD, stream_TD):  # type: ignore[operator]
                return {"attention": Tap(attention.module), "mlp": Tap(mlp.module)}
    return {}


def _differs(left_TD: Tensor, right_TD: Tensor, stream_TD: Tensor) -> bool:
    """Beyond the rounding of the stream, token by token (half precision rounds at 2**-8)."""
    error_T = (left_TD - right_TD).norm(dim=-1) / stream_TD.norm(dim=-1)
    return not bool((error_T < 4e-3).all())
