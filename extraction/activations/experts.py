"""A mixture of experts with stacked weights, recomputed from its input expert by expert, and proven.

Which parameter is which, how gate and up share a tensor and what the activation is, is found by trying: the one
arrangement is taken whose weighted sum of experts is what the mixture gave.

Shapes: N tokens, D hidden, k experts a token, E experts, F an expert's width, X F or 2F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

Halves = Callable[[Tensor], tuple[Tensor, Tensor]]
Route = Callable[[Tensor], tuple[Tensor, Tensor]]


def _first_half(x_X: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x_X.chunk(2, dim=-1)
    return first, second


def _second_half(x_X: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x_X.chunk(2, dim=-1)
    return second, first


def _even(x_X: Tensor) -> tuple[Tensor, Tensor]:
    return x_X[..., ::2], x_X[..., 1::2]


def _odd(x_X: Tensor) -> tuple[Tensor, Tensor]:
    return x_X[..., 1::2], x_X[..., ::2]


# where the gate and the up projection stand in one tensor: [.., 2F] -> (gate [.., F], up [.., F])
HALVES: dict[str, Halves] = {"gate first": _first_half, "up first": _second_half, "gate even": _even, "up even": _odd}


@dataclass(frozen=True)
class Stack:
    """A linear map of every expert: weights [E, out, in] (or [E, in, out]) and perhaps biases [E, out]."""

    weight_E: Tensor
    bias_EX: Tensor | None
    transposed: bool

    @property
    def width(self) -> int:
        """What it maps to."""
        return int(self.weight_E.shape[2 if self.transposed else 1])

    def __call__(self, expert: int, hidden_ND: Tensor) -> Tensor:
        """Through one expert: [N, in] -> [N, out]."""
        weight = self.weight_E[expert]
        out_NX = hidden_ND @ (weight if self.transposed else weight.T)
        return out_NX if self.bias_EX is None else out_NX + self.bias_EX[expert]


@dataclass(frozen=True)
class Mixture:
    """A router and its experts. Every function takes [.., D] and is pure; the k chosen stand in the router's order."""

    route: Route
    into: Stack
    down: Stack
    halves: Halves | None
    activate: Callable[[Tensor], Tensor]  # [N, X] of `into` -> [N, F]

    def experts(self, hidden_D: Tensor) -> Tensor:
        """Which experts each token goes to: integers [.., k]."""
        return self._routed(hidden_D)[0]

    def weights(self, hidden_D: Tensor) -> Tensor:
        """By how much each of them counts: [.., k]."""
        return self._routed(hidden_D)[1]

    def up(self, hidden_D: Tensor) -> Tensor:
        """The chosen experts' up projections: [.., k, F]."""
        into = self._by_expert(hidden_D, self.into, self.into.width)
        return into if self.halves is None else self.halves(into)[1].contiguous()

    def gate(self, hidden_D: Tensor) -> Tensor:
        """The chosen experts' gate projections, before the activation: [.., k, F]."""
        assert self.halves is not None
        return self.halves(self._by_expert(hidden_D, self.into, self.into.width))[0].contiguous()

    def activation(self, hidden_D: Tensor) -> Tensor:
        """What goes into the chosen experts' down projections: [.., k, F]."""
        width = self.into.width // (1 if self.halves is None else 2)
        return self._by_expert(hidden_D, lambda expert, x_ND: self.activate(self.into(expert, x_ND)), width)

    def output(self, hidden_D: Tensor) -> Tensor:
        """The weighted sum of the chosen experts: [.., D]."""

        def through(expert: int, x_ND: Tensor) -> Tensor:
            return self.down(expert, self.activate(self.into(expert, x_ND)))

        out_kD = self._by_expert(hidden_D, through, self.down.width)
        return (out_kD * self.weights(hidden_D).unsqueeze(-1).to(out_kD.dtype)).sum(-2)

    def _routed(self, hidden_D: Tensor) -> tuple[Tensor, Tensor]:
        expert_Nk, weight_Nk = self.route(hidden_D.reshape(-1, hidden_D.shape[-1]))
        return tuple(x.reshape(*hidden_D.shape[:-1], -1) for x in (expert_Nk, weight_Nk))  # type: ignore[return-value]

    def _by_expert(self, hidden_D: Tensor, through: Callable[[int, Tensor], Tensor], width: int) -> Tensor:
        """Each token through its experts, one expert at a time: no weights are gathered. [.., k, width]."""
        hidden_ND = hidden_D.reshape(-1, hidden_D.shape[-1])
        expert_Nk = self.route(hidden_ND)[0]
        out_NkX = hidden_ND.new_zeros(*expert_Nk.shape, width)
        for expert in expert_Nk.unique().tolist():
            if expert < len(self.into.weight_E):  # some routers have a number that stands for no expert
                token, place = (expert_Nk == expert).nonzero(as_tuple=True)
                out_NkX[token, place] = through(expert, hidden_ND[token]).to(out_NkX.dtype)
        return out_NkX.reshape(*hidden_D.shape[:-1], *out_NkX.shape[1:])


def stacked_experts(module: nn.Module) -> nn.Module | None:
    """The module within that holds the experts' weights, three-dimensional; None where there is none."""
    held = (inner for inner in module.modules() if len(_of_dim(inner, 3)) == 2)
    return next(held, None)


def find_mixture(
    routers: Sequence[nn.Module], experts: nn.Module, hidden_ND: Tensor, output_ND: Tensor, tolerance: float
) -> Mixture | None:
    """The `Mixture` whose `output` is what the experts gave for this input; None where no arrangement fits."""
    routes = list(_routes(routers, hidden_ND))
    for route, (into, down), (halves, activate) in product(
        routes, _stacks(experts, hidden_ND.shape[-1]), _activations(experts)
    ):
        if into.width != _width_into(down) * (1 if halves is None else 2):
            continue
        mixture = Mixture(route, into, down, halves, activate)
        error = (mixture.output(hidden_ND).float() - output_ND.float()).norm()
        if error <= tolerance * output_ND.float().norm():
            return mixture
    return None


def _of_dim(module: nn.Module, dim: int) -> list[Tensor]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == dim]


def _width_into(stack: Stack) -> int:
    return int(stack.weight_E.shape[1 if stack.transposed else 2])


def _stacks(experts: nn.Module, hidden_size: int) -> Iterator[tuple[Stack, Stack]]:
    """Every pair (into an expert, out of it) that the shapes allow."""
    biases: list[Tensor | None] = [None, *_of_dim(experts, 2)]
    for (into, down), transposed in product(permutations(_of_dim(experts, 3)), (False, True)):
        for into_bias, down_bias in product(biases, biases):
            stacks = Stack(into, into_bias, transposed), Stack(down, down_bias, transposed)
            fits = all(s.bias_EX is None or s.bias_EX.shape == (len(s.weight_E), s.width) for s in stacks)
            if fits and stacks[1].width == hidden_size == _width_into(stacks[0]):
                yield stacks


def _activations(experts: nn.Module) -> Iterator[tuple[Halves | None, Callable[[Tensor], Tensor]]]:
    """(how gate and up stand, what comes of them): the model's own way first, else activation of the gate times up."""
    own = getattr(experts, "_apply_gate", None)  # transformers' name for an expert's way with its gate
    acts = [inner for inner in experts.children() if not any(True for _ in inner.parameters())]
    for halves in HALVES.values():
        yield from ((halves, _gated(act, halves)) for act in acts)
        if own is not None and _affine_in_up(own, halves, _of_dim(experts, 3)):
            yield halves, own
    yield from ((None, act) for act in acts)


def _affine_in_up(own: Callable[[Tensor], Tensor], halves: Halves, weights: list[Tensor]) -> bool:
    """Whether these halves are gate and up for the model's own way: the result is linear in up, and not in the gate."""
    width = max(size for weight in weights for size in weight.shape[1:]) // 2 * 2
    generator = torch.Generator().manual_seed(0)
    x_NX = torch.randn(4, width, generator=generator, dtype=torch.float64).to(weights[0].device, torch.float32)

    def bend(column: int) -> float:
        step_X = torch.zeros_like(x_NX)
        halves(step_X)[column].fill_(0.5)
        return float((own(x_NX + step_X) + own(x_NX - step_X) - 2 * own(x_NX)).abs().max())

    return bend(1) < 1e-4 < bend(0)


def _gated(act: Callable[[Tensor], Tensor], halves: Halves) -> Callable[[Tensor], Tensor]:
    def activate(x_X: Tensor) -> Tensor:
        gate, up = halves(x_X)
        return act(gate) * up

    return activate


def _routes(routers: Sequence[nn.Module], hidden_ND: Tensor) -> Iterator[Route]:
    """Modules that turn a token into (experts' numbers, weights)."""
    for router in routers:
        try:
            chosen = _chosen(router(hidden_ND))
        except Exception:  # a module that is no router may object in any way
            continue
        if chosen is not None:
            yield partial(_route, router)


def _route(router: nn.Module, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _chosen(router(hidden_ND))
    assert chosen is not None
    return chosen


def _chosen(output: Any) -> tuple[Tensor, Tensor] | None:
    """Integers [N, k] and the weights [N, k] in what a router gave."""
    tensors = [x for x in output if isinstance(x, Tensor) and x.dim() == 2] if isinstance(output, tuple) else []
    numbers = [x for x in tensors if not x.is_floating_point()]
    weights = [x for x in tensors if x.is_floating_point() and numbers and x.shape == numbers[0].shape]
    return (numbers[0], weights[-1]) if weights else None
