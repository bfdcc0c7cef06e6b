"""Judges: laws of the lexical score, and how a judge is chosen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction.errors import ConfigError, TraitError
from extraction.judges import judge_lexical, judge_none, keep, lexical_score, resolve_judge
from extraction.records import Markers, Trait

MARKERS = Markers(positive=("perhaps", "not sure", r"re:\bmight\b"), negative=("certainly", "no doubt"))
SWAPPED = Markers(positive=MARKERS.negative, negative=MARKERS.positive)
TRAIT = Trait(name="doubt", description="doubt", markers=MARKERS)
BARE = Trait(name="bare", description="no markers")

marked_text = st.lists(
    st.sampled_from(["perhaps", "Not  sure", "MIGHT", "certainly", "no doubt", "soup", "tea.", "mighty", "perhapsing"]),
    max_size=12,
).map(" ".join)


@given(marked_text | st.text())
def test_a_score_lies_between_0_and_100_or_is_missing(text: str) -> None:
    score = lexical_score(text, MARKERS)
    assert score is None or 0 <= score <= 100


@given(marked_text)
def test_swapping_the_sides_mirrors_the_score(text: str) -> None:
    score, mirrored = lexical_score(text, MARKERS), lexical_score(text, SWAPPED)
    assert mirrored == (None if score is None else pytest.approx(100 - score))


@given(st.lists(st.sampled_from(["soup", "mighty", "uncertainly", "doubt", "no", "sure"]), max_size=9).map(", ".join))
def test_text_without_markers_is_missing_never_zero(text: str) -> None:
    assert lexical_score(text, MARKERS) is None


@given(marked_text, st.sampled_from(["perhaps", "not sure"]))
def test_one_more_positive_marker_never_lowers_the_score(text: str, marker: str) -> None:
    before, after = lexical_score(text, MARKERS), lexical_score(f"{text} {marker}", MARKERS)
    assert after is not None
    assert before is None or after >= before


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Perhaps.", 100.0),
        ("Certainly!", 0.0),
        ("Perhaps, certainly", 50.0),
        ("perhaps might certainly", pytest.approx(200 / 3)),
        ("I am not\nsure", 100.0),
        ("(perhaps)", 100.0),
        ("perhaps_", None),
        ("", None),
    ],
)
def test_markers_are_counted_as_whole_words(text: str, score: float | None) -> None:
    assert lexical_score(text, MARKERS) == score


def test_a_phrase_is_no_pattern() -> None:
    markers = Markers(positive=("a.b", "why?"), negative=("(c)",))
    assert lexical_score("a.b why? (c)", markers) == pytest.approx(200 / 3)
    assert lexical_score("axb wh", markers) is None


def test_an_invalid_pattern_names_the_trait_and_the_pattern() -> None:
    broken = Trait(name="broken", description="", markers=Markers(positive=("re:(",), negative=("no",)))
    with pytest.raises(TraitError, match=r"broken.*re:\("):
        judge_lexical("", "text", broken)
    with pytest.raises(TraitError, match="broken"):
        resolve_judge("lexical", broken)


def test_lexical_without_markers_says_what_to_add() -> None:
    with pytest.raises(TraitError, match=r"configs/traits/bare\.yaml"):
        resolve_judge("lexical", BARE)


def test_auto_is_lexical_where_there_are_markers() -> None:
    assert resolve_judge("auto", TRAIT) == "lexical"
    assert resolve_judge("auto", BARE) == "none"


def test_a_judge_judges_the_answer_and_not_the_question() -> None:
    assert judge_lexical("Perhaps?", "Certainly.", TRAIT) == 0.0
    assert judge_none("Perhaps?", "Certainly.", TRAIT) is None


def test_an_unknown_judge_is_an_error_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lexical'"):
        resolve_judge("lexicall", TRAIT)
    with pytest.raises(ConfigError, match="known: auto"):
        resolve_judge("zzz", TRAIT)


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_score_is_kept_on_exactly_one_side(score: float, threshold: float) -> None:
    assert keep("pos", score, threshold) is not keep("neg", score, threshold)


def test_the_threshold_itself_is_positive_and_a_missing_score_is_neither() -> None:
    assert keep("pos", 50.0) is True
    assert keep("neg", 50.0) is False
    assert keep("pos", None) is None
    assert keep("neg", None) is None
