"""Recompute a mixture of experts with stacked weights from its input, expert by expert.

`find_mixture_of_experts` tries every assignment of the parameters (which is the up and which the down projection, how
gate and up share a tensor, which activation) and takes the one whose weighted sum of experts equals the model's output.

Shapes: N tokens, D hidden, k experts per token, E experts, F width of an expert's MLP, X either F or 2F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

GateUpSplit = Callable[[Tensor], tuple[Tensor, Tensor]]
Route = Callable[[Tensor], tuple[Tensor, Tensor]]


def _gate_first(x_X: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x_X.chunk(2, dim=-1)
    return first, second


def _up_first(x_X: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x_X.chunk(2, dim=-1)
    return second, first


def _gate_even(x_X: Tensor) -> tuple[Tensor, Tensor]:
    return x_X[..., ::2], x_X[..., 1::2]


def _up_even(x_X: Tensor) -> tuple[Tensor, Tensor]:
    return x_X[..., 1::2], x_X[..., ::2]


# ways to hold gate and up projection in one tensor: [.., 2F] -> (gate [.., F], up [.., F])
GATE_UP_SPLITS: dict[str, GateUpSplit] = {
    "gate first": _gate_first,
    "up first": _up_first,
    "gate even": _gate_even,
    "up even": _up_even,
}


@dataclass(frozen=True)
class StackedLinear:
    """One linear layer per expert: weights [E, out, in] (`transposed`: [E, in, out]), biases [E, out] or None."""

    weight_E: Tensor
    bias_EX: Tensor | None
    transposed: bool

    @property
    def width(self) -> int:
        """Number of outputs."""
        return int(self.weight_E.shape[2 if self.transposed else 1])

    def __call__(self, expert: int, hidden_ND: Tensor) -> Tensor:
        """Apply one expert's layer: [N, in] -> [N, out]."""
        weight = self.weight_E[expert]
        out_NX = hidden_ND @ (weight if self.transposed else weight.T)
        return out_NX if self.bias_EX is None else out_NX + self.bias_EX[expert]


@dataclass(frozen=True)
class MixtureOfExperts:
    """A router and its experts. All functions take [.., D] and are pure; the k experts are in the router's order."""

    route: Route
    into: StackedLinear
    down: StackedLinear
    halves: GateUpSplit | None
    activate: Callable[[Tensor], Tensor]  # [N, X] of `into` -> [N, F]

    def experts(self, hidden_D: Tensor) -> Tensor:
        """Return the experts that each token is routed to: integers [.., k]."""
        return self._routed(hidden_D)[0]

    def weights(self, hidden_D: Tensor) -> Tensor:
        """Return the routing weights of those experts: [.., k]."""
        return self._routed(hidden_D)[1]

    def up(self, hidden_D: Tensor) -> Tensor:
        """Return the routed experts' up projections: [.., k, F]."""
        into = self._by_expert(hidden_D, self.into, self.into.width)
        return into if self.halves is None else self.halves(into)[1].contiguous()

    def gate(self, hidden_D: Tensor) -> Tensor:
        """Return the routed experts' gate projections, before the activation: [.., k, F]."""
        assert self.halves is not None
        return self.halves(self._by_expert(hidden_D, self.into, self.into.width))[0].contiguous()

    def activation(self, hidden_D: Tensor) -> Tensor:
        """Return the inputs of the routed experts' down projections: [.., k, F]."""
        width = self.into.width // (1 if self.halves is None else 2)
        return self._by_expert(hidden_D, lambda expert, x_ND: self.activate(self.into(expert, x_ND)), width)

    def output(self, hidden_D: Tensor) -> Tensor:
        """Return the weighted sum of the routed experts' outputs: [.., D]."""

        def run_expert(expert: int, x_ND: Tensor) -> Tensor:
            return self.down(expert, self.activate(self.into(expert, x_ND)))

        out_kD = self._by_expert(hidden_D, run_expert, self.down.width)
        return (out_kD * self.weights(hidden_D).unsqueeze(-1).to(out_kD.dtype)).sum(-2)

    def _routed(self, hidden_D: Tensor) -> tuple[Tensor, Tensor]:
        expert_Nk, weight_Nk = self.route(hidden_D.reshape(-1, hidden_D.shape[-1]))
        return tuple(x.reshape(*hidden_D.shape[:-1], -1) for x in (expert_Nk, weight_Nk))  # type: ignore[return-value]

    def _by_expert(self, hidden_D: Tensor, apply: Callable[[int, Tensor], Tensor], width: int) -> Tensor:
        """Apply a function of (expert, its tokens), expert by expert, without copying weights: [.., k, width]."""
        hidden_ND = hidden_D.reshape(-1, hidden_D.shape[-1])
        expert_Nk = self.route(hidden_ND)[0]
        out_NkX = hidden_ND.new_zeros(*expert_Nk.shape, width)
        for expert in expert_Nk.unique().tolist():
            if expert < len(self.into.weight_E):  # some routers use one more number for no expert
                token, place = (expert_Nk == expert).nonzero(as_tuple=True)
                out_NkX[token, place] = apply(expert, hidden_ND[token]).to(out_NkX.dtype)
        return out_NkX.reshape(*hidden_D.shape[:-1], *out_NkX.shape[1:])


def stacked_experts(module: nn.Module) -> nn.Module | None:
    """Return the submodule with the experts' two three-dimensional weights; None if there is none."""
    stacked = (inner for inner in module.modules() if len(_parameters_of_dim(inner, 3)) == 2)
    return next(stacked, None)


def find_mixture_of_experts(
    routers: Sequence[nn.Module], experts: nn.Module, hidden_ND: Tensor, output_ND: Tensor, tolerance: float
) -> MixtureOfExperts | None:
    """Return the mixture whose `output` equals `output_ND` for this input, within `tolerance`; None if none does."""
    routes = list(_find_routes(routers, hidden_ND))
    for route, (into, down), (halves, activate) in product(
        routes, _stack_pairs(experts, hidden_ND.shape[-1]), _activation_candidates(experts)
    ):
        if into.width != _input_width(down) * (1 if halves is None else 2):
            continue
        mixture = MixtureOfExperts(route, into, down, halves, activate)
        error = (mixture.output(hidden_ND).float() - output_ND.float()).norm()
        if error <= tolerance * output_ND.float().norm():
            return mixture
    return None


def _parameters_of_dim(module: nn.Module, dim: int) -> list[Tensor]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == dim]


def _input_width(stack: StackedLinear) -> int:
    return int(stack.weight_E.shape[1 if stack.transposed else 2])


def _stack_pairs(experts: nn.Module, hidden_size: int) -> Iterator[tuple[StackedLinear, StackedLinear]]:
    """Yield every pair (input layer, down projection) of parameters that the shapes allow."""
    biases: list[Tensor | None] = [None, *_parameters_of_dim(experts, 2)]
    for (into, down), transposed in product(permutations(_parameters_of_dim(experts, 3)), (False, True)):
        for into_bias, down_bias in product(biases, biases):
            stacks = StackedLinear(into, into_bias, transposed), StackedLinear(down, down_bias, transposed)
            fits = all(s.bias_EX is None or s.bias_EX.shape == (len(s.weight_E), s.width) for s in stacks)
            if fits and stacks[1].width == hidden_size == _input_width(stacks[0]):
                yield stacks


def _activation_candidates(experts: nn.Module) -> Iterator[tuple[GateUpSplit | None, Callable[[Tensor], Tensor]]]:
    """Yield (split of gate and up, function of both): activation of the gate times up, or the model's own function.

    A split of None is an MLP without a gate.
    """
    own = getattr(experts, "_apply_gate", None)  # transformers' name for the function of gate and up
    acts = [inner for inner in experts.children() if not any(True for _ in inner.parameters())]
    for halves in GATE_UP_SPLITS.values():
        yield from ((halves, _gated_activation(act, halves)) for act in acts)
        if own is not None and _is_gate_and_up(own, halves, _parameters_of_dim(experts, 3)):
            yield halves, own
    yield from ((None, act) for act in acts)


def _is_gate_and_up(own: Callable[[Tensor], Tensor], halves: GateUpSplit, weights: list[Tensor]) -> bool:
    """Return True if a split names gate and up as `own` uses them: the result is linear in up and not in the gate."""
    width = max(size for weight in weights for size in weight.shape[1:]) // 2 * 2
    generator = torch.Generator().manual_seed(0)
    x_NX = torch.randn(4, width, generator=generator, dtype=torch.float64).to(weights[0].device, torch.float32)

    def curvature(column: int) -> float:
        step_X = torch.zeros_like(x_NX)
        halves(step_X)[column].fill_(0.5)
        return float((own(x_NX + step_X) + own(x_NX - step_X) - 2 * own(x_NX)).abs().max())

    return curvature(1) < 1e-4 < curvature(0)


def _gated_activation(act: Callable[[Tensor], Tensor], halves: GateUpSplit) -> Callable[[Tensor], Tensor]:
    def activate(x_X: Tensor) -> Tensor:
        gate, up = halves(x_X)
        return act(gate) * up

    return activate


def _find_routes(routers: Sequence[nn.Module], hidden_ND: Tensor) -> Iterator[Route]:
    """Yield the routing function of every module that maps tokens to (expert numbers, weights)."""
    for router in routers:
        try:
            chosen = _routing_of(router(hidden_ND))
        except Exception:  # a module that is no router may raise anything
            continue
        if chosen is not None:
            yield partial(_route, router)


def _route(router: nn.Module, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _routing_of(router(hidden_ND))
    assert chosen is not None
    return chosen


def _routing_of(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the expert numbers [N, k] and weights [N, k] in a router's output; None if it has none."""
    tensors = [x for x in output if isinstance(x, Tensor) and x.dim() == 2] if isinstance(output, tuple) else []
    numbers = [x for x in tensors if not x.is_floating_point()]
    weights = [x for x in tensors if x.is_floating_point() and numbers and x.shape == numbers[0].shape]
    return (numbers[0], weights[-1]) if weights else None
