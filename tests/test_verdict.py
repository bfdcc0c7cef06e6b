"""The verdict: its rules one by one, and whole cards of planted traits and planted faults."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.vectors.card import build_card
from extraction.vectors.methods import FUNCTIONS, mean_diff
from extraction.vectors.splits import LabelledRows
from extraction.vectors.verdict import verdict
from tests.planted import memorised_instructions, natural_rows, trait_rows, ways


def card_of(rows: LabelledRows, **asked: Any) -> dict[str, Any]:
    """Build a card of rows with few methods and resamples."""
    settings = {"layers": range(rows.activations_nLD.shape[1]), "seed": 0, "methods": ["mean_diff", "gradient"],
                "bootstraps": 300, "instruction_ids": rows.instruction_ids}  # fmt: skip
    return build_card(rows.activations_nLD, rows.positive_n, rows.question_ids, **{**settings, **asked})


def reasons(card: dict[str, Any], steering: dict[str, Any] | None = None) -> str:
    return " ".join(verdict(card, steering)["reasons"])


# --- planted traits


def test_a_planted_trait_is_usable():
    words = Counter(card_of(trait_rows(effect=3.0, seed=10 * k), seed=k)["verdict"]["word"] for k in range(5))
    assert words == {"usable": 5}


def test_noise_is_nearly_always_not_shown():
    words = Counter(card_of(trait_rows(effect=0.0, seed=10 * k), seed=k)["verdict"]["word"] for k in range(20))
    assert words["not shown"] >= 19
    assert words["usable"] == 0


def test_natural_prompts_have_the_same_verdicts():
    strong, nothing = (natural_rows(each=20, effect=effect, repeats=3, hidden=48) for effect in (3.0, 0.0))
    assert card_of(strong)["verdict"]["word"] == "usable"
    assert card_of(nothing)["verdict"]["word"] == "not shown"


def test_a_signal_of_the_instruction_alone_is_weak_at_most():
    """The sides differ while the instruction is in the context, and not once it is removed."""
    for seed in range(3):
        shown, stripped = (trait_rows(effect=effect, seed=10 * seed) for effect in (4.0, 0.0))
        card = card_of(shown, without_instruction_nLD=stripped.activations_nLD)
        assert card["chosen"]["test"]["auroc"]["low"] > 0.9
        assert card["verdict"]["word"] == "weak"
        assert re.search("instruction removed.*AUROC", card["verdict"]["reasons"][0])
        assert card_of(shown, without_instruction_nLD=shown.activations_nLD)["verdict"]["word"] == "usable"


def test_half_of_a_signal_left_without_the_instruction_is_weak():
    shown, stripped = (trait_rows(effect=effect, seed=10) for effect in (4.0, 0.45))
    card = card_of(shown, without_instruction_nLD=stripped.activations_nLD)
    assert card["chosen"]["stripped"]["auroc"]["low"] > 0.5
    assert card["verdict"]["word"] == "weak"
    assert re.search("instruction removed.*AUROC", card["verdict"]["reasons"][0])


def test_a_shift_of_all_rows_without_the_instruction_is_no_loss():
    """All rows shift far when the instruction is removed; the sides still differ."""
    rows = trait_rows(effect=3.0)
    card = card_of(rows, without_instruction_nLD=rows.activations_nLD + 40 * ways(4, 24, seed=77).float())
    assert card["chosen"]["stripped"]["auroc"]["low"] > 0.9
    assert card["verdict"]["word"] == "usable"


def test_a_memory_of_questions_is_not_shown_and_a_split_by_row_would_call_it_usable():
    rows = natural_rows(repeats=12, hidden=64, seed=3)
    by_row = replace(rows, question_ids=tuple(range(len(rows.question_ids))))
    assert card_of(rows)["verdict"]["word"] == "not shown"
    assert card_of(by_row)["verdict"]["word"] == "usable"  # the leak


def test_a_memory_of_instructions_is_never_usable_and_without_folds_it_would_be():
    rows = memorised_instructions(seed=0)
    held_out, not_held_out = card_of(rows), card_of(rows, instruction_ids=None)
    assert held_out["verdict"]["word"] != "usable"
    assert not_held_out["verdict"]["word"] == "usable"  # the leak


# --- planted faults


def backwards(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int) -> Tensor:
    """mean_diff with the sign lost after the fit."""
    return -mean_diff(positive_NLD, negative_MLD, seed=seed)


def one_layer_late(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int) -> Tensor:
    """mean_diff whose layer k is read on layer k + 1."""
    return mean_diff(positive_NLD, negative_MLD, seed=seed).roll(1, 0)


def faulty(monkeypatch: pytest.MonkeyPatch, rows: LabelledRows, fault: Any) -> dict[str, Any]:
    monkeypatch.setitem(FUNCTIONS, "mean_diff", fault)
    return card_of(rows, methods=["mean_diff"])


def test_a_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch):
    rows = trait_rows(effect=6.0, layers=4)
    rows = replace(rows, activations_nLD=rows.activations_nLD[:, 2:3])
    assert faulty(monkeypatch, rows, mean_diff)["verdict"]["word"] == "usable"
    card = faulty(monkeypatch, rows, backwards)
    assert card["chosen"]["test"]["auroc"]["high"] < 0.5
    assert card["verdict"]["word"] == "not shown"
    assert re.search(r"sign.*AUROC 0\.", reasons(card))


def test_an_off_by_one_layer_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The trait is in layer 2 alone."""
    rows = trait_rows(effect=0.0, hidden=200)
    activations = rows.activations_nLD.clone()
    activations[:, 2] += 3 * torch.where(rows.positive_n, 1.0, -1.0)[:, None] * ways(1, 200, seed=8).float()
    rows = replace(rows, activations_nLD=activations)
    right, late = (faulty(monkeypatch, rows, fault) for fault in (mean_diff, one_layer_late))
    assert (right["chosen"]["layer"], right["verdict"]["word"]) == (2, "usable")
    assert right["chosen"]["test"]["auroc"]["value"] > 0.95
    assert late["verdict"]["word"] == "not shown"
    assert max(late["methods"]["mean_diff"]["per_layer"]["test"]["auroc"]["value"]) < 0.75


def test_a_judge_with_one_score_for_every_response_is_caught():
    rows = trait_rows(effect=4.0)
    facts = {"judge": "lexical", "total": 200, "kept_pos": 100, "kept_neg": 100}
    assert card_of(rows, judge_facts={**facts, "distinct_scores": 17})["verdict"]["word"] == "usable"
    card = card_of(rows, judge_facts={**facts, "distinct_scores": 1})
    assert card["verdict"]["word"] == "not shown"
    assert "judge" in card["verdict"]["reasons"][0]


# --- the rules, one by one


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """Build a usable card, of which tests change one value."""
    rows = trait_rows(effect=3.0)
    facts = {"judge": "lexical", "total": 210, "kept_pos": 100, "kept_neg": 100}
    return card_of(rows, without_instruction_nLD=rows.activations_nLD, judge_facts=facts)


def changed(card: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy a card with the value at `a.b.c` replaced."""
    found = copy.deepcopy(card)
    place = found
    *folders, name = path.split(".")
    for folder in folders:
        place = place[folder]
    assert name in place or folders == ["judge"]
    place[name] = value
    return found


def test_a_usable_card_lists_its_evidence(good: dict[str, Any]):
    assert verdict(good) == good["verdict"]
    assert good["verdict"]["word"] == "usable"
    assert "Steering" in good["verdict"]["reasons"][0]  # the only note; the others support the direction
    assert "AUROC" in good["verdict"]["reasons"][1]
    assert all(reason.endswith(".") for reason in good["verdict"]["reasons"])


NO_MARGIN = {"draws": 9, "median": 0.8, "high": 1.0, "high_cohens_d": 99.0}


@pytest.mark.parametrize(
    ("path", "value", "word", "number"),
    [
        ("chosen.test.auroc.low", 0.5, "not shown", r"\(0\.50 to"),
        ("chosen.test.auroc.low", 0.6, "weak", r"\(0\.60 to"),
        ("chosen.test.auroc.low", None, "weak", "AUROC"),
        ("chosen.test.auroc.value", None, "not shown", "AUROC"),
        ("chosen.test.auroc.value", 0.4, "not shown", r"AUROC 0\.40"),
        ("chosen.test.cohens_d.value", -0.1, "not shown", r"Cohen's d -0\.10"),
        ("chosen.test.accuracy.value", 0.6, "weak", r"0\.60 \("),
        ("controls.random", NO_MARGIN, "not shown", r"9 draws: .*0\.80, .*1\.00"),
        ("controls.shuffled_labels", [{"test": {"auroc": {"value": 1.0}}}], "not shown", r"1\.00"),
        ("controls.shuffled_labels", [], "usable", "Shuffled labels"),
        ("chosen.split_half_cosine", 0.01, "not shown", r"0\.01"),
        ("chosen.split_half_cosine", None, "weak", "half"),
        ("chosen.test_auroc_by_fold", [0.9, 0.45, 1.0], "weak", r"0\.90, 0\.45, 1\.00"),
        ("split.test", {"questions": 4, "positive": 20, "negative": 20}, "weak", r"\b4\b.*\b5\b"),
        ("split.test", {"questions": 8, "positive": 20, "negative": 9}, "weak", r"\b9\b.*\b10\b"),
        ("split.instruction_folds", 1, "usable", "instruction"),
        ("chosen.stripped", None, "usable", "instruction"),
        ("chosen.stripped.auroc", {"value": 0.6, "low": 0.45, "high": 0.7}, "weak", r"0\.60 \(0\.45 to 0\.70\)"),
        ("chosen.stripped.auroc", {"value": 0.6, "low": 0.55, "high": 0.7}, "weak", r"0\.60 \(0\.55 to 0\.70\)"),
        ("chosen.top_1_percent", 0.8, "usable", "80%"),
        ("judge.kept_neg", 2, "weak", "108 of 210"),
        ("judge.kept_neg", 50, "usable", "60 of 210"),
        ("judge.judge", "none", "weak", "judged"),
    ],
)
def test_one_change_of_a_good_card_has_one_outcome(good: dict[str, Any], path: str, value: Any, word: str, number: str):
    """The reasons that are new name the changed value; none of a usable card's reasons says it already."""
    card = changed(good, path, value)
    new = [reason for reason in verdict(card)["reasons"] if reason not in good["verdict"]["reasons"]]
    assert verdict(card)["word"] == word
    assert re.search(number, " ".join(new))
    assert len(new) == 1 or path == "chosen.test.auroc.value"


def test_a_low_split_half_cosine_is_weak(good: dict[str, Any]):
    card = changed(changed(good, "hidden_size", 2304), "chosen.split_half_cosine", 0.2)
    assert verdict(card)["word"] == "weak"
    assert "0.20" in reasons(card)


def test_where_auroc_is_saturated_effect_sizes_are_compared(good: dict[str, Any]):
    """A trait so strong that random directions separate it as well."""
    saturated = changed(changed(good, "chosen.test.auroc.value", 1.0), "controls.random.high", 1.0)
    effect = good["chosen"]["test"]["cohens_d"]["value"]
    assert verdict(changed(saturated, "controls.random.high_cohens_d", effect - 0.1))["word"] == "usable"
    assert verdict(changed(saturated, "controls.random.high_cohens_d", effect + 0.1))["word"] == "not shown"
    unsaturated = changed(changed(good, "chosen.test.auroc.value", 0.95), "controls.random.high", 0.96)
    assert verdict(changed(unsaturated, "controls.random.high_cohens_d", 0.0))["word"] == "not shown"


def test_a_weak_card_lists_only_its_problems(good: dict[str, Any]):
    card = changed(changed(good, "chosen.top_1_percent", 0.8), "chosen.test.accuracy.value", 0.6)
    found = verdict(card)["reasons"]
    assert len(found) == 3
    assert "Accuracy" in found[0]


# --- steering


def rate(value: float | None, margin: float = 0.1) -> dict[str, Any]:
    return {
        "value": value,
        "low": None if value is None else value - margin,
        "high": None if value is None else value + margin,
    }


def condition(direction: str, coefficient: float, value: float | None, *, coherent: bool = True) -> dict[str, Any]:
    kind = "none" if direction == "none" else "add"
    return {
        "direction": direction,
        "kind": kind,
        "layers": [2],
        "coefficient": coefficient,
        "rate": rate(value),
        "coherent": coherent,
    }


def steered(up: float | None, down: float | None, *, coherent: bool = True) -> dict[str, Any]:
    """Make a sweep whose unsteered rate is 0.5, and whose random direction reaches 0.55 and 0.45."""
    conditions = [
        condition("none", 0.0, 0.5),
        condition("random", 1.0, 0.55),
        condition("random", -1.0, 0.45),
        condition("trait", 1.0, up, coherent=coherent),
        condition("trait", -1.0, down, coherent=coherent),
    ]
    reached = {"positive": up, "negative": down, "random": {"positive": 0.55, "negative": 0.45}}
    largest = {"positive": 1.0, "negative": -1.0} if coherent else {"positive": None, "negative": None}
    return {"layers": [2], "conditions": conditions, "largest_coherent": largest, "reached": reached}


@pytest.mark.parametrize(
    ("steering", "word", "number"),
    [
        (None, "usable", ""),
        (steered(0.9, 0.1), "usable", r"0\.90 \(0\.80 to 1\.00\).* 0\.55"),
        (steered(0.9, 0.5), "usable", r"0\.90"),
        (steered(0.5, 0.1), "usable", r"0\.10"),
        (steered(0.6, 0.4), "weak", r"0\.60.* 0\.55"),
        (steered(0.1, 0.9), "weak", r"0\.10.* 0\.55"),
        (steered(0.9, 0.1, coherent=False), "weak", "coherent"),
        (steered(None, None), "weak", "coherent"),
    ],
)
def test_a_direction_that_does_not_steer_is_weak_at_most(
    good: dict[str, Any], steering: dict[str, Any] | None, word: str, number: str
):
    assert verdict(good, steering)["word"] == word
    assert re.search(number, reasons(good, steering))


def test_the_best_of_many_coefficients_does_not_decide(good: dict[str, Any]):
    """High rates at a smaller coefficient and at other layers; the largest coherent coefficient has no effect."""
    steering = steered(0.55, 0.45)
    lucky = [condition("trait", 0.5, 1.0), {**condition("trait", 1.0, 1.0), "layers": [0, 1, 2]}]
    assert verdict(good, {**steering, "conditions": [*lucky, *steering["conditions"]]})["word"] == "weak"


def test_a_sweep_without_random_directions_is_read_against_no_steering(good: dict[str, Any]):
    steering = steered(0.9, 0.1)
    steering["reached"]["random"] = None
    assert verdict(good, steering)["word"] == "usable"
    assert re.search(r"0\.90.* 0\.50", reasons(good, steering))


def test_steering_does_not_rescue_a_direction_that_is_not_shown(good: dict[str, Any]):
    card = changed(good, "chosen.test.auroc.low", 0.4)
    assert verdict(card, steered(0.9, 0.1))["word"] == "not shown"
