"""Which responses count, and why the others don't."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extraction.kept import kept_examples
from extraction.records import POLARITIES

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
    kept = kept_examples(sides(positive, [(49.9, True), (50.0, True), (0.0, True)]), "lexical", 50.0)
    assert kept.ids == {"pos": ("pos-0", "pos-1"), "neg": ("neg-0", "neg-2")}
    assert (kept.total, kept.n_kept, kept.dropped) == (9, 4, {"empty": 2, "unscored": 1, "wrong_side": 2})
    assert kept.questions["neg-2"] == "q2"


def test_a_missing_score_is_not_a_score_of_0():
    kept = kept_examples(sides([], [(None, True), (0.0, True)]), "lexical", 50.0)
    assert kept.ids["neg"] == ("neg-1",)


def test_no_judge_keeps_all_but_the_empty():
    kept = kept_examples(sides([(None, True), (10.0, True), (90.0, False)], [(99.0, True)]), "none", 50.0)
    assert kept.ids == {"pos": ("pos-0", "pos-1"), "neg": ("neg-0",)}
    assert kept.facts()["threshold"] is None


def test_another_judges_scores_do_not_count():
    kept = kept_examples(sides([(90.0, True)], []), "other", 50.0)
    assert (kept.n_kept, kept.dropped) == (0, {"unscored": 1})


@given(answers, answers, st.floats(0, 100))
def test_every_response_is_kept_or_dropped_for_one_reason(positive, negative, threshold):
    kept = kept_examples(sides(positive, negative), "lexical", threshold)
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
    low, high = (kept_examples(sides(positive, negative), "lexical", at) for at in sorted((one, other)))
    assert set(high.ids["pos"]) <= set(low.ids["pos"])
    assert set(high.ids["neg"]) >= set(low.ids["neg"])
