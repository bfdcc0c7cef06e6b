"""Exact speculative decoding: cheap proposals, one target pass over all of them, rejection sampling.

A proposal drawn from q is accepted where u < p/q; the first that is not is replaced by a draw from max(p - q, 0),
renormalised; where all are accepted one more token is drawn from the target's p. The result is distributed as if the
target had been sampled alone (Leviathan et al. 2023, arXiv 2211.17192, appendix A.1; Chen et al. 2023, arXiv
2302.01318). Where greedy, p and q are one-hot, and the same rule gives the target's greedy tokens.

Shapes: B rows, K proposals, T = K + 1 columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extraction.core.errors import ConfigError
from extraction.engine.sampler import Sample, sample_from

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

PRIOR_TRIALS, MEMORY = 4.0, 0.9


@dataclass(frozen=True)
class Speculate:
    """Settings of speculation: proposals come from `draft`, or without one from n-gram lookup in the row's own tokens.

    `depth`: largest number of proposals. If `adaptive`, each row's depth follows the acceptance in that row alone.
    Temperature, top-k and top-p shape draft and target alike.
    """

    draft: LanguageModel | None = None
    sample: Sample = field(default_factory=Sample)
    depth: int = 4
    adaptive: bool = True
    ngram: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 64:
            raise ConfigError(f"speculation depth {self.depth} is out of range: use 1 to 64")
        if not 1 <= self.ngram <= 16:
            raise ConfigError(f"ngram {self.ngram} is out of range: use 1 to 16")


@dataclass(frozen=True)
class Proposal:
    """Tokens for the target to verify; the first `depth_B[b]` of row b count.

    `chances_BKV`: the probabilities that they were drawn from; None: proposed with certainty.
    """

    token_BK: Tensor
    depth_B: Tensor
    chances_BKV: Tensor | None

    def without(self, rows: Sequence[int], token_B1: Tensor) -> Proposal:
        """Return the proposal without these rows' tokens; `token_B1` fills their columns."""
        rows_R = torch.tensor(rows, device=self.token_BK.device)
        token_BK = self.token_BK.index_copy(0, rows_R, token_B1[rows_R].expand(-1, self.token_BK.shape[1]))
        return Proposal(token_BK, self.depth_B.index_fill(0, rows_R, 0), self.chances_BKV)


@dataclass(frozen=True)
class Verification:
    """Row b's new tokens are `token_BT[b, : count_B[b]]`: those accepted, and one more."""

    token_BT: Tensor
    count_B: Tensor


def verify_proposal(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Accept or reject every row's proposals by the target's probabilities at the T columns.

    `accept_BK`: uniforms of the acceptance tests. `draw_BT`: uniforms of the additional draw, by inverse CDF.
    """
    token_BK, depth_B = proposal.token_BK, proposal.depth_B
    rows_B, depth = torch.arange(len(token_BK), device=token_BK.device), token_BK.shape[1]
    p_BK = _probs_of(chances_BTV[:, :depth], token_BK)
    q_BK = torch.ones_like(p_BK) if proposal.chances_BKV is None else _probs_of(proposal.chances_BKV, token_BK)
    counts_BK = torch.arange(depth, device=token_BK.device) < depth_B.unsqueeze(1)
    passed_BK = counts_BK & (accept_BK.to(p_BK.dtype) * q_BK < p_BK)
    accepted_B = passed_BK.long().cumprod(1).sum(1)
    residual_BV = _residual(chances_BTV[rows_B, accepted_B], proposal, accepted_B)
    more_B = sample_from(residual_BV, draw_BT[rows_B, accepted_B])
    token_BT = torch.cat([token_BK, token_BK[:, :1]], dim=1).scatter(1, accepted_B.unsqueeze(1), more_B.unsqueeze(1))
    return Verification(token_BT, accepted_B + 1)


def _probs_of(chances_BKV: Tensor, token_BK: Tensor) -> Tensor:
    return chances_BKV.gather(2, token_BK.unsqueeze(2)).squeeze(2)


def _residual(p_BV: Tensor, proposal: Proposal, accepted_B: Tensor) -> Tensor:
    """Weights of the additional draw: max(p - q, 0) where a proposal was rejected, else p."""
    at_B = accepted_B.clamp(max=proposal.token_BK.shape[1] - 1)
    rows_B = torch.arange(len(p_BV), device=p_BV.device)
    if proposal.chances_BKV is None:
        q_BV = torch.zeros_like(p_BV).scatter_(1, proposal.token_BK[rows_B, at_B].unsqueeze(1), 1.0)
    else:
        q_BV = proposal.chances_BKV[rows_B, at_B]
    residual_BV = (p_BV - q_BV).clamp(min=0)
    # by rounding no weight may be left; p and q are equal then
    rejected_B = (accepted_B < proposal.depth_B) & (residual_BV.sum(-1) > 0)
    return torch.where(rejected_B.unsqueeze(1), residual_BV, p_BV)


@dataclass
class AdaptiveDepth:
    """Depth of one row's speculation, by its acceptance so far; older steps count less.

    `cost`: cost of one proposal in passes of the target. `prior`: acceptance rate before anything was seen.
    """

    depth: int
    cost: float
    prior: float
    accepted: float = 0.0
    tried: float = 0.0
    prior_weight: float = PRIOR_TRIALS

    def record(self, proposed: int, accepted: int) -> None:
        """Note a step. A rejection ends it, so later proposals were not tried."""
        self.accepted = MEMORY * self.accepted + accepted
        self.tried = MEMORY * self.tried + min(accepted + 1, proposed)
        self.prior_weight *= MEMORY

    @property
    def rate(self) -> float:
        """Expected acceptance rate: observed, weighed against the prior."""
        return (self.accepted + self.prior_weight * self.prior) / (self.tried + self.prior_weight)

    def best_depth(self, least: int = 1) -> int:
        """Return the depth, at least `least`, with the most expected tokens per unit of time."""
        rate = min(self.rate, 0.999)
        return max(range(least, self.depth + 1), key=lambda depth: expected_gain(rate, depth, self.cost))


def expected_gain(rate: float, depth: int, cost: float) -> float:
    """Return the expected speed-up: (1 - a^(k+1)) / ((1 - a)(ck + 1)); Leviathan et al. 2023, theorem 3.8."""
    return (1 - rate ** (depth + 1)) / ((1 - rate) * (cost * depth + 1))


class NgramLookup:
    """Prompt lookup decoding (Saxena 2023): propose the tokens that followed the last occurrence of the row's ending.

    The longest n-gram that has occurred before wins, from `ngram` down to 1.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.before_last: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the row."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            for n in range(1, min(self.ngram, end) + 1):
                key = tuple(self.tokens[end - n :])
                if key in self.after:
                    self.before_last[key] = self.after[key]
                self.after[key] = end

    @property
    def known(self) -> int:
        """Length of the longest n-gram at the row's end that occurred before; 0 if its last token is new."""
        longest = min(self.ngram, len(self.tokens))
        return next((n for n in range(longest, 0, -1) if tuple(self.tokens[-n:]) in self.before_last), 0)

    def propose(self, n: int, depth: int) -> list[int]:
        """Return up to `depth` tokens that followed the previous occurrence of the last `n` tokens."""
        start = self.before_last[tuple(self.tokens[-n:])]
        return self.tokens[start : start + depth]
