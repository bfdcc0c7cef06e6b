"""Reading held-out rows along directions that have seen neither their question nor their instruction.

n rows, N positive, M negative, K ways to find a direction (methods, or random draws), L layers, D hidden, C = K L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from extraction.vectors.chunked import Block, mean_row
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import fit_threshold, pooled_spread, project
from extraction.vectors.prepare import towards
from extraction.vectors.splits import LabelledRows, Split

Fit = Callable[[Tensor, Tensor], Tensor]
"""Positive [N, L, D] and negative [M, L, D] rows -> K directions [K, L, D]."""


@dataclass(frozen=True)
class HeldOutScorer:
    """K directions [K, L, D], and what turns a projection into a score [K, L]: all from the rows that were fitted."""

    direction_KLD: Tensor
    threshold_KL: Tensor
    spread_KL: Tensor

    def read(self, activations_nLD: Tensor) -> Tensor:
        """Scores [n, K, L]: above 0 is positive, the unit is the fitted rows' spread within a side."""
        return (project(activations_nLD, self.direction_KLD) - self.threshold_KL) / self.spread_KL


def fit_scorer(rows: LabelledRows, fit: Fit) -> HeldOutScorer:
    """Directions; the threshold that best tells the rows' sides apart; and the pooled spread within a side.

    Without any spread the unit is left as it is.
    """
    direction_KLD = fit(*rows.sides)
    scores_NKL, scores_MKL = (project(side, direction_KLD) for side in rows.sides)
    sides = scores_NKL.flatten(1), scores_MKL.flatten(1)
    spread_C = pooled_spread(*sides)
    shape = direction_KLD.shape[:2]
    spread_C = torch.where(spread_C > 0, spread_C, 1.0)
    return HeldOutScorer(direction_KLD, fit_threshold(*sides).view(shape), spread_C.view(shape))


def held_out_scores(rows: LabelledRows, split: Split, fit: Fit, *others_nLD: Tensor) -> list[Tensor]:
    """Scores [n, K, L] of the rows, then of `others_nLD` (the same rows, captured otherwise); NaN for fit rows.

    In each fold a gauge is fitted on the fit questions of the other instructions, and reads the fold's own rows about
    validation and test questions. Scores are standardised by the fitted rows alone, so that folds can be pooled.
    """
    found: list[Tensor] = []
    for fold in split.folds:
        gauge = fit_scorer(rows.pick(fold.fit_n), fit)
        read = [gauge.read(activations_nLD[fold.held_n]) for activations_nLD in (rows.activations_nLD, *others_nLD)]
        found = found or [torch.full((len(rows.positive_n), *each.shape[1:]), torch.nan).double() for each in read]
        for scores_nKL, each in zip(found, read, strict=True):
            scores_nKL[fold.held_n] = each
    return found


def by_methods(methods: Sequence[str], *, seed: int, block: Block | None = None) -> Fit:
    """Every method's directions, in order. `block`: which layers the rows are of; all, unless given."""

    def fit(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
        here = block or Block(0, positive_NLD.shape[1], positive_NLD.shape[1])
        return torch.stack([fit_block(name, positive_NLD, negative_MLD, here, seed=seed) for name in methods])

    return fit


def by_draws(draws_KLD: Tensor) -> Fit:
    """The same random directions whatever the rows, but turned towards the positive side."""

    def fit(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
        difference_LD = mean_row(positive_NLD) - mean_row(negative_MLD)
        return towards(draws_KLD, difference_LD)

    return fit
