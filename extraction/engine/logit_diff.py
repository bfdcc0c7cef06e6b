"""Logit-diff amplification of two models: after + alpha * (after - before).

A behaviour that fine-tuning made slightly likelier becomes much likelier, so that it shows in a few samples ("model
diff amplification", Aranguri and McGrath 2025,
goodfire.ai/research/model-diff-amplification).

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from extraction.core.errors import ConfigError
from extraction.engine.sampler import Sample, at_least_float32
from extraction.model.pairs import unshared_ids

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

MAX_GAP = 1e4  # of two logits: a token that one model rules out must not become infinitely preferred
MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Amplify:
    """Settings of amplification: the engine's model is `after`. `alpha` is the default of requests without their own.

    With a `plausibility` above 0, only tokens that `after` gives at least that share of its best token's probability
    stay (Li et al. 2022, contrastive decoding, arXiv 2210.15097, equation 2); it comes before the temperature.
    """

    before: LanguageModel
    sample: Sample = field(default_factory=Sample)
    alpha: float = 1.0
    plausibility: float = 0.0

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if not 0.0 <= self.plausibility <= 1.0:
            raise ConfigError(f"plausibility {self.plausibility} is out of range: use a number from 0 (off) to 1")


def check_alpha(alpha: float) -> None:
    """Raise ConfigError for an alpha that is not finite or larger than MAX_ALPHA."""
    if not abs(alpha) <= MAX_ALPHA:
        raise ConfigError(f"alpha {alpha} is out of range: use a number from {-MAX_ALPHA:g} to {MAX_ALPHA:g}")


def compared_columns(after: LanguageModel, before: LanguageModel) -> Tensor | None:
    """Return True for the columns of the after model's logits that have a difference, [V]; None for all shared ones."""
    unshared = [token_id for token_id in unshared_ids(after, before) if token_id < after.vocab_size]
    if not unshared:
        return None
    n_shared = min(after.vocab_size, before.vocab_size)
    compared_V = torch.arange(max(n_shared, unshared[-1] + 1), device=after.device) < n_shared
    compared_V[torch.tensor(unshared, device=after.device)] = False
    return compared_V


def align_logits(after_BV: Tensor, before_BV: Tensor, compared_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cut two models' logits to the columns of both heads, which may be padded by different numbers of rows.

    With `compared_V`, its columns stay, and a token that only one model has gets no difference: the after model's
    logit stands for the before model's.
    """
    n_shared = min(after_BV.shape[1], before_BV.shape[1])
    if compared_V is None:
        return after_BV[:, :n_shared], before_BV[:, :n_shared]
    after_BV = after_BV[:, : len(compared_V)]
    padded_BV = pad(before_BV[:, :n_shared], (0, after_BV.shape[1] - n_shared))
    return after_BV, torch.where(compared_V, padded_BV, after_BV)


def amplify_logits(after_BV: Tensor, before_BV: Tensor, alpha_B: Tensor, plausibility: float = 0.0) -> Tensor:
    """Return after + alpha * (after - before) in float32 or wider: [B, V].

    A token that `after` rules out stays out; one that only `before` rules out counts as MAX_GAP apart. An alpha of
    0 gives `after` bit for bit, and so does any alpha where both models agree.
    """
    after_BV, before_BV = at_least_float32(after_BV), at_least_float32(before_BV)
    gap_BV = (after_BV - before_BV).clamp(-MAX_GAP, MAX_GAP)
    scores_BV = after_BV + alpha_B.to(after_BV.dtype).unsqueeze(1) * gap_BV
    out_BV = after_BV == -torch.inf
    if plausibility > 0:
        out_BV = out_BV | (after_BV < after_BV.amax(-1, keepdim=True) + math.log(plausibility))
    return scores_BV.masked_fill(out_BV, -torch.inf)
