"""Held-out validation: figures against scikit-learn and scipy, and what comes out where there is nothing to find."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score
from torch import Tensor

from extraction.errors import ActivationError, ConfigError, TraitError
from extraction.records import Example
from extraction.vectors.figures import (
    accuracy_at,
    accuracy_at_train_threshold,
    auroc,
    cohens_d,
    energy_in_top,
    fit_threshold,
    project,
)
from extraction.vectors.methods import DEFAULT_METHODS, METHODS, mean_diff, probe
from extraction.vectors.splits import Parts, Rows, question_keys, split_by_question, split_in_three
from extraction.vectors.validation import Separation, Trial, best_layer, build_card, choose, held_out, separation


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trait_rows(
    questions: int = 20, instructions: int = 5, layers: int = 4, hidden: int = 24, effect: float = 1.0, seed: int = 0
) -> Rows:
    """An instructed trait: every question and instruction on both sides, a trait direction stronger at layer 2."""
    n = 2 * questions * instructions
    positive_n = torch.arange(n) < n // 2
    question_n = torch.arange(n) % questions
    strength_L1 = torch.tensor([0.1, 0.4, 1.0, 0.5])[:layers, None].double()
    sign_n11 = torch.where(positive_n, 1.0, -1.0).double()[:, None, None]
    by_question = gaussian(questions, layers, hidden, seed=seed)[question_n]
    noise = gaussian(n, layers, hidden, seed=seed + 1)
    way_LD = torch.nn.functional.normalize(gaussian(layers, hidden, seed=seed + 2), dim=-1)
    activations = by_question + noise + effect * sign_n11 * strength_L1 * way_LD
    return Rows(activations.float(), positive_n, tuple(question_n.tolist()))


def confounded_rows(questions: int = 40, rows_each: int = 5, hidden: int = 64, seed: int = 0) -> Rows:
    """No trait at all: each question lies on one side only, and its rows share nearly all of their activation."""
    question_n = torch.arange(questions * rows_each) % questions
    shared = gaussian(questions, 1, hidden, seed=seed)[question_n]
    activations = shared + 0.1 * gaussian(questions * rows_each, 1, hidden, seed=seed + 1)
    return Rows(activations, question_n % 2 == 0, tuple(question_n.tolist()))


# --- figures against oracles

few_values = st.integers(-3, 3).map(float)  # few values: many ties


@given(st.lists(few_values, min_size=1, max_size=12), st.lists(few_values, min_size=1, max_size=12))
def test_auroc_is_mann_whitneys_u_and_scikit_learns_area(above: list[float], below: list[float]):
    ours = auroc(torch.tensor(above)[:, None], torch.tensor(below)[:, None]).item()
    area = roc_auc_score([1] * len(above) + [0] * len(below), above + below)
    u = mannwhitneyu(above, below, method="asymptotic").statistic if len({*above, *below}) > 1 else None
    assert ours == pytest.approx(area, abs=1e-12)
    assert u is None or ours == pytest.approx(u / len(above) / len(below), abs=1e-12)
    counted = np.mean([[(a > b) + (a == b) / 2 for b in below] for a in above])
    assert ours == pytest.approx(counted, abs=1e-12)


def test_auroc_reads_every_layer_by_itself():
    above, below = gaussian(13, 6, seed=0) + 0.5, gaussian(17, 6, seed=1)
    for layer, area in enumerate(auroc(above, below).tolist()):
        labels = [1] * 13 + [0] * 17
        assert area == pytest.approx(roc_auc_score(labels, [*above[:, layer].tolist(), *below[:, layer].tolist()]))
    torch.testing.assert_close(auroc(below, above), 1 - auroc(above, below))


def test_auroc_of_an_empty_side_is_undefined():
    assert auroc(gaussian(3, 2, seed=0), torch.zeros(0, 2)).isnan().all()


def test_cohens_d_is_the_textbooks():
    above, below = gaussian(9, 5, seed=0) * 2 + 3, gaussian(14, 5, seed=1)
    a, b = above.numpy(), below.numpy()
    pooled = np.sqrt((8 * a.var(0, ddof=1) + 13 * b.var(0, ddof=1)) / 21)
    np.testing.assert_allclose(cohens_d(above, below).numpy(), (a.mean(0) - b.mean(0)) / pooled)


def test_cohens_d_is_undefined_without_spread_or_rows():
    assert cohens_d(torch.ones(4, 1), torch.zeros(4, 1)).isnan().all()
    assert cohens_d(torch.ones(1, 1), torch.zeros(1, 1)).isnan().all()
    assert cohens_d(torch.tensor([[1.0], [2.0]]), torch.zeros(1, 1)).isfinite().all()


@given(st.lists(few_values, min_size=1, max_size=10), st.lists(few_values, min_size=1, max_size=10))
def test_no_threshold_between_two_scores_does_better(above: list[float], below: list[float]):
    above_N1, below_M1 = torch.tensor(above)[:, None], torch.tensor(below)[:, None]
    ours = accuracy_at(fit_threshold(above_N1, below_M1), above_N1, below_M1).item()
    inner = [t + 0.5 for t in range(-3, 3) if min(above + below) < t + 0.5 < max(above + below)]
    assert all(ours >= accuracy_at(torch.tensor([t]), above_N1, below_M1).item() - 1e-9 for t in inner)


def test_of_equal_thresholds_the_one_in_the_widest_gap_is_taken():
    above, below = torch.tensor([[10.0], [11.0]]), torch.tensor([[0.0], [1.0]])
    assert fit_threshold(above, below).item() == 5.5


def test_the_threshold_comes_from_train_alone():
    train = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    moved = torch.tensor([[12.0], [13.0]]), torch.tensor([[10.0], [11.0]])
    assert accuracy_at_train_threshold(train, train).item() == 1.0
    assert accuracy_at_train_threshold(train, moved).item() == 0.5  # perfectly separable, but not at train's threshold


def test_accuracy_gives_both_sides_one_half():
    assert accuracy_at(torch.tensor([0.0]), torch.ones(99, 1), torch.ones(1, 1)).item() == 0.5


def test_projection_is_the_dot_product_in_float64():
    rows, way = gaussian(5, 3, 7, seed=0).bfloat16(), gaussian(3, 7, seed=1).float()
    assert project(rows, way).dtype == torch.float64
    torch.testing.assert_close(project(rows, way)[4, 2], rows[4, 2].double() @ way[2].double())


def test_energy_in_top_sees_massive_dimensions():
    flat, spiky = torch.ones(300), torch.ones(300).index_fill(0, torch.tensor([5, 9]), 1e3)
    share = energy_in_top(torch.stack([flat, spiky]))
    torch.testing.assert_close(share[0].item(), 3 / 300)
    assert share[1] > 0.99
    assert energy_in_top(torch.ones(1, 2)).item() == 1.0


# --- splits


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=4, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_every_question_is_on_exactly_one_side(rows: list[tuple[int, bool]], fraction: float, seed: int):
    questions = [question for question, _ in rows]
    if len(set(questions)) < 2:
        return
    train, test = split_by_question(questions, fraction=fraction, seed=seed)
    assert train
    assert test
    assert sorted(train + test) == sorted(set(questions))
    again = split_by_question(questions[::-1], fraction=fraction, seed=seed)
    assert again == (train, test)  # whatever the order of rows


def test_the_seed_decides_and_the_fraction_is_kept():
    questions = [k % 20 for k in range(200)]
    splits = {split_by_question(questions, seed=seed) for seed in range(20)}
    assert len(splits) > 15
    assert {len(test) for _, test in splits} == {5}


def test_natural_prompts_keep_both_sides_in_each_part():
    questions = [f"p{k}" for k in range(8)] + [f"n{k}" for k in range(4)]
    positive = [True] * 8 + [False] * 4
    for seed in range(30):
        train, test = split_by_question(questions, seed=seed, positive=positive)
        assert sum(name[0] == "p" for name in test) == 2
        assert sum(name[0] == "n" for name in test) == 1
        assert len(train) == 9


@pytest.mark.parametrize("positive", [None, [True, False, True, False]])
def test_one_question_cannot_be_split(positive: list[bool] | None):
    with pytest.raises(TraitError, match=r"1 questions: .*at least 2"):
        split_by_question([7, 7, 7, 7], seed=0, positive=positive)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_question([1, 2, 3], fraction=fraction, seed=0)


def test_duplicate_prompts_stay_together():
    example = Example("pos-n0000-r00", "x", "pos", 0, 0, 0, "Same text")
    twin = replace(example, id="pos-n0001-r00", question_id=1)
    other = replace(example, id="neg-n0000-r00", polarity="neg", question="Other text")
    keys = question_keys([example, twin, other])
    assert keys[0] == keys[1] != keys[2]


def test_three_parts_share_no_question_and_lose_no_row():
    rows = trait_rows()
    parts = split_in_three(rows, seed=0)
    questions = [set(part.question_ids) for part in (parts.fit, parts.validation, parts.test)]
    assert [len(part) for part in questions] == [10, 5, 5]
    assert set.union(*questions) == set(range(20))
    assert sum(len(part.positive_n) for part in (parts.fit, parts.validation, parts.test)) == 200


@pytest.mark.parametrize("questions", [1, 2])
def test_too_few_questions_for_three_parts_are_refused(questions: int):
    with pytest.raises(TraitError, match="add questions"):
        split_in_three(trait_rows(questions=questions), seed=0)


def test_a_side_with_no_rows_is_refused():
    rows = trait_rows()
    with pytest.raises(TraitError, match="0 negative rows"):
        split_in_three(replace(rows, positive_n=torch.ones(200, dtype=torch.bool)), seed=0)


# --- held out


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_a_planted_trait_is_read_on_unseen_questions(name: str):
    rows = trait_rows(effect=4.0)
    read = held_out(METHODS[name], rows.activations_nLD, rows.positive_n, rows.question_ids, seed=0)
    assert read.auroc_L[2] > 0.95
    assert read.accuracy_L[2] > 0.85
    assert read.cohens_d_L[2] > 2
    assert read.auroc_L.shape == (4,)


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_shuffled_labels_leave_nothing_to_read(name: str):
    """The negative control: 12 shuffles x 4 layers, whose mean has a standard error near 0.02."""
    rows = trait_rows(effect=4.0)
    areas = []
    for seed in range(12):
        labels = rows.shuffled(seed).positive_n
        areas.append(held_out(METHODS[name], rows.activations_nLD, labels, rows.question_ids, seed=seed).auroc_L)
    assert abs(torch.stack(areas).mean().item() - 0.5) < 0.08


def test_splitting_by_row_would_flatter_a_confound_and_we_do_not():
    """Two questions' rows differ, the trait does nothing: by question it reads as chance, by row as perfect."""
    by_question, by_row = [], []
    for seed in range(8):
        rows = confounded_rows(seed=10 * seed)
        by_question.append(held_out(probe, rows.activations_nLD, rows.positive_n, rows.question_ids, seed=seed).auroc_L)
        row_ids = list(range(len(rows.question_ids)))  # what a split by row amounts to
        by_row.append(held_out(probe, rows.activations_nLD, rows.positive_n, row_ids, seed=seed).auroc_L)
    assert torch.stack(by_row).min() > 0.95  # the leak
    assert abs(torch.stack(by_question).mean().item() - 0.5) < 0.15


def test_directions_see_no_test_row():
    """Test rows of another question may be anything: the direction that the method is asked for stays the same."""
    rows = trait_rows()
    train_questions, test_questions = split_by_question(rows.question_ids, seed=3, positive=rows.positive_n)
    seen = []

    def spy(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int) -> Tensor:
        seen.append(mean_diff(positive_NLD, negative_MLD, seed=seed))
        return seen[-1]

    in_test_n = torch.tensor([question in test_questions for question in rows.question_ids])
    poisoned = torch.where(in_test_n[:, None, None], 1e4, rows.activations_nLD)
    held_out(spy, rows.activations_nLD, rows.positive_n, rows.question_ids, seed=3)
    held_out(spy, poisoned, rows.positive_n, rows.question_ids, seed=3)
    assert torch.equal(seen[0], seen[1])
    train = rows.about(train_questions)
    assert torch.equal(seen[0], mean_diff(*train.sides, seed=3))


def test_held_out_needs_both_sides_in_test():
    activations = gaussian(6, 2, 5, seed=0)
    with pytest.raises(TraitError, match="test part has 2 positive and 0 negative"):
        held_out(mean_diff, activations, [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 2, 3], seed=0)


# --- choice


def separations(aurocs: list[float], effects: list[float]) -> Separation:
    area = torch.tensor(aurocs, dtype=torch.float64)
    return Separation(area, torch.tensor(effects, dtype=torch.float64), area)


def test_the_best_layer_is_by_auroc_then_effect_then_depth():
    assert best_layer(separations([0.5, 0.9, 0.8], [9, 1, 9])) == 1
    assert best_layer(separations([1.0, 1.0, 1.0], [1, 3, 2])) == 1
    assert best_layer(separations([1.0, 1.0], [2, 2])) == 0
    assert best_layer(separations([1.0, 1.0], [float("nan"), 2])) == 1
    assert best_layer(separations([1.0, 1.0], [float("nan")] * 2)) == 0


def test_the_choice_reads_validation_and_never_test():
    nothing = separations([0.5, 0.5], [0, 0])
    way = torch.ones(2, 3)
    good = Trial(way, nothing, validation=separations([0.6, 0.8], [1, 1]), test=separations([0.1, 0.1], [0, 0]))
    lucky = Trial(way, nothing, validation=separations([0.7, 0.6], [1, 1]), test=separations([1.0, 1.0], [9, 9]))
    assert choose({"lucky": lucky, "good": good}) == ("good", 1)


# --- the card


@pytest.fixture(scope="module")
def card() -> dict:
    rows = trait_rows(effect=3.0)
    return build_card(rows.activations_nLD, rows.positive_n, rows.question_ids, layers=[3, 5, 7, 9], seed=0, placebos=4)


def test_the_card_is_plain_json_without_nan(card: dict):
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def test_the_card_chooses_the_layer_where_the_trait_is(card: dict):
    assert card["chosen"]["layer"] == 7
    assert card["chosen"]["test"]["auroc"] > 0.9
    assert card["chosen"]["method"] in DEFAULT_METHODS
    assert card["layers"] == [3, 5, 7, 9]
    assert "from 0" in card["layer_convention"]
    assert card["split"]["test"] == {"questions": 5, "positive": 25, "negative": 25}


def test_the_card_keeps_the_test_figures_of_other_layers_to_itself(card: dict):
    method = card["methods"]["mean_diff"]
    assert set(method["per_layer"]) == {"norm", "energy_in_top_3", "fit", "validation"}
    assert len(method["per_layer"]["validation"]["auroc"]) == 4
    assert set(method["test"]) == {"auroc", "cohens_d", "accuracy"}


def test_the_chosen_figures_are_those_of_its_method(card: dict):
    method = card["methods"][card["chosen"]["method"]]
    for part in ("layer", "fit", "validation", "test"):
        assert card["chosen"][part] == method[part]


def test_the_controls_find_nothing(card: dict):
    placebo = [control["test"]["auroc"] for control in card["controls"]["shuffled_labels"]]
    assert len(placebo) == 4
    assert abs(sum(placebo) / 4 - 0.5) < 0.2
    assert max(placebo) < card["chosen"]["test"]["auroc"]
    assert card["controls"]["random"]["test"]["auroc"] < card["chosen"]["test"]["auroc"]


def test_the_card_is_the_same_twice_and_in_any_order_of_rows():
    rows = trait_rows(questions=8, instructions=2)
    asked = {"layers": range(4), "seed": 1, "methods": ["mean_diff", "random"], "placebos": 0}
    first = build_card(rows.activations_nLD, rows.positive_n, rows.question_ids, **asked)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    mixed = rows.activations_nLD[order], rows.positive_n[order], [rows.question_ids[k] for k in order.tolist()]
    assert build_card(*mixed, **asked)["chosen"]["test"] == pytest.approx(first["chosen"]["test"])
    assert build_card(rows.activations_nLD, rows.positive_n, rows.question_ids, **asked) == first
    assert first["chosen"]["method"] == "mean_diff"  # the control is never chosen


def test_undefined_figures_are_none():
    """Rows without any spread within a side."""
    activations = torch.zeros(12, 1, 4)
    activations[:6, :, 0] = 1
    card = build_card(
        activations, [True] * 6 + [False] * 6, [k % 6 for k in range(12)], layers=[0], seed=0, methods=["mean_diff"],
        placebos=0,
    )  # fmt: skip
    assert card["chosen"]["test"] == {"auroc": 1.0, "cohens_d": None, "accuracy": 1.0}
    json.dumps(card, allow_nan=False)


def test_the_card_names_the_layer_and_example_of_a_nan():
    rows = trait_rows(questions=4, instructions=1)
    ids = [f"row-{k}" for k in range(8)]
    activations = rows.activations_nLD.clone()
    activations[6, 2, 0] = torch.nan
    with pytest.raises(ActivationError, match="layer 12, example row-6"):
        build_card(activations, rows.positive_n, rows.question_ids, layers=[10, 11, 12, 13], seed=0, example_ids=ids)


def test_a_card_of_mismatched_rows_is_our_own_bug():
    rows = trait_rows(questions=4)
    with pytest.raises(ValueError, match="3 layer numbers"):
        build_card(rows.activations_nLD, rows.positive_n, rows.question_ids, layers=[0, 1, 2], seed=0)


def test_separation_reads_what_it_is_given():
    rows = trait_rows(effect=3.0)
    parts = split_in_three(rows, seed=0)
    assert isinstance(parts, Parts)
    way = mean_diff(*parts.fit.sides, seed=0)
    read = separation(way, parts.fit, parts.test)
    scores = torch.einsum("nld,ld->nl", parts.test.activations_nLD.double(), way.double())
    area = roc_auc_score(parts.test.positive_n.numpy(), scores[:, 2].numpy())
    assert read.auroc_L[2].item() == pytest.approx(area)


def test_separation_takes_its_threshold_from_train():
    rows = trait_rows(effect=8.0)
    parts = split_in_three(rows, seed=0)
    way = mean_diff(*parts.fit.sides, seed=0)
    moved = replace(parts.test, activations_nLD=parts.test.activations_nLD + 100 * way / way.norm(dim=-1, keepdim=True))
    assert separation(way, parts.fit, parts.test).accuracy_L[2] > 0.95
    assert separation(way, parts.fit, moved).accuracy_L[2] == 0.5  # all of it lies above train's threshold
    assert separation(way, parts.fit, moved).auroc_L[2] > 0.95


def test_the_card_does_not_choose_by_test():
    """Layer 1 is good everywhere but in the test part, layer 0 in fit and test only: the card says 1, and owns up."""
    rows = trait_rows(layers=2, effect=0.0)
    parts = split_in_three(rows, seed=0)
    sign_n = torch.where(rows.positive_n, 4.0, -4.0)
    in_test_n, in_validation_n = (
        torch.tensor([question in part.question_ids for question in rows.question_ids])
        for part in (parts.test, parts.validation)
    )
    activations = rows.activations_nLD.clone()
    activations[:, 0, 0] += sign_n * ~in_validation_n
    activations[:, 1, 0] += sign_n * ~in_test_n
    card = build_card(activations, rows.positive_n, rows.question_ids, layers=[0, 1], seed=0, placebos=0)
    assert card["chosen"]["layer"] == 1
    assert card["chosen"]["validation"]["auroc"] > 0.95
    assert card["chosen"]["test"]["auroc"] < 0.8
