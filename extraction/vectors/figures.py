"""Figures of how far scores hold two sides apart, all layers at once.

N positive rows, M negative rows, L layers, D hidden. Scores are projections of rows on their layer's direction, [N, L].
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(rows_NLD: Tensor, direction_LD: Tensor) -> Tensor:
    """Scores of rows on their layer's direction, in float64: [N, L, D] and [L, D] -> [N, L]."""
    return torch.einsum("nld,ld->nl", rows_NLD.double(), direction_LD.double())


def auroc(positive_NL: Tensor, negative_ML: Tensor) -> Tensor:
    """Chance that a positive row scores above a negative one, ties counting one half: [N, L], [M, L] -> float64 [L].

    Exact: Mann and Whitney's U over N M.
    """
    if len(positive_NL) == 0 or len(negative_ML) == 0:
        return torch.full(positive_NL.shape[1:], torch.nan, dtype=torch.float64)
    sorted_LM = negative_ML.mT.contiguous().sort(-1).values
    positive_LN = positive_NL.mT.contiguous()
    below_L = torch.searchsorted(sorted_LM, positive_LN).sum(-1)
    not_above_L = torch.searchsorted(sorted_LM, positive_LN, right=True).sum(-1)
    return (below_L + not_above_L).double() / (2 * len(positive_NL) * len(negative_ML))


def cohens_d(positive_NL: Tensor, negative_ML: Tensor) -> Tensor:
    """Difference of the means over the pooled standard deviation (n - 1): [N, L], [M, L] -> float64 [L].

    NaN where it is undefined: fewer than 3 rows, or no spread.
    """
    positive_NL, negative_ML = positive_NL.double(), negative_ML.double()
    gap_L = positive_NL.mean(0) - negative_ML.mean(0)
    squares_L = sum((side - side.mean(0)).square().sum(0) for side in (positive_NL, negative_ML))
    freedom = len(positive_NL) + len(negative_ML) - 2
    pooled_L = (squares_L / max(freedom, 1)) ** 0.5
    return torch.where((pooled_L > 0) & (freedom > 0), gap_L / pooled_L, torch.nan)


def fit_threshold(positive_NL: Tensor, negative_ML: Tensor) -> Tensor:
    """The score [L] that best tells the sides apart: midway between two neighbouring scores, above it is positive.

    Best by the mean of the two sides' accuracies; of several, the one in the widest gap.
    """
    scores_Ln = torch.cat([positive_NL, negative_ML]).double().mT
    weight_n = torch.cat([torch.full((len(positive_NL),), -1.0 / len(positive_NL), dtype=torch.float64),
                          torch.full((len(negative_ML),), 1.0 / len(negative_ML), dtype=torch.float64)])  # fmt: skip
    sorted_Ln, order_Ln = scores_Ln.sort(-1)
    gain_Ln = weight_n[order_Ln].cumsum(-1)[:, :-1]  # negatives won minus positives lost, thresholds above each score
    gap_Ln = sorted_Ln.diff(dim=-1)
    gain_Ln = torch.where(gap_Ln > 0, gain_Ln, -torch.inf)
    best_Ln = gain_Ln >= gain_Ln.amax(-1, keepdim=True) - 1e-9
    at_L1 = torch.where(best_Ln, gap_Ln, -1).argmax(-1, keepdim=True)
    return ((sorted_Ln.gather(-1, at_L1) + sorted_Ln.gather(-1, at_L1 + 1)) / 2).squeeze(-1)


def accuracy_at(threshold_L: Tensor, positive_NL: Tensor, negative_ML: Tensor) -> Tensor:
    """Mean of the share of positives above and of negatives not above the threshold: float64 [L]."""
    return ((positive_NL > threshold_L).double().mean(0) + (negative_ML <= threshold_L).double().mean(0)) / 2


def accuracy_at_train_threshold(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
    """Accuracy on the test scores (positive [N, L], negative [M, L]) of the threshold that suits the train scores."""
    return accuracy_at(fit_threshold(*train), *test)


def energy_in_top(direction_LD: Tensor, *, features: int = 3) -> Tensor:
    """Share of the squared norm in a direction's few largest features: [L]. Near 1 it is all massive dimensions."""
    squares_LD = direction_LD.double().square()
    largest_LF = squares_LD.topk(min(features, squares_LD.shape[1]), dim=-1).values
    return largest_LF.sum(-1) / squares_LD.sum(-1)
