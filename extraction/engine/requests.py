"""What goes into the engine and what comes out: requests and completions.

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
    """A prompt to continue. With `seed`, `id` alone decides the random numbers, so ids are unique within a run.

    `steering`, `sample` and `alpha` are this request's own: neighbours in the batch don't feel them; None is the run's.
    `draws` names the random numbers where they are to be those of others with the same name, so that nothing but the
    steering differs. With `ignore_eos` stop tokens are ordinary ones. `stop_strings` come besides the run's.
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
    """What speculation came to in one row: passes of the target, tokens proposed to it, those that it accepted.

    `step_rates`: accepted of proposed in each pass that was proposed to, in order.
    """

    target_steps: int
    proposed: int
    accepted: int
    step_rates: tuple[float, ...] = ()

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted of proposed, 0 to 1; None where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_step(self) -> float:
        """What a pass of the target gave: the accepted ones and one more."""
        return 1 + self.accepted / self.target_steps if self.target_steps else 0.0


@dataclass(frozen=True)
class Completion:
    """What came out. `token_ids` holds no stop token; `finish_reason` is `stop`, `stop_string`, `length` or `failed`.

    `activations`: `site.pooling` -> [L, D] on the CPU (`all`: [T, L, D]); empty when the response is empty. A `fault`
    says why a row failed: its logits or activations are not finite.
    """

    id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    activations: dict[str, Tensor] = field(default_factory=dict)
    speculation: SpeculationStats | None = None
    fault: TraitlineError | None = None
