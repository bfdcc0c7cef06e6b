"""Internals of one layer: projections, MLP activations, residual stream and routing, found by their numbers.

A short pass (the probe) records the input and output of every module of the block, and attention's queries, keys and
values (`extraction.model.attention_weights`). Modules are identified by these numbers, not by their names:

- v: the projection whose output is attention's v;
- q and k: equal attention's at position 0, where a rotary embedding is the identity, and have vectors of the same
  length at all other positions (before or after a normalisation, if there is one);
- mlp_down: the projection whose output the MLP adds to the stream;
- mlp_up and mlp_gate: the projections for which act(gate) * up, or act(up), is the input of mlp_down.

Shapes: B rows, T tokens, D hidden, X width of a tapped tensor, H heads, G key heads, N heads of either kind, C head
dimension, F MLP width, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from extraction.activations.experts import GATE_UP_SPLITS, GateUpSplit, find_mixture_of_experts, stacked_experts
from extraction.activations.sites import Tap, stream_points, taps_of
from extraction.core.errors import ModelError
from extraction.core.records import STREAM
from extraction.model.attention_weights import REMEDY, AttentionReading, watch_attention
from extraction.model.hooks import watch, watch_inputs

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

PROBE_TOKENS = 11  # a prime, so that it can't be mistaken for a number of heads
MLP_REMEDY = "capture its residual stream only (capture_tier2.py)"
# activations that some blocks call as functions; those that are modules are tried as such
ACTIVATION_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    functional.gelu,
    partial(functional.gelu, approximate="tanh"),
    functional.relu,
)


def identity(x_BTX: Tensor) -> Tensor:
    """Return a tapped tensor unchanged."""
    return x_BTX


@dataclass(frozen=True)
class Part:
    """One tensor of a layer: its tap, and a pure function `read` of the tapped tensor: [B, T, X] -> [B, T, ...].

    Some modules work on flattened tokens: reshape the tapped tensor to [B, T, -1] first. If `added` is given (parallel
    blocks), the tensor tapped there is added before `read`.
    """

    name: str
    tap: Tap
    read: Callable[[Tensor], Tensor] = identity
    added: Tap | None = None


def parts_of(lm: LanguageModel, layer: int, *, attention: bool = True) -> tuple[Part, ...]:
    """Find all parts of one layer.

    These are q, k, v (with `attention`), mlp_up, mlp_gate (if there is a gate), mlp_activation, mlp_down, residual_in,
    residual_mid, residual_out; in a mixture of experts also experts and expert_weights. Raises ModelError with the
    layer and the part if one can't be found.
    """
    stream = stream_of(lm, layer)
    probe = _probe(lm, layer, attention=attention)
    heads = _projections(probe) if attention else ()
    mlp, experts = _mlp(probe, _mlp_output_module(lm, layer))
    return (*heads, *mlp, *stream, *experts)


def stream_of(lm: LanguageModel, layer: int) -> tuple[Part, Part, Part]:
    """Return the parts residual_in, residual_mid and residual_out.

    `residual_mid` is the stream after attention was added, before the MLP is; in parallel blocks, the sum of
    residual_in and what attention adds. Raises ModelError for a block that does not add to a stream.
    """
    points = stream_points(lm, (layer,))
    before, middle, after = points.taps
    mid = Part(STREAM[1], before, added=middle) if points.is_parallel[0] else Part(STREAM[1], middle)
    return Part(STREAM[0], before), mid, Part(STREAM[2], after)


# --- the probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """Input and output of one module of the block in the probe (None: not a floating-point tensor)."""

    module: nn.Module
    input: Tensor | None
    output: Tensor | None

    @property
    def input_TX(self) -> Tensor | None:
        """Input by token."""
        return _token_rows(self.input)

    @property
    def output_TX(self) -> Tensor | None:
        """Output by token."""
        return _token_rows(self.output)

    @property
    def has_matrix(self) -> bool:
        """True if the module has a weight matrix (a projection, or a module with one): no norm, no activation."""
        return any(tensor.dim() > 1 for tensor in (*self.module.parameters(), *self.module.buffers()))


@dataclass(frozen=True)
class _Probe:
    """Calls of one layer's modules in the order in which they ended, the block last, and its attention."""

    layer_name: str
    calls: tuple[_Call, ...]
    attended: AttentionReading | None
    tolerance: float

    def error(self, left: Tensor | None, right: Tensor | None) -> float:
        """Return the relative error of left to right; infinite if above the tolerance or for other shapes."""
        if left is None or right is None or left.shape != right.shape:
            return math.inf
        left, right = left.cpu().double(), right.cpu().double()
        error = float((left - right).norm() / right.norm())
        return error if error <= self.tolerance else math.inf

    def equal(self, left: Tensor | None, right: Tensor | None) -> bool:
        """Return True if two tensors are equal up to rounding."""
        return self.error(left, right) < math.inf

    def not_found(self, part: str, remedy: str) -> ModelError:
        """Return the error for a part that can't be found."""
        return ModelError(f"{self.layer_name}: {part} can't be found: {remedy}")


Error = Callable[[_Probe, Tensor, Tensor], float]
T = TypeVar("T")


def _probe(lm: LanguageModel, layer: int, *, attention: bool) -> _Probe:
    modules = dict(lm.layers[layer].named_modules(remove_duplicate=True))
    inputs: dict[str, list[Any]] = {name: [] for name in modules}
    calls: list[_Call] = []
    readings: list[AttentionReading] = []

    def note_output(name: str, value: Any) -> None:
        calls.append(_Call(modules[name], inputs[name].pop(), _copy(value)))

    def note_attention(_layer: int, a: AttentionReading) -> None:
        readings.append(AttentionReading(*(x.clone() for x in (a.q_BTHC, a.k_BTGC, a.v_BTGC, a.weights_BHTS))))

    ids_BT = torch.arange(1, PROBE_TOKENS + 1, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    # hooks of a module run in the order of registration: inputs first
    input_hooks = watch_inputs(modules, lambda name, value: inputs[name].append(_copy(value)))
    attention_hooks = _observing_attention(lm, layer, note_attention, enabled=attention)
    with torch.inference_mode(), attention_hooks, input_hooks, watch(modules, note_output):
        lm.hidden_states(ids_BT)
    layer_name = f"layer {layer} of {type(lm.model).__name__}"
    return _Probe(layer_name, tuple(calls), readings[0] if readings else None, 1e-4 if lm.is_exact else 2e-2)


@contextmanager
def _observing_attention(
    lm: LanguageModel, layer: int, observe: Callable[[int, AttentionReading], None], *, enabled: bool
) -> Iterator[None]:
    if not enabled:
        yield
        return
    with watch_attention(lm, (layer,), observe):
        yield


def _copy(value: Any) -> Tensor | None:
    """Copy a floating-point tensor: some models add to a module's output in place afterwards."""
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def _token_rows(value: Tensor | None) -> Tensor | None:
    """Reshape the probe's tensor to [T, X], from [1, T, ...], flattened tokens or [1, N, T, C]; else None."""
    if value is None or PROBE_TOKENS not in value.shape[:3]:
        return None
    at = list(value.shape).index(PROBE_TOKENS)
    if math.prod(value.shape[:at]) == 1:
        return value.reshape(PROBE_TOKENS, -1)
    return value.transpose(1, 2).reshape(PROBE_TOKENS, -1) if at == 2 and value.dim() == 4 else None


# --- q, k, v ----------------------------------------------------------------------------------------------------------

QKV = ("q", "k", "v")


def _stacked_heads(sections: tuple[int, ...], at: int, n_heads: int, x_X: Tensor) -> Tensor:
    """Split a fused projection into sections and return one by heads: [.., X] -> [.., N, C]."""
    section_X: Tensor = x_X.split(sections, dim=-1)[at]
    return section_X.reshape(*section_X.shape[:-1], n_heads, -1)


def _grouped_heads(n_groups: int, n_queries: int, at: int, x_X: Tensor) -> Tensor:
    """Return q, k or v of a fused projection ordered by key head (queries, key, value): [.., X] -> [.., N, C]."""
    groups = x_X.reshape(*x_X.shape[:-1], n_groups, n_queries + 2, -1)
    parts: tuple[Tensor, ...] = (groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :])
    return parts[at]


def _layouts(shapes: Mapping[str, torch.Size], name: str) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """Yield (width, reader) of each way to hold one of q, k, v: alone, qkv fused, kv fused, fused by key head."""
    for held in (name,), QKV, ("k", "v"):
        if name in held:
            sections = tuple(shapes[part].numel() for part in held)
            yield sum(sections), partial(_stacked_heads, sections, held.index(name), shapes[name][0])
    n_heads, n_groups = shapes["q"][0], shapes["k"][0]
    if len({shape[1] for shape in shapes.values()}) == 1 and n_heads % n_groups == 0:
        width = sum(shape.numel() for shape in shapes.values())
        yield width, partial(_grouped_heads, n_groups, n_heads // n_groups, QKV.index(name))


def _projections(probe: _Probe) -> tuple[Part, ...]:
    assert probe.attended is not None
    a = probe.attended
    attended = {"q": a.q_BTHC[0], "k": a.k_BTGC[0], "v": a.v_BTGC[0]}
    shapes = {name: attended_TNC.shape[1:] for name, attended_TNC in attended.items()}
    return tuple(_projection(probe, shapes, name, attended[name]) for name in QKV)


def _projection(probe: _Probe, shapes: Mapping[str, torch.Size], name: str, attended_TNC: Tensor) -> Part:
    """Return the part for attention's q, k or v: the projection of the block that makes it."""
    error = _Probe.error if name == "v" else _rotary_error
    candidates = [
        (
            min(
                error(probe, projected_TNC, attended_TNC),
                _error_through_norm(probe, error, projected_TNC, attended_TNC),
            ),
            call,
            read,
        )
        for call in probe.calls
        for width, read in _layouts(shapes, name)
        if call.has_matrix and call.output_TX is not None and call.output_TX.shape[-1] == width
        for projected_TNC in (read(call.output_TX),)
    ]
    part = _least_error((distance, Part(name, Tap(call.module), read)) for distance, call, read in candidates)
    if part is None:
        raise probe.not_found(name, f"no projection of the block gives it; {REMEDY}")
    return part


def _least_error(candidates: Iterable[tuple[float, T]]) -> T | None:
    """Return the candidate with the least finite error, the first of equals; None if there is none.

    Taking the least matters: a LoRA adapter may change a projection by as little as rounding.
    """
    error, nearest = min(candidates, key=itemgetter(0), default=(math.inf, None))
    return nearest if error < math.inf else None


def _error_through_norm(probe: _Probe, error: Error, projected_TNC: Tensor, attended_TNC: Tensor) -> float:
    """Return the error if a norm lies between projection and attention, before or after the rotary embedding."""
    norms = [(call.input_TX, call.output_TX) for call in probe.calls if not call.has_matrix]
    errors = (
        max(
            error(probe, projected_TNC, before.view_as(projected_TNC)),
            error(probe, after.view_as(projected_TNC), attended_TNC),
        )
        for before, after in norms
        if before is not None and after is not None and before.numel() == after.numel() == projected_TNC.numel()
    )
    return min(errors, default=math.inf)


def _rotary_error(probe: _Probe, projected_TNC: Tensor, attended_TNC: Tensor) -> float:
    """Return the error of q or k up to a rotary embedding and a scale.

    At position 0 the embedding is the identity; at the others it keeps the length of each head's vector. If only some
    channels are rotated and those are scaled, position 0 alone decides, with a scale per channel.
    """
    first_NC, target_NC = projected_TNC[0].cpu().double(), attended_TNC[0].cpu().double()
    scale = (first_NC * target_NC).sum() / first_NC.square().sum()
    error = probe.error(first_NC * scale, target_NC)
    if error < math.inf:
        lengths_TN, target_TN = projected_TNC.cpu().double().norm(dim=-1), attended_TNC.cpu().double().norm(dim=-1)
        return max(error, probe.error(lengths_TN * scale.abs(), target_TN))
    scale_C = (first_NC * target_NC).sum(0) / first_NC.square().sum(0)
    return probe.error(first_NC * scale_C, target_NC) if len(first_NC) > 1 else math.inf


# --- the MLP ----------------------------------------------------------------------------------------------------------


def _mlp_output_module(lm: LanguageModel, layer: int) -> nn.Module | None:
    """Return the module whose output the MLP adds; None for blocks that normalise or scale the whole sum."""
    try:
        return taps_of(lm, ("mlp",), (layer,))[0].module
    except ModelError:
        return None


def _mlp(probe: _Probe, adder: nn.Module | None) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return the parts of the MLP whose last module is `adder`, and those of a mixture of experts only."""
    added = (call.output_TX for call in reversed(probe.calls) if call.module is adder)
    down = _find_down_by_input(probe) if adder is None else _find_down_by_output(probe, next(added, None))
    if down is None:
        raise probe.not_found("mlp_down", f"no projection of its MLP fits; {MLP_REMEDY}")
    experts = stacked_experts(down.module)
    return _dense(probe, down) if experts is None else _mixture(probe, down.module, experts)


def _find_down_by_input(probe: _Probe) -> _Call | None:
    """Return the first call with weights whose input is an activation of other projections of the block."""
    with torch.inference_mode():
        return next(
            (call for call in probe.calls if call.has_matrix and _find_up_and_gate(probe, call) is not None), None
        )


def _find_down_by_output(probe: _Probe, added_TD: Tensor | None) -> _Call | None:
    """Return the call with weights whose output is `added_TD`, directly or through norms; None if there is none."""
    errors = [(probe.error(call.output_TX, added_TD), call) for call in probe.calls]
    down = _least_error((error, call) for error, call in errors if call.has_matrix and call.input_TX is not None)
    norms = (
        (error, call) for error, call in errors if not call.has_matrix and not probe.equal(call.input_TX, added_TD)
    )
    norm = _least_error(norms) if down is None else None
    return down if norm is None else _find_down_by_output(probe, norm.input_TX)


def _dense(probe: _Probe, down: _Call) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    remedy = f"no projection of its MLP fits; {MLP_REMEDY}"
    with torch.inference_mode():
        if not _is_repeatable(probe, down):
            raise probe.not_found("mlp_activation", remedy)
        up_and_gate = _find_up_and_gate(probe, down)
    if up_and_gate is None:
        raise probe.not_found("mlp_up", remedy)
    activation = Part("mlp_activation", Tap(down.module, reads_input=True))
    return (*up_and_gate, activation, Part("mlp_down", Tap(down.module))), ()


def _split_half(halves: GateUpSplit, at: int, x_X: Tensor) -> Tensor:
    """Return gate (0) or up (1) of a fused projection: [.., 2F] -> [.., F]."""
    return halves(x_X)[at]


def _find_up_and_gate(probe: _Probe, down: _Call) -> tuple[Part, ...] | None:
    """Return the parts mlp_up and (if there is a gate) mlp_gate that make the down projection's input; else None."""
    into_TF = down.input_TX
    if into_TF is None:
        return None
    width = into_TF.shape[-1]
    norms = [call.input_TX for call in probe.calls if not call.has_matrix and probe.equal(call.output_TX, into_TF)]
    targets = [into_TF, *(target for target in norms if target is not None)]  # a norm may precede mlp_down
    candidates = list(_projection_candidates(probe, down, width))
    acts: list[Callable[[Tensor], Tensor]] = [*_activation_modules(probe, width), *ACTIVATION_FUNCTIONS]
    matches = (_least_error(_activation_errors(probe, candidates, acts, target)) for target in targets)
    return next((parts for parts in matches if parts is not None), None)


def _activation_errors(
    probe: _Probe,
    candidates: Sequence[tuple[Part, Tensor]],
    acts: Sequence[Callable[[Tensor], Tensor]],
    target_TF: Tensor,
) -> Iterator[tuple[float, tuple[Part, ...]]]:
    """Yield (error to the target, parts) for act(up), and act(gate) * up, of every activation and projection."""
    for act in acts:
        acted = [(part, x_TF, act(x_TF.clone())) for part, x_TF in candidates]  # a clone: some work in place
        for part, _, acted_TF in acted:
            yield probe.error(acted_TF, target_TF), (replace(part, name="mlp_up"),)
        for (gate, _, acted_TF), (up, up_TF, _) in permutations(acted, 2):
            error = probe.error(acted_TF * up_TF, target_TF)
            yield error, (replace(up, name="mlp_up"), replace(gate, name="mlp_gate"))


def _projection_candidates(probe: _Probe, down: _Call, width: int) -> Iterator[tuple[Part, Tensor]]:
    """Yield the F wide outputs of projections before mlp_down, and the halves of those that are 2F wide."""
    reads: dict[int, list[Callable[[Tensor], Tensor]]] = {
        width: [identity],
        2 * width: [partial(_split_half, halves, 1) for halves in GATE_UP_SPLITS.values()],
    }
    for call in probe.calls[: probe.calls.index(down)]:
        if call.has_matrix and call.output_TX is not None:
            for read in reads.get(call.output_TX.shape[-1], []):
                yield Part("", Tap(call.module), read), read(call.output_TX)


def _activation_modules(probe: _Probe, width: int) -> list[nn.Module]:
    """Return the modules without weights that change an F wide tensor."""
    modules = [
        call.module
        for call in probe.calls
        if not call.has_matrix and call.input is not None and call.input.shape[-1] == width
        if not probe.equal(call.input_TX, call.output_TX) and _is_repeatable(probe, call)
    ]
    return list(dict.fromkeys(modules))


def _is_repeatable(probe: _Probe, call: _Call) -> bool:
    """Return True if a module called with its first argument alone gives the same output again."""
    try:
        again = call.module(None if call.input is None else call.input.clone())
    except Exception:  # a module that needs more arguments may raise anything
        return False
    return isinstance(again, Tensor) and probe.equal(again, call.output)


def _mixture(probe: _Probe, mlp: nn.Module, experts: nn.Module) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return a mixture's parts, all but mlp_down recomputed from the experts' input, and its routing."""
    n_experts = max(parameter.shape[0] for parameter in experts.parameters(recurse=False))
    routers = [
        call.module for call in probe.calls if call.output_TX is not None and call.output_TX.shape[-1] == n_experts
    ]
    tensors = ((call.input_TX, call.output_TX) for call in probe.calls if call.module is experts)
    input_TD, output_TD = next(tensors, (None, None))
    mixture = None
    if input_TD is not None and output_TD is not None:
        with torch.inference_mode():
            mixture = find_mixture_of_experts(routers, experts, input_TD, output_TD, probe.tolerance)
    if mixture is None:
        raise probe.not_found("mlp_up", f"its mixture of experts is not a weighted sum of gated MLPs; {MLP_REMEDY}")
    tap = Tap(experts, reads_input=True)
    reads = {"mlp_up": mixture.up, "mlp_gate": mixture.gate, "mlp_activation": mixture.activation}
    parts = [Part(name, tap, read) for name, read in reads.items() if name != "mlp_gate" or mixture.halves is not None]
    routing = (Part("experts", tap, mixture.experts), Part("expert_weights", tap, mixture.weights))
    return (*parts, Part("mlp_down", Tap(mlp))), routing
