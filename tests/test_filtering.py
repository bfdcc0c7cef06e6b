"""Filtering: the responses that count by their scores, and the reasons of the others."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from extraction.core.records import POLARITIES
from extraction.judging.filtering import KeptResponses, filter_responses

scores = st.one_of(st.none(), st.floats(0, 100))
answers = st.lists(st.tuples(scores, st.booleans()), max_size=12)


def rows(polarity: str, found: list[tuple[float | None, bool]]) -> list[dict]:
    return [
        {"id": f"{polarity}-{i}", "question": f"q{i}", "token_ids": [7] * said, "scores": {"lexical": score}}
        for i, (score, said) in enumerate(found)
    ]


def sides(positive: list, negative: list) -> dict:
    """Rows by polarity, each to be read once."""
    return {"pos": iter(rows("pos", positive)), "neg": iter(rows("neg", negative))}


def test_each_reason_is_counted():
    positive = [(80.0, True), (50.0, True), (49.9, True), (None, True), (90.0, False), (None, False)]
    kept = filter_responses(sides(positive, [(49.9, True), (50.0, True), (0.0, True)]), "lexical", 50.0)
    assert kept.ids == {"pos": ("pos-0", "pos-1"), "neg": ("neg-0", "neg-2")}
    assert (kept.total, kept.n_kept, kept.dropped) == (9, 4, {"empty": 2, "unscored": 1, "wrong_side": 2})
    assert kept.questions["neg-2"] == "q2"


def test_a_missing_score_is_not_a_score_of_0():
    kept = filter_responses(sides([], [(None, True), (0.0, True)]), "lexical", 50.0)
    assert kept.ids["neg"] == ("neg-1",)


def test_no_judge_keeps_all_but_the_empty():
    kept = filter_responses(sides([(None, True), (10.0, True), (90.0, False)], [(99.0, True)]), "none", 50.0)
    assert kept.ids == {"pos": ("pos-0", "pos-1"), "neg": ("neg-0",)}
    assert kept.facts()["threshold"] is None


def test_another_judges_scores_do_not_count():
    kept = filter_responses(sides([(90.0, True)], []), "other", 50.0)
    assert (kept.n_kept, kept.dropped) == (0, {"unscored": 1})


@given(answers, answers, st.floats(0, 100))
def test_every_response_is_kept_or_dropped_for_one_reason(positive, negative, threshold):
    kept = filter_responses(sides(positive, negative), "lexical", threshold)
    facts = kept.facts()
    assert kept.total == len(positive) + len(negative) == len(kept.questions)
    assert kept.n_kept + sum(kept.dropped.values()) == kept.total
    assert sum(value for key, value in facts.items() if key.startswith(("kept_", "dropped_"))) == facts["total"]
    found = {
        row["id"]: row
        for polarity in POLARITIES
        for row in rows(polarity, {"pos": positive, "neg": negative}[polarity])
    }
    assert all(found[example_id]["scores"]["lexical"] >= threshold for example_id in kept.ids["pos"])
    assert all(found[example_id]["scores"]["lexical"] < threshold for example_id in kept.ids["neg"])


@given(answers, answers, st.floats(0, 100), st.floats(0, 100))
def test_a_higher_threshold_keeps_fewer_positive_and_more_negative(positive, negative, one, other):
    low, high = (filter_responses(sides(positive, negative), "lexical", at) for at in sorted((one, other)))
    assert set(high.ids["pos"]) <= set(low.ids["pos"])
    assert set(high.ids["neg"]) >= set(low.ids["neg"])


# --- model judges ---------------------------------------------------------------------------------------------------


def read_rows(polarity: str, found: list[tuple]) -> list[dict]:
    """(score, coherence, reason) of each response."""
    return [
        {
            "id": f"{polarity}-{i}",
            "question": "q",
            "token_ids": [7],
            "scores": {"local": score, "local_coherence": coherence},
            "judged": {"reason": reason, "raw": "", "how": ""},
        }
        for i, (score, coherence, reason) in enumerate(found)
    ]


def kept_by_model_judge(positive: list[tuple], negative: list[tuple], **options: float) -> KeptResponses:
    found = {"pos": read_rows("pos", positive), "neg": read_rows("neg", negative)}
    return filter_responses(found, "local", 50.0, model="m", **options)


def test_responses_of_low_or_unknown_coherence_are_dropped():
    positive = [(90.0, 90.0, None), (90.0, 50.0, None), (90.0, 49.9, None), (90.0, None, "no number")]
    negative = [(10.0, 90.0, None), (10.0, 0.0, None), (90.0, 0.0, None)]
    kept = kept_by_model_judge(positive, negative)
    assert kept.ids == {"pos": ("pos-0", "pos-1"), "neg": ("neg-0",)}
    assert kept.dropped == {"incoherent": 2, "unscored": 1, "wrong_side": 1}
    assert kept.facts()["coherence_threshold"] == 50.0
    assert kept_by_model_judge(positive, negative, coherence_threshold=0.0).n_kept == 5
    assert re.findall(r"\d+", kept.reasons()) == ["1", "2", "1"]


def test_refused_and_failed_are_reasons_of_their_own():
    missing = [(None, None, "refused"), (None, 80.0, "failed: no answer in time"), (None, 5.0, "no number")]
    kept = kept_by_model_judge([*missing, (None, None, "empty")], [])
    assert kept.dropped == {"refused": 1, "failed": 1, "unscored": 1, "empty": 1}
    facts = kept.facts()
    assert (facts["dropped_refused"], facts["dropped_failed"], facts["judge_model"]) == (1, 1, "m")


def sided(scores: list[float]) -> KeptResponses:
    half = len(scores) // 2
    return kept_by_model_judge(*([(score, 90.0, None) for score in side] for side in (scores[:half], scores[half:])))


@given(st.floats(0, 100), st.integers(10, 40))
def test_one_score_for_everything_is_a_problem(score, count):
    problem = sided([score] * count).problem
    assert f"{score:.4g}" in problem
    assert "local judge m" in problem


def test_nearly_one_score_is_a_problem_and_two_camps_are_none():
    assert "(50)" in sided([50.0] * 39 + [90.0]).problem
    assert "(50)" in sided([50.4, 49.6] * 20).problem
    assert sided([90.0] * 10 + [10.0] * 10).problem is None
    assert sided([51.0] * 10 + [45.0] * 10).problem is None
    assert sided([90.0] * 19 + [10.0] * 21).problem is None


def test_few_scores_say_nothing_of_a_spread():
    assert "negative" in sided([50.0] * 8).problem
    assert sided([60.0] * 4 + [40.0] * 4).problem is None


def test_no_score_at_all_is_a_problem_with_its_reason():
    problem = kept_by_model_judge([(None, None, "no number")] * 3, [(None, None, "refused")]).problem
    assert all(part in problem for part in ("local judge m", "4 responses", "3 times 'no number'", "1 times 'refused'"))


def test_a_side_without_responses_is_a_problem_of_every_judge():
    problem = sided([10.0] * 10 + [20.0] * 10).problem
    assert "positive" in problem
    assert "(10 " in problem
    assert "positive" in filter_responses(sides([(10.0, True)], [(10.0, True)]), "lexical", 50.0).problem
    assert filter_responses(sides([(10.0, True)], [(10.0, True)]), "none", 50.0).problem is None


def test_fewer_than_half_of_the_responses_scored_is_a_problem_with_the_share_and_a_remedy():
    def scored(n_scored, n_missing, judge="lexical"):
        rows = [(90.0, True)] * n_scored + [(None, True)] * n_missing
        return filter_responses(sides(rows, [(10.0, True)] * n_scored + [(None, True)] * n_missing), judge, 50.0)

    few = scored(3, 22)
    assert "6 of 50 responses, 12%" in few.problem
    assert "--judge likelihood" in few.remedy
    assert scored(5, 5).problem is None
    assert scored(5, 6).problem is not None
    assert scored(0, 6, "none").problem is None
