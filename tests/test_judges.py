"""Judges: laws of the lexical score, the choice of a judge, rubrics, and the reading of a model judge's answer."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction.config.traits import list_traits, load_trait
from extraction.core.errors import ConfigError, TraitError
from extraction.core.records import Markers, Trait
from extraction.judging import base
from extraction.judging.base import MAX_CHARACTERS, JudgedResponse, Judgement, ModelJudge, Rating, RuleJudge, shows_side
from extraction.judging.lexical import judge_lexical, lexical_score
from extraction.judging.registry import JUDGE_NAMES, JUDGES, is_model_judge, resolve_judge
from extraction.judging.rubric import expectation, fill, read_score, rubrics_of
from extraction.pipeline.plan import make_plan
from extraction.pipeline.score import make_scorer
from extraction.pipeline.session import ModelSession, TraitContext
from tests.runs import REPOSITORY, make_root

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
    for judge in (lambda: judge_lexical("", "text", broken), lambda: resolve_judge("lexical", broken)):
        with pytest.raises(TraitError, match=r"broken.*re:\("):
            judge()


def test_markers_are_counted_in_the_first_characters_alone() -> None:
    long = "perhaps ".ljust(MAX_CHARACTERS)
    assert lexical_score(long + "certainly", MARKERS) == 100.0
    assert lexical_score(long[:-10] + " certainly", MARKERS) == 50.0
    assert fill("{question}|{answer}", "Why?", long + "certainly") == f"Why?|{long}"


def test_a_pattern_whose_time_grows_with_the_square_of_the_text_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_CHARACTERS", 1000)
    markers = Markers(positive=(r"re:a\w*!",), negative=("no",))
    started = time.monotonic()
    assert lexical_score("a" * 1_000_000, markers) is None  # half a million steps; without the bound, 5e11
    assert time.monotonic() - started < 30


def test_lexical_without_markers_names_the_file_to_add_them_to() -> None:
    with pytest.raises(TraitError, match=r"configs/traits/bare\.yaml"):
        resolve_judge("lexical", BARE)


def test_auto_is_lexical_where_there_are_markers() -> None:
    assert resolve_judge("auto", TRAIT) == "lexical"
    assert resolve_judge("auto", BARE) == "none"


def test_a_judge_judges_the_answer_and_not_the_question() -> None:
    assert judge_lexical("Perhaps?", "Certainly.", TRAIT) == 0.0
    assert JUDGES["none"].score("Perhaps?", "Certainly.", TRAIT) is None


def test_an_unknown_judge_is_an_error_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match=r"'lexicall'.*'lexical'"):
        resolve_judge("lexicall", TRAIT)
    with pytest.raises(ConfigError, match=rf"'zzz'.*{', '.join(sorted(JUDGE_NAMES))}"):
        resolve_judge("zzz", TRAIT)


def test_an_unknown_judge_of_an_experiment_is_an_error_with_the_experiment(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    with pytest.raises(ConfigError, match=r"demo.*'lexcial'.*'lexical'"):
        make_plan("demo", "calm", root=str(root), options={"judge": "lexcial"})


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_score_is_on_exactly_one_side(score: float, threshold: float) -> None:
    assert shows_side("pos", score, threshold) is not shows_side("neg", score, threshold)


def test_a_score_at_the_threshold_is_positive_and_a_missing_one_is_neither() -> None:
    assert shows_side("pos", 50.0) is True
    assert shows_side("neg", 50.0) is False
    assert shows_side("pos", None) is None
    assert shows_side("neg", None) is None


# --- rubrics and the reading of answers -----------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["N", "Cs"], exclude_characters="-\u2212.,"), max_size=30)


@given(st.text())
def test_any_answer_gives_a_score_from_0_to_100_or_a_reason(text: str) -> None:
    score, reason = read_score(text)
    assert (score is None) == (reason is not None)
    assert score is None or 0 <= score <= 100


@given(words, st.integers(0, 100), words)
def test_the_first_number_is_the_score(before: str, number: int, after: str) -> None:
    answer = f"{before} {number} {after}"
    if "refusal" not in answer.casefold() and "<think>" not in answer:
        assert read_score(answer) == (float(number), None)


@given(words)
def test_words_are_never_a_score(text: str) -> None:
    assert read_score(text)[0] is None


@given(st.integers(101, 10**9) | st.integers(-(10**6), -1))
def test_a_number_off_the_scale_is_missing(number: int) -> None:
    assert read_score(f"{number}") == (None, "no number")


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("85", 85.0, None),
        (" 0\n", 0.0, None),
        ("Score: 85/100.", 85.0, None),
        ("**70**", 70.0, None),
        ("85%", 85.0, None),
        ("72.5", 72.5, None),
        ("On a scale from 0 to 100 I give it 85.", 85.0, None),
        ("0-100: 40", 40.0, None),
        ("<think>It is 10, or 20.</think>90", 90.0, None),
        ("REFUSAL 0", None, "refused"),
        ("I say REFUSAL, since 90 would be wrong", None, "refused"),
        ("90, not REFUSAL", 90.0, None),
        ("From 0 to 100", None, "no number"),
        ("1,000", None, "no number"),
        ("1.2.3", None, "no number"),
        ("\u22125", None, "no number"),
        ("100.5", None, "no number"),
        ("\u0663\u0664", None, "no number"),
        ("", None, "no answer"),
        (" \n", None, "no answer"),
    ],
)
def test_answers_of_judges(text: str, score: float | None, reason: str | None) -> None:
    assert read_score(text) == (score, reason)


@given(st.text(), st.text())
def test_a_rubric_contains_both_texts_unchanged(question: str, answer: str) -> None:
    assert fill("<{question}|{answer}>", question, answer) == f"<{question}|{answer}>"


def test_a_placeholder_inside_a_question_is_no_placeholder() -> None:
    assert fill("{question} {answer}", "What is {answer}?", "x") == "What is {answer}? x"


@pytest.mark.parametrize("rubric", ["Rate {question}", "Rate {answer}", "Rate it"])
def test_a_rubric_without_question_or_answer_is_refused_by_name(rubric: str) -> None:
    blind = Trait(name="blind", description="", rubric=rubric)
    for judge in filter(is_model_judge, JUDGES):
        with pytest.raises(TraitError, match=r"blind.*\{(question|answer)\}"):
            resolve_judge(judge, blind)
    assert resolve_judge("none", blind) == "none"


def test_every_trait_gives_rubrics_that_show_both_texts() -> None:
    for trait in (BARE, *(load_trait(name, REPOSITORY) for name in list_traits(REPOSITORY))):
        for rubric in rubrics_of(trait):
            assert {"{question}", "{answer}"} <= set(re.findall(r"\{\w+\}", rubric))
    assert BARE.description in rubrics_of(BARE)[0]


@given(st.dictionaries(st.integers(0, 100), st.floats(0, 1), max_size=8))
def test_the_mean_lies_among_the_numbers_or_is_missing(weights: dict[int, float]) -> None:
    mean = expectation(weights)
    assert (mean is None) == (sum(weights.values()) < 0.25)
    if mean is not None:
        likely = [number for number, weight in weights.items() if weight]
        assert min(likely) - 1e-6 <= mean <= max(likely) + 1e-6


def test_a_nan_is_no_score() -> None:
    assert expectation({50: float("nan")}) is None


# --- a judge for other code -----------------------------------------------------------------------------------------


class Silent:
    """A progress reporter that drops everything."""

    def note(self, text: str) -> None: ...
    def begin(self, title: str, n_examples: int, n_done: int, *, seconds_left: object = None) -> None: ...
    def advance(self, n_examples: int, n_tokens: int) -> None: ...
    def end(self) -> None: ...


def responses_of(*pairs: tuple[str, str]) -> list[JudgedResponse]:
    """Return responses of (question, text)."""
    return [JudgedResponse(question, text) for question, text in pairs]


def test_a_scorer_judges_pairs_in_their_order(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    job = make_plan("demo", "calm", root=str(root))
    score = make_scorer(TraitContext(ModelSession(job), job.traits[0], Silent()))
    judgements = score(responses_of(("Why?", "aaa"), ("Who?", "zzz"), ("What?", "az"), ("How?", "")))
    assert [judgement.score for judgement in judgements] == [100.0, 0.0, 50.0, None]
    assert score([]) == []


# --- a new judge takes an entry in the table ------------------------------------------------------------------------


def test_a_rule_judge_of_the_table_scores_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "length", RuleJudge(lambda question, response, trait: float(len(response))))
    job = make_plan("demo", "calm", root=str(make_root(tmp_path)), options={"judge": "length"})
    judgements = make_scorer(TraitContext(ModelSession(job), job.traits[0], Silent()))(
        responses_of(("Why?", "aaa"), ("Who?", ""))
    )
    assert [judgement.score for judgement in judgements] == [3.0, 0.0]


def test_a_model_judge_of_the_table_rates_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rated: list[str] = []

    def rate(context, texts, save) -> None:
        rated.extend(texts.values())
        save({key: Rating(float(len(text) % 101), how="length") for key, text in texts.items()})

    monkeypatch.setitem(JUDGES, "length", ModelJudge("any name", rate))
    root = str(make_root(tmp_path))
    with pytest.raises(ConfigError, match=r"--judge length.*--judge-model.*any name"):
        make_plan("demo", "calm", root=root, options={"judge": "length"})
    job = make_plan("demo", "calm", root=root, options={"judge": "length", "judge_model": "m"})
    folder = job.folder(job.traits[0])
    (folder.path / "judgements").mkdir(parents=True)
    pairs = responses_of(("Why?", "aaa"), ("Why?", " "), ("Why?", "b" * (MAX_CHARACTERS + 1)))
    first = make_scorer(TraitContext(ModelSession(job), job.traits[0], Silent()))(pairs)
    assert len(rated) == 4  # two rubrics of two responses; an empty one is not rated
    assert make_scorer(TraitContext(ModelSession(job), job.traits[0], Silent()))(pairs) == first
    assert len(rated) == 4
    assert first[1] == Judgement(None, reason="empty")
    assert [f"{MAX_CHARACTERS:,}" in judgement.how for judgement in first] == [False, False, True]
