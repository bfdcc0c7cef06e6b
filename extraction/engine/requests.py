"""Requests, which go into the engine, and completions, which it returns.

Shapes: T tokens, L layers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from extraction.core.errors import TraitlineError
from extraction.engine.sampler import Sample
from extraction.engine.steering import Steering

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `seed` and `id` decide the random numbers, so ids are unique within a run.

    `steering`, `sample` and `alpha` apply to this request alone; None: the batch's default. `draws` replaces the id as
    the key of the random numbers: requests with the same value draw the same ones, so that only the steering differs.
    With `ignore_eos`, stop tokens are ordinary tokens. `stop_strings` are added to the batch's.
    """

    id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0
    steering: Steering | None = field(default=None, compare=False)
    draws: str | None = None
    sample: Sample | None = None
    alpha: float | None = None
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeculationStats:
    """Speculation statistics of one request: target passes, proposed tokens, accepted tokens.

    `step_rates`: accepted over proposed of each pass with a proposal, in order.
    """

    target_steps: int
    proposed: int
    accepted: int
    step_rates: tuple[float, ...] = ()

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over proposed, 0 to 1; None if nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a target pass gave: the accepted ones and one more."""
        return 1 + self.accepted / self.target_steps if self.target_steps else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished request. `finish_reason`: "stop", "stop_string", "length" or "failed"; no stop token in `token_ids`.

    `activations`: `site.pooling` -> [L, D] on the CPU (`all`: [T, L, D]); empty if the response is empty. `fault`: the
    error of a failed request, whose logits or activations are not finite.
    """

    id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    activations: dict[str, Tensor] = field(default_factory=dict)
    speculation: SpeculationStats | None = None
    fault: TraitlineError | None = None
