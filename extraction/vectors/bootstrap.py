"""Bootstrap intervals of the metrics, over questions.

Shapes: N positive rows, M negative rows, n rows of both, Q questions (P of them with positive rows, R with negative
ones), C columns, B resamples, S strata (or the questions of a group), G distinct scores, s rows of a stratum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from extraction.vectors.metrics import NO_SPREAD, accuracy_at, cohens_d

INTERVAL = (0.025, 0.975)
MAX_UNDEFINED_SHARE = 0.5  # of the resamples may lack the metric (no side, or no spread); with more, no interval
CHUNK_NUMBERS = 2**20
MAX_PAIRS_PER_ROW = 32  # pairs of questions: above it, summing along sorted rows is faster than a matrix of pairs


@dataclass(frozen=True)
class Estimate:
    """A metric [C] with the bounds [C] of its 95% interval; NaN where undefined."""

    value_C: Tensor
    low_C: Tensor
    high_C: Tensor


@dataclass(frozen=True)
class Resamples:
    """Counts of each question in each resample [B, Q], and each row's label, question and stratum [n].

    B is 0 where no interval can be computed. AUROC compares rows of the same stratum only.
    """

    counts_BQ: Tensor
    positive_n: Tensor
    question_n: Tensor
    stratum_n: Tensor

    def original(self) -> Resamples:
        """Return a single resample that has each question once."""
        return replace(self, counts_BQ=torch.ones(1, self.counts_BQ.shape[1], dtype=torch.float64))

    def sum_side(self, values_nC: Tensor, side: bool) -> Tensor:
        """Sum values over the rows of one side in every resample: [n, C] -> [B, C]."""
        here_n = self.positive_n == side
        by_question_QC = torch.zeros(self.counts_BQ.shape[1], values_nC.shape[1], dtype=torch.float64)
        by_question_QC.index_add_(0, self.question_n[here_n], values_nC[here_n].double())
        return self.counts_BQ @ by_question_QC


def resample_questions(positive_n: Tensor, question_ids: Sequence[Any], *, count: int, seed: int) -> Resamples:
    """Draw questions with replacement, `count` times; each question brings all of its rows.

    Rows about one question resemble one another, so the question is the unit (cluster bootstrap: Davison and Hinkley
    1997, section 3.8; Efron and Tibshirani 1993, chapter 8). Where no question has rows on both sides (natural
    prompts), the sides are drawn separately. With a single question to draw from there are no resamples.
    """
    questions = sorted(set(question_ids))
    index_of = {question: index for index, question in enumerate(questions)}
    question_n = torch.tensor([index_of[question] for question in question_ids])
    groups = _resampling_groups(positive_n, question_n, len(questions))
    if min(map(len, groups)) < 2:
        count = 0
    counts_BQ = torch.zeros(count, len(questions), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for group_S in groups:
        drawn_BS = group_S[torch.randint(len(group_S), (count, len(group_S)), generator=generator)]
        counts_BQ.scatter_add_(1, drawn_BS, torch.ones_like(drawn_BS, dtype=torch.float64))
    return Resamples(counts_BQ, positive_n, question_n, torch.zeros_like(question_n))


def _resampling_groups(positive_n: Tensor, question_n: Tensor, n_questions: int) -> list[Tensor]:
    """Return the groups of questions [S] that are drawn separately: all, or one group a side."""
    on_positive_Q, on_negative_Q = (
        torch.zeros(n_questions, dtype=torch.bool).index_fill(0, question_n[positive_n == side], True)
        for side in (True, False)
    )
    if (on_positive_Q & on_negative_Q).any():
        return [torch.arange(n_questions)]
    return [on_positive_Q.nonzero().flatten(), on_negative_Q.nonzero().flatten()]


def estimate_metrics(scores_nC: Tensor, resamples: Resamples) -> dict[str, Estimate]:
    """Compute AUROC, accuracy at a threshold of 0 and Cohen's d of every column, with 95% percentile intervals.

    Equal to the metrics of the resampled rows, without building them: AUROC from the wins between the rows of two
    questions, the others from sums over each question's rows. Percentile interval: Efron and Tibshirani 1993, section
    13.3; resamples where a metric is undefined (one side missing, or no spread) are left out.
    """
    sides = scores_nC[resamples.positive_n], scores_nC[~resamples.positive_n]
    original = resamples.original()
    values = {
        "auroc": resampled_auroc(scores_nC, original)[0],
        "accuracy": accuracy_at(0.0, *sides),
        "cohens_d": cohens_d(*sides),
    }
    return {
        name: Estimate(values[name], *_percentile_interval(RESAMPLED_METRICS[name](scores_nC, resamples)))
        for name in values
    }


def _percentile_interval(metrics_BC: Tensor) -> tuple[Tensor, Tensor]:
    if len(metrics_BC) == 0:
        undefined_C = torch.full(metrics_BC.shape[1:], torch.nan, dtype=torch.float64)
        return undefined_C, undefined_C
    low_C, high_C = torch.nanquantile(metrics_BC, torch.tensor(INTERVAL, dtype=torch.float64), dim=0)
    mostly_undefined_C = metrics_BC.isnan().double().mean(0) > MAX_UNDEFINED_SHARE
    return torch.where(mostly_undefined_C, torch.nan, low_C), torch.where(mostly_undefined_C, torch.nan, high_C)


def resampled_auroc(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Compute the AUROC of every resample, wins of positive rows (ties one half) over pairs: [n, C] -> [B, C].

    Sums of whole numbers and halves are exact, so the order of addition does not matter. A matrix of wins between
    questions is used for few questions, sorted rows for many (natural prompts).
    """
    drawn_BP, drawn_BR = (_question_counts(resamples, side)[0] for side in (True, False))
    many = drawn_BP.shape[1] * drawn_BR.shape[1] > MAX_PAIRS_PER_ROW * len(scores_nC)
    wins_BC = (_wins_by_rank if many else _wins_by_question)(scores_nC, resamples)
    return wins_BC / _nan_where_zero(_count_pairs(resamples))


def _count_pairs(resamples: Resamples) -> Tensor:
    """Count the pairs of a positive and a negative row of the same stratum in each resample: [B, 1]."""
    stratum_nS = torch.nn.functional.one_hot(resamples.stratum_n).double()
    pairs_BS = resamples.sum_side(stratum_nS, True) * resamples.sum_side(stratum_nS, False)
    return pairs_BS.sum(1, keepdim=True)


def _question_counts(resamples: Resamples, side: bool) -> tuple[Tensor, Tensor]:
    """Return the counts [B, P] of the questions that have rows on a side, and each row's index into them [N]."""
    questions_P, question_N = resamples.question_n[resamples.positive_n == side].unique(return_inverse=True)
    return resamples.counts_BQ[:, questions_P], question_N


def _wins_by_question(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Compute c W c, [B, C]: W [P, R] are the wins between two questions' rows, c the counts of the questions."""
    (drawn_BP, question_N), (drawn_BR, question_M) = (_question_counts(resamples, side) for side in (True, False))
    shape_PR = (drawn_BP.shape[1], drawn_BR.shape[1])
    step = max(1, CHUNK_NUMBERS // max(1, drawn_BR.numel(), shape_PR[0] * shape_PR[1]))
    columns = []
    for chunk in torch.arange(scores_nC.shape[1]).split(step):
        wins_CPR = torch.zeros(len(chunk), *shape_PR, dtype=torch.float64)
        _add_wins(wins_CPR, scores_nC[:, chunk], resamples, question_N, question_M)
        columns.append(torch.einsum("cbr,br->bc", drawn_BP @ wins_CPR, drawn_BR))
    return torch.cat(columns, -1)


def _add_wins(
    wins_CPR: Tensor, scores_nC: Tensor, resamples: Resamples, question_N: Tensor, question_M: Tensor
) -> None:
    """Add each positive row's wins over each question's negative rows: n R binary searches instead of N M pairs."""
    stratum_N, stratum_M = (resamples.stratum_n[resamples.positive_n == side] for side in (True, False))
    positive_CN, negative_CM = scores_nC[resamples.positive_n].mT, scores_nC[~resamples.positive_n].mT
    for stratum in stratum_N.unique():
        here_N, here_M = stratum_N == stratum, stratum_M == stratum
        above_CS = positive_CN[:, here_N].contiguous()
        for question in question_M[here_M].unique():
            below_Cm = negative_CM[:, here_M & (question_M == question)].contiguous().sort(-1).values
            twice_CS = torch.searchsorted(below_Cm, above_CS) + torch.searchsorted(below_Cm, above_CS, right=True)
            wins_CPR[..., question].index_add_(1, question_N[here_N], twice_CS.double() / 2)


def _wins_by_rank(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Count the negative rows below each positive row along the sorted scores: [B, C].

    B n steps a column, however many questions there are.
    """
    wins_BC = torch.zeros(len(resamples.counts_BQ), scores_nC.shape[1], dtype=torch.float64)
    for stratum in resamples.stratum_n.unique():
        here_n = resamples.stratum_n == stratum
        question_s, positive_s = resamples.question_n[here_n], resamples.positive_n[here_n]
        for column, scores_s in enumerate(scores_nC[here_n].unbind(-1)):
            ranks_G, rank_s = scores_s.unique(return_inverse=True)
            step, start = max(1, CHUNK_NUMBERS // len(scores_s)), 0
            for counts_bQ in resamples.counts_BQ.split(step):
                counts_bs = counts_bQ[:, question_s]
                drawn_bG = torch.zeros(len(counts_bs), len(ranks_G), dtype=torch.float64)
                drawn_bG.index_add_(1, rank_s[~positive_s], counts_bs[:, ~positive_s])
                below_bG = drawn_bG.cumsum(1) - drawn_bG / 2
                won_b = (below_bG[:, rank_s[positive_s]] * counts_bs[:, positive_s]).sum(1)
                wins_BC[start : start + len(won_b), column] += won_b
                start += len(won_b)
    return wins_BC


def resampled_accuracy(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Compute the mean of the sides' shares on the right side of 0 in every resample: [n, C] -> [B, C]."""
    one_n1 = torch.ones(len(scores_nC), 1, dtype=torch.float64)
    above_nC = (scores_nC > 0).double()
    right = [
        resamples.sum_side(right_nC, side) / _nan_where_zero(resamples.sum_side(one_n1, side))
        for side, right_nC in ((True, above_nC), (False, 1 - above_nC))
    ]
    return (right[0] + right[1]) / 2


def resampled_cohens_d(scores_nC: Tensor, resamples: Resamples) -> Tensor:
    """Compute Cohen's d of every resample from each question's count, sum and sum of squares: [n, C] -> [B, C].

    Sums are taken around the side's mean, which keeps the squares small.
    """
    one_n1 = torch.ones(len(scores_nC), 1, dtype=torch.float64)
    n_B = len(resamples.counts_BQ)
    means, squares_BC, freedom_B1 = [], torch.zeros(n_B, scores_nC.shape[1]).double(), torch.full((n_B, 1), -2.0)
    for side in (True, False):
        centre_C = scores_nC[resamples.positive_n == side].double().mean(0)
        off_nC = scores_nC.double() - centre_C
        n_B1 = _nan_where_zero(resamples.sum_side(one_n1, side))
        off_BC = resamples.sum_side(off_nC, side)
        means.append(centre_C + off_BC / n_B1)
        squares_BC = squares_BC + resamples.sum_side(off_nC.square(), side) - off_BC.square() / n_B1
        freedom_B1 = freedom_B1 + n_B1
    pooled_BC = (squares_BC.clamp(min=0) / freedom_B1) ** 0.5
    floor_C = NO_SPREAD**0.5 * scores_nC.abs().amax(0)  # sums of squares round more coarsely than squares of sums
    return torch.where((pooled_BC > floor_C) & (freedom_B1 > 0), (means[0] - means[1]) / pooled_BC, torch.nan)


def _nan_where_zero(count_B1: Tensor) -> Tensor:
    return torch.where(count_B1 > 0, count_B1, torch.nan)


RESAMPLED_METRICS: dict[str, Callable[[Tensor, Resamples], Tensor]] = {
    "auroc": resampled_auroc,
    "accuracy": resampled_accuracy,
    "cohens_d": resampled_cohens_d,
}
