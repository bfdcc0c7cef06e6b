"""Intervals: equal to those of rows resampled one by one, and with their nominal coverage."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from extraction.vectors.bootstrap import RESAMPLED_METRICS, Resamples, estimate_metrics, resample_questions
from tests.planted import gaussian

SIZES = (4, 1, 3, 2, 5, 3, 4)  # rows of each question


def cluster_rows(*, natural: bool, columns: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Make scores with ties, labels and questions; the last question but one has one side unless `natural`."""
    questions = [f"q{index}" for index, size in enumerate(SIZES) for _ in range(size)]
    place = torch.tensor([int(name[1:]) for name in questions])
    positive_n = place % 2 == 0 if natural else (torch.arange(len(place)) % 2 == 0) | (place == 5)
    scores = gaussian(len(place), columns, seed=seed) + positive_n[:, None] + gaussian(7, columns, seed=seed + 1)[place]
    return (4 * scores).round() / 4 - 0.3, positive_n, questions


def naive(scores_n: np.ndarray, labels_n: np.ndarray, rows: list[int]) -> dict[str, float]:
    """Compute the metrics of some rows, each as often as it is listed."""
    scores, labels = scores_n[rows], labels_n[rows]
    above, below = scores[labels], scores[~labels]
    if min(len(above), len(below)) == 0:
        return {"auroc": np.nan, "accuracy": np.nan, "cohens_d": np.nan}
    freedom = len(scores) - 2
    pooled = np.sqrt(sum(((side - side.mean()) ** 2).sum() for side in (above, below)) / max(freedom, 1))
    return {
        "auroc": roc_auc_score(labels, scores),
        "accuracy": ((above > 0).mean() + (below <= 0).mean()) / 2,
        "cohens_d": (above.mean() - below.mean()) / pooled if pooled > 1e-12 and freedom > 0 else np.nan,
    }


@pytest.mark.parametrize("natural", [False, True])
def test_every_resample_has_the_metrics_of_its_rows(natural: bool):
    scores_nC, positive_n, questions = cluster_rows(natural=natural)
    resamples = resample_questions(positive_n, questions, count=60, seed=1)
    found = {name: figure(scores_nC, resamples) for name, figure in RESAMPLED_METRICS.items()}
    places = {q: [i for i, each in enumerate(questions) if each == q] for q in sorted(set(questions))}
    for b, counts in enumerate(resamples.counts_BQ.long().tolist()):
        rows = [i for q, count in zip(places, counts, strict=True) for _ in range(count) for i in places[q]]
        for column in range(3):
            twin = naive(scores_nC[:, column].numpy(), positive_n.numpy(), rows)
            for name, value in twin.items():
                assert found[name][b, column].item() == pytest.approx(value, abs=1e-9, nan_ok=True), (name, b)


def test_another_question_in_a_resample_changes_its_metrics():
    """The negative control: one question is drawn once more."""
    scores_nC, positive_n, questions = cluster_rows(natural=False)
    resamples = resample_questions(positive_n, questions, count=5, seed=1)
    other = replace(resamples, counts_BQ=resamples.counts_BQ + torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))
    for figure in RESAMPLED_METRICS.values():
        assert not torch.allclose(figure(scores_nC, resamples), figure(scores_nC, other), equal_nan=True)


def test_figures_are_those_of_the_rows_and_lie_within_the_percentiles_of_the_resamples():
    scores_nC, positive_n, questions = cluster_rows(natural=False)
    resamples = resample_questions(positive_n, questions, count=500, seed=0)
    found = estimate_metrics(scores_nC, resamples)
    for column in range(3):
        twin = naive(scores_nC[:, column].numpy(), positive_n.numpy(), list(range(len(questions))))
        for name, value in twin.items():
            assert found[name].value_C[column].item() == pytest.approx(value)
            each = RESAMPLED_METRICS[name](scores_nC, resamples)[:, column].numpy()
            low, high = np.nanpercentile(each, [2.5, 97.5])
            assert found[name].low_C[column].item() == pytest.approx(low)
            assert found[name].high_C[column].item() == pytest.approx(high)
            assert low <= value <= high


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    scores_nC, positive_n, questions = cluster_rows(natural=True)
    resamples = resample_questions(positive_n, questions, count=20, seed=0)
    whole = RESAMPLED_METRICS["auroc"](scores_nC, resamples)
    monkeypatch.setattr("extraction.vectors.bootstrap.CHUNK_NUMBERS", 1)
    assert torch.equal(whole.nan_to_num(), RESAMPLED_METRICS["auroc"](scores_nC, resamples).nan_to_num())


@pytest.mark.parametrize("natural", [False, True])
def test_a_question_brings_all_of_its_rows_and_sides_stay_apart_where_none_is_on_both(natural: bool):
    _, positive_n, questions = cluster_rows(natural=natural)
    counts_BQ = resample_questions(positive_n, questions, count=400, seed=0).counts_BQ
    assert (counts_BQ.sum(1) == 7).all()
    on_positive = torch.arange(7) % 2 == 0
    assert (counts_BQ[:, on_positive].sum(1) == 4).all() == natural
    torch.testing.assert_close(counts_BQ.mean(0), torch.ones(7).double(), atol=0.2, rtol=0)


def test_a_single_question_has_figures_and_no_interval():
    scores_nC = gaussian(6, 2, seed=0)
    for questions, positive in ((["a"] * 6, [1, 0] * 3), (["a"] * 3 + ["b", "c", "c"], [1, 1, 1, 0, 0, 0])):
        positive_n = torch.tensor(positive).bool()
        found = estimate_metrics(scores_nC, resample_questions(positive_n, questions, count=100, seed=0))
        for figure in found.values():
            assert figure.value_C.isfinite().all()
            assert figure.low_C.isnan().all()
            assert figure.high_C.isnan().all()


def test_rows_without_spread_have_no_effect_size_however_they_are_drawn():
    positive_n = torch.arange(20) % 2 == 0
    scores_nC = torch.where(positive_n, 0.1, -0.7)[:, None].double()
    found = estimate_metrics(scores_nC, resample_questions(positive_n, [i // 4 for i in range(20)], count=50, seed=0))
    assert found["cohens_d"].value_C.isnan().all()
    assert found["cohens_d"].low_C.isnan().all()
    assert found["auroc"].low_C.item() == 1.0


def test_auroc_compares_rows_of_a_stratum_only():
    """Two folds whose scores are shifted against each other: each separates, pooled they would not."""
    positive_n = torch.arange(40) % 2 == 0
    fold_n = torch.arange(40) // 20
    scores_nC = (positive_n.double() + 10 * fold_n + 0.1 * gaussian(40, seed=0))[:, None]
    pooled = resample_questions(positive_n, [i // 4 for i in range(40)], count=100, seed=0)
    apart = replace(pooled, stratum_n=fold_n)
    assert estimate_metrics(scores_nC, pooled)["auroc"].value_C.item() == pytest.approx(0.75)
    assert estimate_metrics(scores_nC, apart)["auroc"].value_C.item() == 1.0
    assert estimate_metrics(scores_nC, apart)["auroc"].low_C.item() == 1.0


def sample(seed: int, questions: int = 12) -> tuple[Tensor, Resamples, Resamples]:
    """Scores that hang together by question and side; 10 rows each; resampled by question, and by row."""
    place = torch.arange(questions * 10) // 10
    positive_n = torch.arange(len(place)) % 2 == 0
    own = gaussian(questions, 2, seed=2 * seed)[place, positive_n.long()]
    scores_nC = (positive_n.double() + 1.5 * own + 0.5 * gaussian(len(place), seed=2 * seed + 1))[:, None]
    by_row = list(range(len(place)))
    return scores_nC, *(resample_questions(positive_n, ids, count=300, seed=seed) for ids in (place.tolist(), by_row))  # type: ignore[return-value]


def test_the_interval_over_questions_covers_the_truth_and_one_over_rows_does_not():
    """100 samples of 12 questions. An interval over rows treats responses to one question as independent."""
    truth = NormalDist().cdf(1 / (2 * (1.5**2 + 0.5**2)) ** 0.5)
    covered = {"question": 0, "row": 0}
    for seed in range(100):
        scores_nC, *ways = sample(seed)
        for name, way in zip(covered, ways, strict=True):
            found = estimate_metrics(scores_nC, way)["auroc"]
            covered[name] += int(found.low_C.item() <= truth <= found.high_C.item())
    assert covered["question"] >= 85
    assert covered["row"] <= 75
