"""Score held-out rows with directions that were fitted without their question and their instruction.

Shapes: n rows, N positive, M negative, K directions a layer (methods, or random draws), L layers, D hidden, C = K L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from extraction.vectors.chunked import LayerBlock, mean_over_rows
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import fit_threshold, pooled_spread, project
from extraction.vectors.prepare import orient_towards
from extraction.vectors.splits import LabelledRows, Split

FitDirections = Callable[[Tensor, Tensor], Tensor]
"""Positive [N, L, D] and negative [M, L, D] rows -> K directions [K, L, D]."""


@dataclass(frozen=True)
class HeldOutScorer:
    """Directions [K, L, D] with the threshold and unit [K, L] of their scores, all from the fitted rows alone."""

    direction_KLD: Tensor
    threshold_KL: Tensor
    spread_KL: Tensor

    def score(self, activations_nLD: Tensor) -> Tensor:
        """Score rows: [n, K, L], above 0 positive, in units of the fitted rows' standard deviation within a side."""
        return (project(activations_nLD, self.direction_KLD) - self.threshold_KL) / self.spread_KL


def fit_scorer(rows: LabelledRows, fit: FitDirections) -> HeldOutScorer:
    """Fit directions, their best threshold and their pooled standard deviation within a side.

    Without any spread the unit stays that of the projections.
    """
    direction_KLD = fit(*rows.sides)
    scores_NKL, scores_MKL = (project(side, direction_KLD) for side in rows.sides)
    sides = scores_NKL.flatten(1), scores_MKL.flatten(1)
    spread_C = pooled_spread(*sides)
    shape = direction_KLD.shape[:2]
    spread_C = torch.where(spread_C > 0, spread_C, 1.0)
    return HeldOutScorer(direction_KLD, fit_threshold(*sides).view(shape), spread_C.view(shape))


def held_out_scores(rows: LabelledRows, split: Split, fit: FitDirections, *others_nLD: Tensor) -> list[Tensor]:
    """Score the held-out rows of every fold: [n, K, L] for the rows and for each of `others_nLD`; NaN for fit rows.

    `others_nLD` are the same rows captured in another way. In each fold a scorer is fitted on the fit questions of the
    other instructions, and scores the fold's own rows about validation and test questions. The fitted rows alone
    standardise the scores, so that folds can be pooled.
    """
    scores: list[Tensor] = []
    for fold in split.folds:
        scorer = fit_scorer(rows.select(fold.fit_n), fit)
        of_fold = [scorer.score(all_nLD[fold.held_n]) for all_nLD in (rows.activations_nLD, *others_nLD)]
        scores = scores or [torch.full((len(rows.positive_n), *part.shape[1:]), torch.nan).double() for part in of_fold]
        for scores_nKL, part in zip(scores, of_fold, strict=True):
            scores_nKL[fold.held_n] = part
    return scores


def fit_with_methods(methods: Sequence[str], *, seed: int, block: LayerBlock | None = None) -> FitDirections:
    """Return a fit of the methods, in order. `block`: the layers that the rows are of (default: all)."""

    def fit(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
        layers = block or LayerBlock(0, positive_NLD.shape[1], positive_NLD.shape[1])
        return torch.stack([fit_block(name, positive_NLD, negative_MLD, layers, seed=seed) for name in methods])

    return fit


def fit_with_draws(draws_KLD: Tensor) -> FitDirections:
    """Return a fit that takes random directions as they are, and only orients them to the positive side."""

    def fit(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
        difference_LD = mean_over_rows(positive_NLD) - mean_over_rows(negative_MLD)
        return orient_towards(draws_KLD, difference_LD)

    return fit
