"""The internals of one layer, found by structure and proven by numbers: what to tap, and how to read it.

A short pass records every module of the block, and what attention was given (`extraction.model.attention_weights`). A projection is
then known by its numbers, whatever its name: v is what attention was given as v; q and k are it at position 0, where a
rotary embedding turns nothing, and have its heads' lengths everywhere (through the normalisation, where there is one);
the down projection gives what the MLP adds; gate and up are those whose activation times the other goes into it.

Shapes: B rows, T tokens, D hidden, X the width of a tap, H heads, G key heads, N heads of either kind, C head
dimension, F MLP width, k experts a token.
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

from extraction.activations.experts import HALVES, Halves, find_mixture, stacked_experts
from extraction.activations.sites import Tap, points_of, taps_of
from extraction.core.errors import ModelError
from extraction.core.records import STREAM
from extraction.model.attention_weights import REMEDY, AttentionReading, watch_attention
from extraction.model.hooks import watch, watch_inputs

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

TOKENS = 11  # of the short pass; a prime, so that it is not taken for a number of heads
NO_MLP = "read its residual stream alone (capture_tier2.py)"
# activations that some blocks call as functions; where one is a module, it is tried as it is
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu,
    functional.gelu,
    partial(functional.gelu, approximate="tanh"),
    functional.relu,
)


def as_it_is(x_BTX: Tensor) -> Tensor:
    """A tap read without change."""
    return x_BTX


@dataclass(frozen=True)
class Part:
    """One piece of a layer: where it is tapped, and how it is read. `read` is pure: [B, T, X] -> [B, T, ...].

    A tap may give its tokens flattened: reshape it to [B, T, -1] first. Where `added` is given (attention and MLP side
    by side), what it taps is added to the tap's before it is read.
    """

    name: str
    tap: Tap
    read: Callable[[Tensor], Tensor] = as_it_is
    added: Tap | None = None


def parts_of(lm: LanguageModel, layer: int, *, attention: bool = True) -> tuple[Part, ...]:
    """Every part of one layer: q, k, v (with `attention`), mlp_up, mlp_gate (where there is one), mlp_activation,
    mlp_down, residual_in, residual_mid, residual_out; for a mixture of experts also experts, expert_weights.

    Raises ModelError naming the layer and the part where one can't be found.
    """
    stream = stream_of(lm, layer)
    probe = _probe(lm, layer, attention=attention)
    heads = _projections(probe) if attention else ()
    mlp, experts = _mlp(probe, _adder(lm, layer))
    return (*heads, *mlp, *stream, *experts)


def stream_of(lm: LanguageModel, layer: int) -> tuple[Part, Part, Part]:
    """residual_in, residual_mid and residual_out: the stream before, in between and after.

    `residual_mid` is the stream after attention was added; where attention and MLP run side by side, that sum itself.
    Raises ModelError where a block adds neither to a stream.
    """
    points = points_of(lm, (layer,))
    before, middle, after = points.taps
    mid = Part(STREAM[1], before, added=middle) if points.side_by_side[0] else Part(STREAM[1], middle)
    return Part(STREAM[0], before), mid, Part(STREAM[2], after)


# --- the short pass ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module inside the block: what it was given and gave, as they were (None: no tensor)."""

    module: nn.Module
    given: Tensor | None
    gave: Tensor | None

    @property
    def given_TX(self) -> Tensor | None:
        """Token by token."""
        return _by_token(self.given)

    @property
    def gave_TX(self) -> Tensor | None:
        """Token by token."""
        return _by_token(self.gave)

    @property
    def has_matrix(self) -> bool:
        """Whether it maps with weights: a projection, or something that holds one; no norm, no activation."""
        return any(tensor.dim() > 1 for tensor in (*self.module.parameters(), *self.module.buffers()))


@dataclass(frozen=True)
class _Probe:
    """What a short pass showed of one layer: every call, as it completed, the block last; and its attention."""

    where: str
    calls: tuple[_Call, ...]
    attended: AttentionReading | None
    tolerance: float

    def error(self, left: Tensor | None, right: Tensor | None) -> float:
        """How far the left is from the right, relative; infinite where that is beyond rounding."""
        if left is None or right is None or left.shape != right.shape:
            return math.inf
        left, right = left.cpu().double(), right.cpu().double()
        error = float((left - right).norm() / right.norm())
        return error if error <= self.tolerance else math.inf

    def same(self, left: Tensor | None, right: Tensor | None) -> bool:
        """Equal up to rounding."""
        return self.error(left, right) < math.inf

    def missing(self, part: str, remedy: str) -> ModelError:
        """What to say where a part can't be found."""
        return ModelError(f"{self.where}: {part} can't be found: {remedy}")


Error = Callable[[_Probe, Tensor, Tensor], float]
Found = TypeVar("Found")


def _probe(lm: LanguageModel, layer: int, *, attention: bool) -> _Probe:
    modules = dict(lm.layers[layer].named_modules(remove_duplicate=True))
    given: dict[str, list[Any]] = {name: [] for name in modules}
    calls: list[_Call] = []
    seen: list[AttentionReading] = []

    def note_output(name: str, value: Any) -> None:
        calls.append(_Call(modules[name], given[name].pop(), _copy(value)))

    def note_attention(_layer: int, a: AttentionReading) -> None:
        seen.append(AttentionReading(*(x.clone() for x in (a.q_BTHC, a.k_BTGC, a.v_BTGC, a.weights_BHTS))))

    ids_BT = torch.arange(1, TOKENS + 1, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    # hooks of a module run in the order of their coming: inputs first
    inputs = watch_inputs(modules, lambda name, value: given[name].append(_copy(value)))
    attending = _attention(lm, layer, note_attention, wanted=attention)
    with torch.inference_mode(), attending, inputs, watch(modules, note_output):
        lm.hidden_states(ids_BT)
    where = f"layer {layer} of {type(lm.model).__name__}"
    return _Probe(where, tuple(calls), seen[0] if seen else None, 1e-4 if lm.is_exact else 2e-2)


@contextmanager
def _attention(
    lm: LanguageModel, layer: int, observe: Callable[[int, AttentionReading], None], *, wanted: bool
) -> Iterator[None]:
    if not wanted:
        yield
        return
    with watch_attention(lm, (layer,), observe):
        yield


def _copy(value: Any) -> Tensor | None:
    """A copy: some models add to a module's output in place afterwards."""
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def _by_token(value: Tensor | None) -> Tensor | None:
    """[T, X], also where a module works on flattened tokens, on heads after tokens or on tokens after heads."""
    if value is None or TOKENS not in value.shape[:3]:
        return None
    at = list(value.shape).index(TOKENS)
    if math.prod(value.shape[:at]) == 1:
        return value.reshape(TOKENS, -1)
    return value.transpose(1, 2).reshape(TOKENS, -1) if at == 2 and value.dim() == 4 else None


# --- q, k, v ----------------------------------------------------------------------------------------------------------

HEADS = ("q", "k", "v")


def _stacked(sections: tuple[int, ...], at: int, n_heads: int, x_X: Tensor) -> Tensor:
    """One section of a projection that holds several, one after the other: [.., X] -> [.., N, C]."""
    section_X: Tensor = x_X.split(sections, dim=-1)[at]
    return section_X.reshape(*section_X.shape[:-1], n_heads, -1)


def _by_group(n_groups: int, n_queries: int, at: int, x_X: Tensor) -> Tensor:
    """A projection that holds each key head with its queries before and its value after: [.., X] -> [.., N, C]."""
    groups = x_X.reshape(*x_X.shape[:-1], n_groups, n_queries + 2, -1)
    parts: tuple[Tensor, ...] = (groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :])
    return parts[at]


def _layouts(shapes: Mapping[str, torch.Size], name: str) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """(width of a projection, how to read one of q, k, v from it): alone, all three, keys with values, by group."""
    for held in (name,), HEADS, ("k", "v"):
        if name in held:
            sections = tuple(shapes[part].numel() for part in held)
            yield sum(sections), partial(_stacked, sections, held.index(name), shapes[name][0])
    n_heads, n_groups = shapes["q"][0], shapes["k"][0]
    if len({shape[1] for shape in shapes.values()}) == 1 and n_heads % n_groups == 0:
        width = sum(shape.numel() for shape in shapes.values())
        yield width, partial(_by_group, n_groups, n_heads // n_groups, HEADS.index(name))


def _projections(probe: _Probe) -> tuple[Part, ...]:
    assert probe.attended is not None
    a = probe.attended
    given = {"q": a.q_BTHC[0], "k": a.k_BTGC[0], "v": a.v_BTGC[0]}
    shapes = {name: given_TNC.shape[1:] for name, given_TNC in given.items()}
    return tuple(_projection(probe, shapes, name, given[name]) for name in HEADS)


def _projection(probe: _Probe, shapes: Mapping[str, torch.Size], name: str, given_TNC: Tensor) -> Part:
    """The projection of the block from which attention's q, k or v comes."""
    error = _Probe.error if name == "v" else _turned
    found = [
        (min(error(probe, made_TNC, given_TNC), _through_norm(probe, error, made_TNC, given_TNC)), call, read)
        for call in probe.calls
        for width, read in _layouts(shapes, name)
        if call.has_matrix and call.gave_TX is not None and call.gave_TX.shape[-1] == width
        for made_TNC in (read(call.gave_TX),)
    ]
    part = _nearest((far, Part(name, Tap(call.module), read)) for far, call, read in found)
    if part is None:
        raise probe.missing(name, f"its attention makes it in a way of its own; {REMEDY}")
    return part


def _nearest(found: Iterable[tuple[float, Found]]) -> Found | None:
    """What has the least error, the first of equals: an adapter may change a projection by as little as rounding."""
    far, nearest = min(found, key=itemgetter(0), default=(math.inf, None))
    return nearest if far < math.inf else None


def _through_norm(probe: _Probe, error: Error, made_TNC: Tensor, given_TNC: Tensor) -> float:
    """The error where a normalisation stands in between, before a rotary embedding or after it."""
    norms = [(call.given_TX, call.gave_TX) for call in probe.calls if not call.has_matrix]
    errors = (
        max(error(probe, made_TNC, before.view_as(made_TNC)), error(probe, after.view_as(made_TNC), given_TNC))
        for before, after in norms
        if before is not None and after is not None and before.numel() == after.numel() == made_TNC.numel()
    )
    return min(errors, default=math.inf)


def _turned(probe: _Probe, made_TNC: Tensor, given_TNC: Tensor) -> float:
    """The error at position 0, where nothing is turned, up to a scale; and of the heads' lengths at all others.

    Where only some channels are turned and those are scaled, position 0 alone decides, by channel.
    """
    first_NC, goal_NC = made_TNC[0].cpu().double(), given_TNC[0].cpu().double()
    scale = (first_NC * goal_NC).sum() / first_NC.square().sum()
    error = probe.error(first_NC * scale, goal_NC)
    if error < math.inf:
        lengths_TN, goal_TN = made_TNC.cpu().double().norm(dim=-1), given_TNC.cpu().double().norm(dim=-1)
        return max(error, probe.error(lengths_TN * scale.abs(), goal_TN))
    scale_C = (first_NC * goal_NC).sum(0) / first_NC.square().sum(0)
    return probe.error(first_NC * scale_C, goal_NC) if len(first_NC) > 1 else math.inf


# --- the MLP ----------------------------------------------------------------------------------------------------------


def _adder(lm: LanguageModel, layer: int) -> nn.Module | None:
    """The module that gives what the MLP adds; None where blocks normalise or scale the whole sum."""
    try:
        return taps_of(lm, ("mlp",), (layer,))[0].module
    except ModelError:
        return None


def _mlp(probe: _Probe, adder: nn.Module | None) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of the MLP whose last module is `adder`, and those that only a mixture has."""
    added = (call.gave_TX for call in reversed(probe.calls) if call.module is adder)
    down = _fed(probe) if adder is None else _down(probe, next(added, None))
    if down is None:
        raise probe.missing("mlp_down", f"its MLP works in a way of its own; {NO_MLP}")
    experts = stacked_experts(down.module)
    return _dense(probe, down) if experts is None else _mixture(probe, down.module, experts)


def _fed(probe: _Probe) -> _Call | None:
    """The first call with weights into which an activation goes that other projections of the block make."""
    with torch.inference_mode():
        return next((call for call in probe.calls if call.has_matrix and _up_and_gate(probe, call) is not None), None)


def _down(probe: _Probe, added_TD: Tensor | None) -> _Call | None:
    """The call with weights that gives what is added, or what a norm turns into it."""
    givers = [(probe.error(call.gave_TX, added_TD), call) for call in probe.calls]
    found = _nearest((far, call) for far, call in givers if call.has_matrix and call.given_TX is not None)
    norms = ((far, call) for far, call in givers if not call.has_matrix and not probe.same(call.given_TX, added_TD))
    norm = _nearest(norms) if found is None else None
    return found if norm is None else _down(probe, norm.given_TX)


def _dense(probe: _Probe, down: _Call) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    remedy = f"its MLP works in a way of its own; {NO_MLP}"
    with torch.inference_mode():
        if not _is_repeatable(probe, down):
            raise probe.missing("mlp_activation", remedy)
        found = _up_and_gate(probe, down)
    if found is None:
        raise probe.missing("mlp_up", remedy)
    return (*found, Part("mlp_activation", Tap(down.module, reads_input=True)), Part("mlp_down", Tap(down.module))), ()


def _half(halves: Halves, at: int, x_X: Tensor) -> Tensor:
    """One of two projections in one: [.., 2F] -> [.., F]."""
    return halves(x_X)[at]


def _up_and_gate(probe: _Probe, down: _Call) -> tuple[Part, ...] | None:
    """The projections whose activation, or activation of one times the other, goes into the down projection."""
    into_TF = down.given_TX
    if into_TF is None:
        return None
    width = into_TF.shape[-1]
    norms = [call.given_TX for call in probe.calls if not call.has_matrix and probe.same(call.gave_TX, into_TF)]
    goals = [into_TF, *(goal for goal in norms if goal is not None)]  # a norm may stand before the down projection
    made = list(_made(probe, down, width))
    acts: list[Callable[[Tensor], Tensor]] = [*_activations(probe, width), *FUNCTIONS]
    return next((found for goal in goals if (found := _nearest(_pairs(probe, made, acts, goal))) is not None), None)


def _pairs(
    probe: _Probe, made: Sequence[tuple[Part, Tensor]], acts: Sequence[Callable[[Tensor], Tensor]], goal_TF: Tensor
) -> Iterator[tuple[float, tuple[Part, ...]]]:
    """How far every activation of a projection, alone or times another, is from what goes in."""
    for act in acts:
        acted = [(part, x_TF, act(x_TF.clone())) for part, x_TF in made]  # a clone: some work in place
        for part, _, acted_TF in acted:
            yield probe.error(acted_TF, goal_TF), (replace(part, name="mlp_up"),)
        for (gate, _, acted_TF), (up, up_TF, _) in permutations(acted, 2):
            error = probe.error(acted_TF * up_TF, goal_TF)
            yield error, (replace(up, name="mlp_up"), replace(gate, name="mlp_gate"))


def _made(probe: _Probe, down: _Call, width: int) -> Iterator[tuple[Part, Tensor]]:
    """What projections before the down projection gave, and the halves of what they gave, F wide."""
    reads: dict[int, list[Callable[[Tensor], Tensor]]] = {
        width: [as_it_is],
        2 * width: [partial(_half, halves, 1) for halves in HALVES.values()],
    }
    for call in probe.calls[: probe.calls.index(down)]:
        if call.has_matrix and call.gave_TX is not None:
            for read in reads.get(call.gave_TX.shape[-1], []):
                yield Part("", Tap(call.module), read), read(call.gave_TX)


def _activations(probe: _Probe, width: int) -> list[nn.Module]:
    """Modules without weights that turn something F wide into something else."""
    found = [
        call.module
        for call in probe.calls
        if not call.has_matrix and call.given is not None and call.given.shape[-1] == width
        if not probe.same(call.given_TX, call.gave_TX) and _is_repeatable(probe, call)
    ]
    return list(dict.fromkeys(found))


def _is_repeatable(probe: _Probe, call: _Call) -> bool:
    """Whether a module gives the same again for its first argument alone."""
    try:
        again = call.module(None if call.given is None else call.given.clone())
    except Exception:  # one that needs more than that may object in any way
        return False
    return isinstance(again, Tensor) and probe.same(again, call.gave)


def _mixture(probe: _Probe, mlp: nn.Module, experts: nn.Module) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """A mixture's parts are recomputed from what its experts are given, all but what it gives in the end."""
    n_experts = max(parameter.shape[0] for parameter in experts.parameters(recurse=False))
    routers = [call.module for call in probe.calls if call.gave_TX is not None and call.gave_TX.shape[-1] == n_experts]
    ends = ((call.given_TX, call.gave_TX) for call in probe.calls if call.module is experts)
    given_TD, gave_TD = next(ends, (None, None))
    mixture = None
    if given_TD is not None and gave_TD is not None:
        with torch.inference_mode():
            mixture = find_mixture(routers, experts, given_TD, gave_TD, probe.tolerance)
    if mixture is None:
        raise probe.missing("mlp_up", f"its mixture of experts works in a way of its own; {NO_MLP}")
    tap = Tap(experts, reads_input=True)
    reads = {"mlp_up": mixture.up, "mlp_gate": mixture.gate, "mlp_activation": mixture.activation}
    kept = [Part(name, tap, read) for name, read in reads.items() if name != "mlp_gate" or mixture.halves is not None]
    chosen = (Part("experts", tap, mixture.experts), Part("expert_weights", tap, mixture.weights))
    return (*kept, Part("mlp_down", Tap(mlp))), chosen
