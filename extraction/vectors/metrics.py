"""Metrics of how well scores separate the two sides, for all columns at once.

Scores are projections of rows on directions, one column for each direction and layer.

Shapes: N positive rows, M negative rows, n rows of both, b rows of a chunk, C columns (layers, or methods x layers),
K directions a layer (methods or draws), L layers, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from extraction.vectors.chunked import row_chunks

NO_SPREAD = 1e-10  # relative to the largest score: a smaller standard deviation is rounding


def project(rows_nLD: Tensor, direction_KLD: Tensor) -> Tensor:
    """Project rows on the directions of their layer, in float64: [n, L, D], [K, L, D] -> scores [n, K, L]."""
    layers = zip(rows_nLD.split(1, 1), direction_KLD.unbind(1), strict=True)
    return torch.stack([_project_layer(rows_n1D, direction_KD.double()) for rows_n1D, direction_KD in layers], -1)


def _project_layer(rows_n1D: Tensor, direction_KD: Tensor) -> Tensor:
    chunks = (chunk_b1D[:, 0].double() for chunk_b1D in row_chunks(rows_n1D))
    return torch.cat([torch.einsum("nd,kd->nk", chunk_bD, direction_KD) for chunk_bD in chunks])


def auroc(positive_NC: Tensor, negative_MC: Tensor) -> Tensor:
    """Compute the probability that a positive row scores above a negative one: [N, C], [M, C] -> float64 [C].

    Ties count one half; NaN for an empty side. Exact: U / (N M). Source: Mann and Whitney 1947.
    """
    if len(positive_NC) == 0 or len(negative_MC) == 0:
        return torch.full(positive_NC.shape[1:], torch.nan, dtype=torch.float64)
    sorted_CM = negative_MC.mT.contiguous().sort(-1).values
    positive_CN = positive_NC.mT.contiguous()
    below_C = torch.searchsorted(sorted_CM, positive_CN).sum(-1)
    not_above_C = torch.searchsorted(sorted_CM, positive_CN, right=True).sum(-1)
    return (below_C + not_above_C).double() / (2 * len(positive_NC) * len(negative_MC))


def pooled_spread(positive_NC: Tensor, negative_MC: Tensor) -> Tensor:
    """Compute the pooled standard deviation within a side (n - 1 on each): [N, C], [M, C] -> float64 [C].

    0 where there is no spread but rounding, NaN for fewer than 3 rows.
    """
    sides = positive_NC.double(), negative_MC.double()
    squares_C = sum((side - side.mean(0)).square().sum(0) for side in sides)
    freedom = len(positive_NC) + len(negative_MC) - 2
    pooled_C = (squares_C / max(freedom, 1)) ** 0.5
    floor_C = NO_SPREAD * torch.cat(sides).abs().amax(0)
    pooled_C = torch.where(pooled_C > floor_C, pooled_C, 0.0)
    return pooled_C if freedom > 0 else torch.full_like(pooled_C, torch.nan)


def cohens_d(positive_NC: Tensor, negative_MC: Tensor) -> Tensor:
    """Divide the difference of the means by the pooled standard deviation: [N, C], [M, C] -> float64 [C].

    NaN where it is undefined: fewer than 3 rows, or no spread. Source: Cohen 1988, section 2.2.
    """
    gap_C = positive_NC.mean(0, dtype=torch.float64) - negative_MC.mean(0, dtype=torch.float64)
    pooled_C = pooled_spread(positive_NC, negative_MC)
    return torch.where(pooled_C > 0, gap_C / pooled_C, torch.nan)


def fit_threshold(positive_NC: Tensor, negative_MC: Tensor) -> Tensor:
    """Return the threshold [C] that separates the sides best, midway between two neighbouring scores.

    Scores above it are positive. Best by the mean of the two sides' accuracies; among equals, the one in the widest
    gap.
    """
    scores_Cn = torch.cat([positive_NC, negative_MC]).double().mT
    weight_n = torch.cat([torch.full((len(positive_NC),), -1.0 / len(positive_NC), dtype=torch.float64),
                          torch.full((len(negative_MC),), 1.0 / len(negative_MC), dtype=torch.float64)])  # fmt: skip
    sorted_Cn, order_Cn = scores_Cn.sort(-1)
    gain_Cn = weight_n[order_Cn].cumsum(-1)[:, :-1]  # share of negatives minus share of positives below a threshold
    gap_Cn = sorted_Cn.diff(dim=-1)
    gain_Cn = torch.where(gap_Cn > 0, gain_Cn, -torch.inf)
    best_Cn = gain_Cn >= gain_Cn.amax(-1, keepdim=True) - 1e-9
    at_C1 = torch.where(best_Cn, gap_Cn, -1).argmax(-1, keepdim=True)
    return ((sorted_Cn.gather(-1, at_C1) + sorted_Cn.gather(-1, at_C1 + 1)) / 2).squeeze(-1)


def accuracy_at(threshold_C: Tensor | float, positive_NC: Tensor, negative_MC: Tensor) -> Tensor:
    """Average the share of positives above and the share of negatives not above the threshold: float64 [C]."""
    return ((positive_NC > threshold_C).double().mean(0) + (negative_MC <= threshold_C).double().mean(0)) / 2


def wrong_side(scores_nC: Tensor, positive_n: Tensor) -> Tensor:
    """Compute the share of all rows on the wrong side of a threshold of 0: float64 [C]."""
    return ((scores_nC > 0) != positive_n.unsqueeze(-1)).double().mean(0)


def top_1_percent(direction_LD: Tensor) -> Tensor:
    """Compute the share of the squared norm in the largest 1% of a direction's dimensions, at least one: [L].

    Near 1 the direction consists of massive dimensions (Sun et al. 2024, arXiv 2402.17762).
    """
    squares_LD = direction_LD.double().square()
    largest_LF = squares_LD.topk(max(1, squares_LD.shape[1] // 100), dim=-1).values
    return largest_LF.sum(-1) / squares_LD.sum(-1)
