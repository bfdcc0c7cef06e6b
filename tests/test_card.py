"""The card: metrics against scikit-learn and scipy, splits, held-out scores, choices, controls and planted leaks."""

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

from extraction.core.errors import ActivationError, TraitError
from extraction.vectors.card import build_card, choose_method
from extraction.vectors.chunked import LayerBlock
from extraction.vectors.controls import (
    choose_best,
    choose_for_shuffled_labels,
    half_direction_cosines,
    shuffled_label_scores,
    split_half_cosine,
)
from extraction.vectors.held_out import fit_scorer, fit_with_methods, held_out_scores
from extraction.vectors.method_table import DEFAULT_METHODS
from extraction.vectors.methods import FUNCTIONS, mean_diff
from extraction.vectors.metrics import (
    accuracy_at,
    auroc,
    cohens_d,
    fit_threshold,
    project,
    top_1_percent,
    wrong_side,
)
from extraction.vectors.splits import (
    Fold,
    LabelledRows,
    apportion,
    check_no_leak,
    deal_questions,
    shuffled_labels,
    split_halves,
    split_rows,
)
from tests.planted import gaussian, memorised_instructions, natural_rows, trait_rows


def card_of(rows: LabelledRows, **asked: object) -> dict:
    """Build a card of rows with two methods, one shuffle of the labels and 200 resamples, unless given."""
    settings = {"layers": range(rows.activations_nLD.shape[1]), "seed": 0, "methods": ["mean_diff", "gradient"],
                "label_shuffles": 1, "bootstraps": 200, "instruction_ids": rows.instruction_ids}  # fmt: skip
    return build_card(
        rows.activations_nLD, rows.positive_n, rows.question_ids, **{**settings, **asked}
    )  # fmt: skip


def all_layers(rows: LabelledRows) -> LayerBlock:
    """Return one block of all layers."""
    n_layers = rows.activations_nLD.shape[1]
    return LayerBlock(0, n_layers, n_layers)


# --- metrics against scikit-learn and scipy

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


def test_cohens_d_equals_numpys():
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


def test_accuracy_gives_both_sides_one_half():
    assert accuracy_at(torch.tensor([0.0]), torch.ones(99, 1), torch.ones(1, 1)).item() == 0.5


def test_projection_is_the_dot_product_in_float64():
    rows, way = gaussian(5, 3, 7, seed=0).bfloat16(), gaussian(2, 3, 7, seed=1).float()
    assert project(rows, way).dtype == torch.float64
    torch.testing.assert_close(project(rows, way)[4, 1, 2], rows[4, 2].double() @ way[1, 2].double())


def test_top_1_percent_sees_massive_dimensions():
    flat, spiky = torch.ones(300), torch.ones(300).index_fill(0, torch.tensor([5, 9]), 1e3)
    share = top_1_percent(torch.stack([flat, spiky]))
    assert share[0].item() == pytest.approx(3 / 300)
    assert share[1] > 0.99
    assert top_1_percent(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(16 / 25)  # at least one dimension


def test_rows_on_the_wrong_side_of_zero_are_counted_row_by_row():
    scores, positive = torch.tensor([[1.0], [-1.0], [0.0], [-2.0]]), torch.tensor([True, True, True, False])
    assert wrong_side(scores, positive).item() == 0.5
    assert wrong_side(-scores, positive).item() == 0.75


# --- splits


@given(st.integers(0, 200), st.sampled_from([(40, 20, 40), (50, 50), (10, 80, 10), (100,)]))
def test_apportion_adds_up_and_is_off_by_less_than_one(count: int, shares: tuple[int, ...]):
    parts = apportion(count, shares)
    assert sum(parts) == count
    assert all(abs(part - share * count / 100) < 1 for part, share in zip(parts, shares, strict=True))


def test_every_part_has_a_question_from_three_on():
    assert [apportion(count, (40, 20, 40)) for count in (3, 4, 5, 12, 20)] == [
        [1, 1, 1], [2, 1, 1], [2, 1, 2], [5, 2, 5], [8, 4, 8],
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=60), st.integers(0, 99))
def test_every_question_is_in_one_part_for_any_order_of_rows(rows: list[tuple[int, bool]], seed: int):
    questions, labels = [question for question, _ in rows], torch.tensor([label for _, label in rows])
    dealt = deal_questions(questions, labels, (40, 20, 40), seed=seed)
    assert sorted(question for part in dealt for question in part) == sorted(set(questions))
    assert deal_questions(questions[::-1], labels.flip(0), (40, 20, 40), seed=seed) == dealt


def test_the_seed_decides_the_split():
    rows = trait_rows()
    splits = {tuple(split_rows(rows, seed=seed).part_n["test"].tolist()) for seed in range(20)}
    assert len(splits) > 15


def test_natural_prompts_keep_both_sides_in_each_part():
    questions = [f"p{k}" for k in range(10)] + [f"n{k}" for k in range(5)]
    positive = torch.tensor([True] * 10 + [False] * 5)
    for seed in range(30):
        parts = deal_questions(questions, positive, (40, 20, 40), seed=seed)
        assert [sum(name[0] == "p" for name in part) for part in parts] == [4, 2, 4]
        assert [sum(name[0] == "n" for name in part) for part in parts] == [2, 1, 2]


@pytest.mark.parametrize("instructions", [1, 2, 5, 12])
def test_every_row_outside_the_fit_part_is_held_once_by_a_fold_that_saw_neither_question_nor_instruction(instructions):
    rows = trait_rows(instructions=instructions)
    split = split_rows(rows, seed=3)
    assert len(split.folds) == min(5, instructions)
    held = torch.stack([fold.held_n for fold in split.folds]).sum(0)
    assert torch.equal(held == 1, ~split.part_n["fit"])
    assert torch.equal(sum(part.int() for part in split.part_n.values()), torch.ones_like(held).int())
    for fold in split.folds:
        seen, unseen = rows.select(fold.fit_n), rows.select(fold.held_n)
        assert set(seen.question_ids).isdisjoint(unseen.question_ids)
        assert set(seen.instruction_ids).isdisjoint(unseen.instruction_ids) or instructions == 1
    assert {len(set(rows.select(part).question_ids)) for part in split.part_n.values()} == {8, 4}


def test_a_leak_is_refused():
    """A fold with one test row among the fitted ones, by question and by instruction."""
    rows = trait_rows(questions=6, instructions=2)
    fold = split_rows(rows, seed=0).folds[0]
    check_no_leak(rows, fold, instructions=True)
    of_question = fold.held_n.nonzero()[0]
    with pytest.raises(AssertionError, match="1 questions"):
        check_no_leak(rows, Fold(fold.fit_n.index_fill(0, of_question, True), fold.held_n), instructions=False)
    questions = {rows.question_ids[i] for i in fold.fit_n.nonzero().flatten().tolist()}
    of_instruction = [i for i, question in enumerate(rows.question_ids) if question in questions and not fold.fit_n[i]]
    with pytest.raises(AssertionError, match="1 instructions"):
        check_no_leak(
            rows, Fold(fold.fit_n.index_fill(0, torch.tensor(of_instruction[:1]), True), fold.held_n), instructions=True
        )


def test_too_few_rows_to_leave_an_instruction_out_hold_out_questions_only():
    rows = trait_rows(questions=4, instructions=2)
    thin_n = torch.tensor([instruction == 0 or i % 8 == 0 for i, instruction in enumerate(rows.instruction_ids)])
    card = card_of(rows.select(thin_n), label_shuffles=0)
    assert card["split"]["instruction_folds"] == 1


@pytest.mark.parametrize("questions", [1, 2])
def test_too_few_questions_for_three_parts_are_refused(questions: int):
    with pytest.raises(TraitError, match=" 0 positive"):
        split_rows(trait_rows(questions=questions), seed=0)


def test_a_side_with_no_rows_is_refused():
    rows = trait_rows()
    with pytest.raises(TraitError, match=" 0 negative"):
        split_rows(rows.with_labels(torch.ones(200, dtype=torch.bool)), seed=0)


def test_halves_share_no_question():
    for rows in (trait_rows(), natural_rows()):
        first, second = split_halves(rows, seed=1)
        assert set(first.question_ids).isdisjoint(second.question_ids)
        assert len(first.question_ids) + len(second.question_ids) == len(rows.question_ids)
        assert min(first.counts + second.counts) > 10


def test_shuffled_labels_stay_in_their_question_and_part():
    rows = trait_rows()
    split = split_rows(rows, seed=0)
    shuffled_n = shuffled_labels(rows, split, seed=0)
    for question in range(20):
        own_n = torch.tensor([each == question for each in rows.question_ids])
        assert shuffled_n[own_n].sum() == rows.positive_n[own_n].sum()
    assert 0.3 < (shuffled_n == rows.positive_n).double().mean() < 0.7
    natural = natural_rows()
    split = split_rows(natural, seed=0)
    shuffled_n = shuffled_labels(natural, split, seed=0)
    assert 0.2 < (shuffled_n == natural.positive_n).double().mean() < 0.8
    for part_n in split.part_n.values():
        assert shuffled_n[part_n].sum() == natural.positive_n[part_n].sum()
    assert all(
        len({bool(label) for label, each in zip(shuffled_n, natural.question_ids, strict=True) if each == question})
        == 1
        for question in range(30)
    )


# --- held-out scores


def test_scores_are_standardised_by_the_fitted_rows_alone():
    rows = trait_rows(effect=3.0)
    scorer = fit_scorer(rows, fit_with_methods(["mean_diff"], seed=0))
    scores = scorer.score(rows.activations_nLD)[:, 0]
    above, below = scores[rows.positive_n], scores[~rows.positive_n]
    raw = project(rows.activations_nLD, scorer.direction_KLD)[:, 0]
    pooled = np.sqrt((raw[rows.positive_n].numpy().var(0, ddof=1) + raw[~rows.positive_n].numpy().var(0, ddof=1)) / 2)
    np.testing.assert_allclose(scorer.spread_KL[0].numpy(), pooled)
    torch.testing.assert_close(fit_threshold(above, below), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(cohens_d(above, below), above.mean(0) - below.mean(0))


def test_every_row_is_scored_by_the_direction_of_its_fold():
    """Each fold by hand: directions of the other instructions' fit rows, read on this one's rows."""
    rows = trait_rows(effect=2.0)
    split = split_rows(rows, seed=1)
    (scores_nKL,) = held_out_scores(rows, split, fit_with_methods(["mean_diff"], seed=0))
    assert torch.equal(scores_nKL.isnan().all((1, 2)), split.part_n["fit"])
    for fold in split.folds:
        fitted = rows.select(fold.fit_n)
        way = mean_diff(*fitted.sides, seed=0).double()
        train = [torch.einsum("nld,ld->nl", side.double(), way) for side in fitted.sides]
        spread = (sum((side - side.mean(0)).square().sum(0) for side in train) / (len(fitted.positive_n) - 2)).sqrt()
        raw = torch.einsum("nld,ld->nl", rows.activations_nLD[fold.held_n].double(), way)
        torch.testing.assert_close(scores_nKL[fold.held_n, 0], (raw - fit_threshold(*train)) / spread)


def test_directions_see_no_held_out_row():
    """Rows of another question may be anything: directions, thresholds and units stay what they are."""
    rows = trait_rows()
    split = split_rows(rows, seed=3)
    poisoned = torch.where(split.part_n["test"][:, None, None], 1e4 + rows.activations_nLD, rows.activations_nLD)
    for fold in split.folds:
        clean, other = (
            fit_scorer(
                replace(rows, activations_nLD=each).select(fold.fit_n), fit_with_methods(["mean_diff", "probe"], seed=0)
            )
            for each in (rows.activations_nLD, poisoned)
        )
        assert all(torch.equal(a, b) for a, b in zip(vars(clean).values(), vars(other).values(), strict=True))
    validation_n = split.part_n["validation"]
    scores = [
        held_out_scores(replace(rows, activations_nLD=each), split, fit_with_methods(["mean_diff"], seed=0))[0][
            validation_n
        ]
        for each in (rows.activations_nLD, poisoned)
    ]
    assert torch.equal(*scores)


def test_the_threshold_comes_from_the_fitted_rows():
    rows = trait_rows(effect=8.0)
    moved = rows.activations_nLD + 100 * mean_diff(*rows.sides, seed=0)
    card = card_of(rows, without_instruction_nLD=moved, methods=["mean_diff"])
    assert card["chosen"]["test"]["accuracy"]["value"] > 0.95
    assert card["chosen"]["stripped"]["accuracy"]["value"] == 0.5  # separable, but all of it above the threshold
    assert card["chosen"]["stripped"]["auroc"]["value"] > 0.95


# --- choice


def test_the_best_layer_is_by_auroc_then_effect_then_depth():
    def at(areas: list[float], effects: list[float]) -> tuple[int, int]:
        return choose_best(torch.tensor([areas]), torch.tensor([effects]))

    assert at([0.5, 0.9, 0.8], [9, 1, 9]) == (0, 1)
    assert at([1.0, 1.0, 1.0], [1, 3, 2]) == (0, 1)
    assert at([1.0, 1.0], [2, 2]) == (0, 0)
    assert at([1.0, 1.0], [float("nan"), 2]) == (0, 1)
    assert at([1.0, 1.0], [float("nan")] * 2) == (0, 0)
    assert choose_best(torch.tensor([[0.7, 0.6], [0.6, 0.8]]), torch.zeros(2, 2)) == (1, 1)


def figures_of(area: float | None, effect: float | None, around: float | None = None) -> dict:
    ends = (None, None) if effect is None or around is None else (effect - around, effect + around)
    return {"auroc": {"value": area}, "cohens_d": {"value": effect, "low": ends[0], "high": ends[1]}}


def test_of_methods_that_validation_cannot_tell_apart_the_first_is_taken():
    assert choose_method([figures_of(0.9, 9, 1), figures_of(0.95, 1, 1), figures_of(0.93, 5, 1)]) == 1
    assert choose_method([figures_of(1.0, 3, 1), figures_of(1.0, 6, 1), figures_of(1.0, 5, 1)]) == 1
    assert choose_method([figures_of(1.0, 4, 1), figures_of(1.0, 6, 1), figures_of(0.9, 9, 1)]) == 0
    assert choose_method([figures_of(1.0, 4), figures_of(1.0, 6)]) == 1
    assert choose_method([figures_of(1.0, None), figures_of(1.0, 6)]) == 1
    assert choose_method([figures_of(None, None), figures_of(None, None)]) == 0


def test_the_card_does_not_choose_by_test():
    """Layer 1 separates except on test, layer 0 on fit and test only: the card takes 1 and reports its test AUROC."""
    rows = trait_rows(layers=2, effect=0.0)
    split = split_rows(rows, seed=0)
    sign_n = torch.where(rows.positive_n, 4.0, -4.0)
    activations = rows.activations_nLD.clone()
    activations[:, 0, 0] += sign_n * ~split.part_n["validation"]
    activations[:, 1, 0] += sign_n * ~split.part_n["test"]
    card = card_of(replace(rows, activations_nLD=activations))
    assert card["chosen"]["layer"] == 1
    assert card["chosen"]["validation"]["auroc"]["value"] > 0.95
    assert card["chosen"]["test"]["auroc"]["value"] < 0.8
    assert card["verdict"]["word"] != "usable"


# --- the card


@pytest.fixture(scope="module")
def card() -> dict:
    rows = trait_rows(effect=3.0)
    facts = {"judge": "lexical", "total": 210, "kept_pos": 100, "kept_neg": 100}
    return card_of(
        rows, layers=[3, 5, 7, 9], methods=[*DEFAULT_METHODS, "random"], label_shuffles=4, judge_facts=facts,
        without_instruction_nLD=rows.activations_nLD + 0.1, token_0_ratio_L=[1, 2, 3, 4],
    )  # fmt: skip


def test_the_card_is_plain_json_without_nan(card: dict):
    assert json.loads(json.dumps(card, allow_nan=False)) == card


def shape_of(value: object) -> object:
    """Return the keys at every depth, with lists as their lengths."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in value.items()}
    return len(value) if isinstance(value, list) else type(value).__name__


BOUNDED = {"value": "float", "low": "float", "high": "float"}
FIGURES = {"auroc": BOUNDED, "accuracy": BOUNDED, "cohens_d": BOUNDED}
LAYERED = {name: dict.fromkeys(BOUNDED, 4) for name in FIGURES}


def test_the_card_has_its_documented_keys(card: dict):
    method = {
        "layer": "int", "index": "int", "validation": FIGURES, "test": FIGURES, "wrong_side": "float",
        "per_layer": {"validation": LAYERED, "test": LAYERED, "norm": 4, "top_1_percent": 4, "split_half_cosine": 4,
                      "wrong_side": 4, "stripped": LAYERED},
    }  # fmt: skip
    counts = {"questions": "int", "positive": "int", "negative": "int"}
    shuffled = {"method": "str", "layer": "int", "test": FIGURES}
    assert {key: shape_of(card[key]) for key in card if key not in ("verdict", "judge")} == {
        "layer_convention": "str", "layers": 4, "hidden_size": "int", "seed": "int", "bootstraps": "int",
        "split": {"fit": counts, "validation": counts, "test": counts, "instruction_folds": "int"},
        "typical_norm": 4,
        "token_0": {"ratio": 4},
        "methods": dict.fromkeys([*DEFAULT_METHODS, "random"], method),
        "chosen": {"method": "str", "layer": "int", "index": "int", "validation": FIGURES, "test": FIGURES,
                   "wrong_side": "float", "split_half_cosine": "float", "top_1_percent": "float", "stripped": FIGURES,
                   "test_auroc_by_fold": 5},
        "controls": {"random": {"draws": "int", "test_auroc": 20, "median": "float", "high": "float",
                                "test_cohens_d": 20, "high_cohens_d": "float"},
                     "placebo_methods": 4, "shuffled_labels": 4},
        "projections": {"threshold": "float", "positive": 40, "negative": 40, "unit": "str",
                        "stripped": {"positive": 40, "negative": 40}},
    }  # fmt: skip
    assert [shape_of(each) for each in card["controls"]["shuffled_labels"]] == [shuffled] * 4
    assert card["judge"]["total"] == 210


def test_the_card_chooses_the_layer_where_the_trait_is(card: dict):
    assert (card["chosen"]["layer"], card["chosen"]["index"]) == (7, 2)
    assert card["chosen"]["test"]["auroc"]["low"] > 0.9
    assert card["chosen"]["method"] in DEFAULT_METHODS
    assert card["layers"] == [3, 5, 7, 9]
    assert "from 0" in card["layer_convention"]
    assert card["split"]["test"] == {"questions": 8, "positive": 40, "negative": 40}
    assert card["split"]["instruction_folds"] == 5


def test_the_chosen_figures_are_those_of_its_method(card: dict):
    method = card["methods"][card["chosen"]["method"]]
    for key in ("layer", "index", "validation", "test", "wrong_side"):
        assert card["chosen"][key] == method[key]
    index = method["index"]
    for part in ("validation", "test"):
        for name, ends in method["per_layer"][part].items():
            assert {end: values[index] for end, values in ends.items()} == method[part][name]


def test_the_figures_are_those_of_the_scores_in_the_card(card: dict):
    scores, chosen = card["projections"], card["chosen"]
    labels = [1] * 40 + [0] * 40
    for key, found, folds in ((scores, chosen["test"], 0.0), (scores["stripped"], chosen["stripped"], 0.02)):
        both = np.array(key["positive"] + key["negative"])
        assert found["auroc"]["value"] == pytest.approx(roc_auc_score(labels, both), abs=folds or 1e-9)
        assert found["accuracy"]["value"] == pytest.approx(((both > 0) == np.array(labels)).mean())
    both = np.array(scores["positive"] + scores["negative"])
    assert chosen["wrong_side"] == pytest.approx(((both > 0) != np.array(labels)).mean())


def test_folds_have_areas_of_their_own(card: dict):
    areas = card["chosen"]["test_auroc_by_fold"]
    assert all(area > 0.8 for area in areas)
    assert sum(areas) / 5 == pytest.approx(card["chosen"]["test"]["auroc"]["value"], abs=0.05)


def test_norms_are_of_the_activations_and_of_the_written_direction(card: dict):
    rows = trait_rows(effect=3.0)
    norm = rows.activations_nLD.double().norm(dim=-1).mean(0)
    assert card["typical_norm"] == pytest.approx(norm.tolist())
    way = FUNCTIONS["mean_diff"](*rows.sides, seed=0)
    assert card["methods"]["mean_diff"]["per_layer"]["norm"] == pytest.approx(way.norm(dim=-1).tolist(), rel=1e-5)
    assert card["methods"]["probe"]["per_layer"]["norm"] == pytest.approx([1.0] * 4)


def test_the_controls_are_below_the_direction(card: dict):
    placebo_areas = [control["test"]["auroc"]["value"] for control in card["controls"]["shuffled_labels"]]
    assert abs(sum(placebo_areas) / 4 - 0.5) < 0.15
    assert max(placebo_areas) < card["chosen"]["test"]["auroc"]["low"]
    assert card["controls"]["random"]["high"] < card["chosen"]["test"]["auroc"]["low"]
    areas = card["controls"]["random"]["test_auroc"]
    assert card["controls"]["random"]["median"] == pytest.approx(np.median(areas))
    assert card["controls"]["random"]["high"] == pytest.approx(np.quantile(areas, 0.95))
    assert "ica" not in card["controls"]["placebo_methods"]


def test_shuffled_labels_average_to_chance():
    """40 shuffles of a strong trait: their mean has a standard error near 0.015."""
    rows = trait_rows(effect=4.0)
    split = split_rows(rows, seed=0)
    areas = []
    for seed in range(40):
        shuffled = rows.with_labels(shuffled_labels(rows, split, seed=seed))
        scores_nKL = shuffled_label_scores(shuffled, split, ["mean_diff"], all_layers(rows), seed=seed)
        assert scores_nKL is not None
        found = choose_for_shuffled_labels(shuffled, split, ["mean_diff"], scores_nKL)
        test_n = split.part_n["test"]
        areas.append(auroc(*(found.scores_n[test_n & (found.positive_n == side), None] for side in (True, False))))
    assert abs(torch.cat(areas).mean().item() - 0.5) < 0.06


def test_the_card_is_the_same_twice_and_in_any_order_of_rows():
    rows = trait_rows(questions=8, instructions=2)
    asked = {"seed": 1, "methods": ["mean_diff", "random"], "label_shuffles": 0}
    first = card_of(rows, **asked)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    mixed = LabelledRows(
        rows.activations_nLD[order], rows.positive_n[order],
        *(tuple(ids[k] for k in order.tolist()) for ids in (rows.question_ids, rows.instruction_ids)),
    )  # fmt: skip
    other = card_of(mixed, **asked)
    for name in ("auroc", "accuracy", "cohens_d"):
        assert other["chosen"]["test"][name] == pytest.approx(first["chosen"]["test"][name])
    assert card_of(rows, **asked) == first
    assert first["chosen"]["method"] == "mean_diff"  # the control is never chosen


def test_natural_prompts_have_one_fold_and_bounds():
    rows = natural_rows(effect=4.0)
    card = card_of(rows, instruction_ids=None, methods=["mean_diff"])
    assert card["split"]["instruction_folds"] == 1
    assert card["split"]["test"] == {"questions": 12, "positive": 12, "negative": 12}
    area = card["chosen"]["test"]["auroc"]
    assert 0.5 < area["low"] <= area["value"] <= area["high"]
    assert len(card["controls"]["shuffled_labels"]) == 1


def test_undefined_figures_are_none():
    """Rows without any spread within a side."""
    activations = torch.zeros(12, 1, 4)
    activations[:6, :, 0] = 1
    card = build_card(
        activations, [True] * 6 + [False] * 6, [k % 6 for k in range(12)], layers=[0], seed=0, methods=["mean_diff"],
    )  # fmt: skip
    test = card["chosen"]["test"]
    assert (test["auroc"]["value"], test["accuracy"]["value"]) == (1.0, 1.0)
    assert test["cohens_d"] == {"value": None, "low": None, "high": None}
    json.dumps(card, allow_nan=False)


def test_a_single_test_question_has_no_interval():
    card = card_of(trait_rows(questions=3, instructions=3, effect=4.0))
    assert card["split"]["test"]["questions"] == 1
    assert card["chosen"]["test"]["auroc"]["value"] is not None
    assert card["chosen"]["test"]["auroc"]["low"] is None
    assert card["verdict"]["word"] != "usable"


def test_the_card_names_the_layer_and_example_of_a_nan():
    rows = trait_rows(questions=4, instructions=1)
    ids = [f"row-{k}" for k in range(8)]
    spoiled = rows.activations_nLD.clone()
    spoiled[6, 2, 0] = torch.nan
    for asked in ({"without_instruction_nLD": spoiled}, {}):
        used = rows if asked else replace(rows, activations_nLD=spoiled)
        with pytest.raises(ActivationError, match=r"layer 12, .*row-6"):
            card_of(used, layers=[10, 11, 12, 13], example_ids=ids, **asked)


def test_mismatched_rows_raise_value_error():
    rows = trait_rows(questions=4)
    with pytest.raises(ValueError, match="3 layer numbers"):
        card_of(rows, layers=[0, 1, 2])
    with pytest.raises(ValueError, match=r"\(40, 2, 24\)"):
        card_of(rows, without_instruction_nLD=rows.activations_nLD[:, :2])


# --- stability


def mean_cosines(rows: LabelledRows, method: str) -> torch.Tensor:
    return split_half_cosine(half_direction_cosines(rows, method, all_layers(rows), seed=0))


def test_two_halves_agree_on_a_trait_and_not_on_noise():
    strong, nothing = trait_rows(effect=6.0, hidden=200), trait_rows(effect=0.0, hidden=200)
    for name in DEFAULT_METHODS:
        if name != "ica":
            assert mean_cosines(strong, name)[2] > 0.5, name
        assert mean_cosines(nothing, name).abs().max() < 0.3, name


def test_two_rows_have_no_halves():
    assert mean_cosines(trait_rows(questions=1, instructions=1), "probe").isnan().all()


# --- planted leaks


def area_of(rows: LabelledRows, **asked: object) -> float:
    return card_of(rows, methods=["probe"], label_shuffles=0, random_draws=2, **asked)["chosen"]["test"]["auroc"][
        "value"
    ]


def test_a_split_by_row_would_score_a_memory_of_questions_and_a_split_by_question_does_not():
    """Each question's rows are nearly the same, and the trait does nothing."""
    by_question, by_row = [], []
    for seed in range(8):
        rows = natural_rows(repeats=12, hidden=64, seed=10 * seed)
        by_question.append(area_of(rows, seed=seed))
        row_ids = tuple(range(len(rows.question_ids)))  # a split by row
        by_row.append(area_of(replace(rows, question_ids=row_ids), seed=seed))
    assert min(by_row) > 0.95  # the leak
    assert abs(sum(by_question) / 8 - 0.5) < 0.15


def test_without_instruction_folds_a_memory_of_instructions_would_score():
    """Each instruction pair has a direction of its own: only leaving it out shows that there is no trait."""
    held_out, not_held_out = [], []
    for seed in range(4):
        rows = memorised_instructions(seed=10 * seed)
        held_out.append(area_of(rows, seed=seed))
        not_held_out.append(area_of(rows, seed=seed, instruction_ids=None))
    assert min(not_held_out) > 0.9
    assert sum(held_out) / 4 < 0.7
