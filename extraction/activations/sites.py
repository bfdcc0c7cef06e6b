"""Sites: the places in a decoder block where activations are read.

`residual` is the block's output. The other sites are found by a probe: a short pass records the input and output of
every module of a block, and the arithmetic of the residual stream identifies them:

    residual_mid = residual_in + a * attention        residual_out = residual_mid + b * mlp

`attention` and `mlp` are what is ADDED to the stream, after any norm (Gemma-2) or scale (Granite) in between;
`residual_mid` is the stream between the two. Parallel blocks, which run both on the same input, have no `residual_mid`.

A tap is one place to hook: a module's output or input. Where a site can be read in a layer is a `Tap`.

Shapes: B rows, T tokens, D hidden, L layers, P the three stream points of a layer, K any quantity linear in the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extraction.core.errors import ActivationError, ModelError
from extraction.core.records import SITES
from extraction.model.hooks import watch, watch_inputs

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel


@dataclass(frozen=True)
class Tap:
    """One place to read: a module's output (or its first input), times a scale."""

    module: nn.Module
    reads_input: bool = False
    scale: float = 1.0


def taps_of(lm: LanguageModel, sites: tuple[str, ...], layers: tuple[int, ...]) -> tuple[Tap, ...]:
    """Return one tap per site and layer, all layers of the first site first. Raises ModelError for a missing site."""
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise ModelError(f"site {unknown[0]!r} is unknown: use one of {', '.join(SITES)}")
    _check_layers(lm, layers)
    taps = {layer: {"residual": Tap(lm.layers[layer])} for layer in layers}
    if set(sites) != {"residual"}:
        for layer, calls in _probe(lm, layers).items():
            taps[layer].update(_find_sites(calls))
    return tuple(_site_tap(taps, site, layer) for site in sites for layer in layers)


@dataclass(frozen=True)
class StreamPoints:
    """Taps of the residual stream before, between and after attention and MLP of each layer (core.records.POINTS).

    `is_parallel[i]`: no module of the i-th layer reads the stream in between, since attention and MLP run in parallel.
    Its middle tap is then what attention adds.
    """

    taps: tuple[Tap, ...]
    is_parallel: tuple[bool, ...]

    def from_taps(self, tapped_TLPK: Tensor) -> Tensor:
        """Convert values at the taps, if linear in the stream, to values at the points."""
        points_TLPK = tapped_TLPK.clone()
        for i, parallel in enumerate(self.is_parallel):
            if parallel:
                points_TLPK[:, i, 1] += points_TLPK[:, i, 0]
        return points_TLPK


def stream_points(lm: LanguageModel, layers: tuple[int, ...]) -> StreamPoints:
    """Return the stream points of these layers. Raises ModelError for a block that does not add to a stream."""
    _check_layers(lm, layers)
    middles = {layer: _middle_tap(layer, calls) for layer, calls in _probe(lm, layers).items()}
    taps = (
        tap
        for layer in layers
        for tap in (Tap(lm.layers[layer], reads_input=True), middles[layer][0], Tap(lm.layers[layer]))
    )
    return StreamPoints(tuple(taps), tuple(middles[layer][1] for layer in layers))


def _middle_tap(layer: int, calls: list[_ModuleCall]) -> tuple[Tap, bool]:
    """Return (tap of the stream after attention, False); for a parallel block (tap of what attention adds, True)."""
    sites = _find_sites(calls)
    if "residual_mid" in sites:
        return sites["residual_mid"], False
    if "attention" in sites:
        return sites["attention"], True
    *inner, block = calls
    assert block.input_TD is not None
    for reader in inner:  # blocks that scale the final sum (Gemma-4): only the first equation holds
        if (
            reader.input_TD is not None
            and _find_adder(inner, reader.input_TD - block.input_TD, reader.input_TD) is not None
        ):
            return Tap(reader.module, reads_input=True), False
    raise ModelError(
        f"layer {layer}: no module was found that adds attention to the residual stream; "
        "this architecture's stream points can't be captured"
    )


@contextmanager
def watch_taps(taps: tuple[Tap, ...], observe: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `observe(index of the tap, hidden [B, T, D] or [B * T, D])` whenever a tapped module has run."""

    def scaled(point: int, hidden_BTD: Tensor) -> None:
        observe(point, hidden_BTD if taps[point].scale == 1.0 else hidden_BTD * taps[point].scale)

    outputs = {i: tap.module for i, tap in enumerate(taps) if not tap.reads_input}
    inputs = {i: tap.module for i, tap in enumerate(taps) if tap.reads_input}
    with watch(outputs, scaled), watch_inputs(inputs, scaled):
        yield


def _check_layers(lm: LanguageModel, layers: tuple[int, ...]) -> None:
    out_of_range = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if out_of_range:
        raise ModelError(f"layer {out_of_range[0]} is out of range: the model has layers 0 to {lm.n_layers - 1}")


def _site_tap(taps: dict[int, dict[str, Tap]], site: str, layer: int) -> Tap:
    if site not in taps[layer]:
        raise ModelError(
            f"layer {layer} has no site {site!r} (a parallel block has no residual_mid); "
            f"use one of {', '.join(taps[layer])}"
        )
    return taps[layer][site]


@dataclass(frozen=True)
class _ModuleCall:
    """Input and output of one module of a block in the probe, [T, D] each, float32; None for any other shape."""

    name: str
    module: nn.Module
    input_TD: Tensor | None
    output_TD: Tensor | None


def _probe(lm: LanguageModel, layers: tuple[int, ...]) -> dict[int, list[_ModuleCall]]:
    """Run a few tokens through the model; return the module calls of each block as they end, the block itself last."""
    names = {
        (layer, name): module
        for layer in layers
        for name, module in lm.layers[layer].named_modules(remove_duplicate=True)
    }
    inputs: dict[Any, Any] = {}
    outputs: dict[Any, Any] = {}

    def store_in(values: dict[Any, Any]) -> Callable[[Any, Any], None]:
        # a copy: some models add to a module's output in place afterwards
        return lambda key, value: values.__setitem__(key, value.clone() if isinstance(value, Tensor) else None)

    ids_BT = torch.arange(1, 7, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    with torch.inference_mode(), watch(names, store_in(outputs)), watch_inputs(names, store_in(inputs)):
        lm.last_logits(ids_BT, use_cache=False)
    shape = (ids_BT.shape[1], lm.hidden_size)
    calls: dict[int, list[_ModuleCall]] = {layer: [] for layer in layers}
    for (layer, name), output in outputs.items():
        tensors = (_as_TD(inputs[layer, name], shape, lm.device), _as_TD(output, shape, lm.device))
        calls[layer].append(_ModuleCall(name, names[layer, name], *tensors))
    for layer in layers:
        _check_finite(lm, layer, calls[layer][-1])
    return calls


def _check_finite(lm: LanguageModel, layer: int, block: _ModuleCall) -> None:
    """Raise ActivationError if a block's input or output is NaN or infinite: the sites can't be identified then."""
    for value_TD, place in ((block.input_TD, "the input of"), (block.output_TD, "the output of")):
        if value_TD is not None and not value_TD.isfinite().all():
            raise ActivationError(
                f"{place} layer {layer} is NaN or infinite in {str(lm.dtype).removeprefix('torch.')} even for a short "
                "text: load the model with --dtype bfloat16 or float32"
            )


def _as_TD(value: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return a batch of one as [T, D] float32 on one device, also from flattened tokens; None for other shapes.

    Of a model over several devices, the input of the first block on a device is still on the device before.
    """
    if value is None or value.shape[-1] != shape[1] or value.numel() != shape[0] * shape[1]:
        return None
    return value.reshape(shape).to(device, torch.float32)


def _find_sites(calls: list[_ModuleCall]) -> dict[str, Tap]:
    """Return the taps of a block's sites by name, found by the two equations of the module's docstring."""
    *inner, block = calls
    assert block.input_TD is not None
    assert block.output_TD is not None
    for reader in inner:
        if reader.input_TD is None:
            continue
        attention = _find_adder(inner, reader.input_TD - block.input_TD, reader.input_TD)
        mlp = _find_adder(inner, block.output_TD - reader.input_TD, block.output_TD)
        if attention is not None and mlp is not None:
            return {"attention": attention, "mlp": mlp, "residual_mid": Tap(reader.module, reads_input=True)}
    return _find_parallel_sites(inner, block.output_TD - block.input_TD, block.output_TD)


def _find_adder(inner: list[_ModuleCall], added_TD: Tensor, stream_TD: Tensor) -> Tap | None:
    """Return the tap of the last module whose output, times a scale, equals `added_TD`; None if there is none."""
    if not _differ(added_TD, 0 * added_TD, stream_TD):
        return None
    for candidate in reversed(inner):
        if candidate.output_TD is None or not candidate.output_TD.any():
            continue
        scale = float((added_TD * candidate.output_TD).sum() / candidate.output_TD.square().sum())
        scale = 1.0 if abs(scale - 1) < 1e-2 else scale
        if not _differ(added_TD, scale * candidate.output_TD, stream_TD):
            return Tap(candidate.module, scale=scale)
    return None


def _find_parallel_sites(inner: list[_ModuleCall], added_TD: Tensor, stream_TD: Tensor) -> dict[str, Tap]:
    """Return the sites of a parallel block: two modules whose outputs sum to what is added.

    Their numbers do not tell attention from the MLP, so here the module's name must (`att` in it).
    """
    known = [candidate for candidate in reversed(inner) if candidate.output_TD is not None]
    for attention in (candidate for candidate in known if "att" in candidate.name):
        for mlp in (candidate for candidate in known if "att" not in candidate.name):
            if not _differ(added_TD, attention.output_TD + mlp.output_TD, stream_TD):  # type: ignore[operator]
                return {"attention": Tap(attention.module), "mlp": Tap(mlp.module)}
    return {}


def _differ(left_TD: Tensor, right_TD: Tensor, stream_TD: Tensor) -> bool:
    """Return True if two tensors differ by more than rounding, per token (half precision rounds at 2**-8)."""
    error_T = (left_TD - right_TD).norm(dim=-1) / stream_TD.norm(dim=-1)
    return not bool((error_T < 4e-3).all())
