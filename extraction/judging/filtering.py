"""Filtering by judge scores: the responses that count towards a vector, and why the others do not."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from extraction.core.records import POLARITIES
from extraction.judging.base import EMPTY, FAILED, THRESHOLD, shows_side
from extraction.judging.registry import is_model_judge
from extraction.judging.rubric import REFUSED

Row = Mapping[str, Any]

COHERENCE = "_coherence"  # behind a model judge's name: its other score
# why a response is dropped, in the order of reports: the key of the counts, and its text
REASONS = {
    "wrong_side": "on the wrong side",
    "incoherent": "incoherent",
    "unscored": "without a score",
    "refused": "refused by the judge",
    "failed": "with a failed judge call",
    "empty": "empty",
}
REMEDIES = {  # by judge; others have a model of their own
    "lexical": "give the trait markers that this model's responses hold, or --judge likelihood, local or none",
    "likelihood": "give --judge local or openai with a --judge-model, or --judge none",
}
MAX_UNSCORED = 0.5  # share of the responses with text: beyond it, the kept ones are the judge's selection
MAY_BE_CONSTANT = ("lexical",)  # its scores are shares of few markers, often 0 or 100 alone
MIN_SCORES = 10  # with fewer, their spread is not checked
SAME, NEARLY_ALL = 1.0, 0.95  # this share of scores within this distance of the median is no spread


@dataclass(frozen=True)
class KeptResponses:
    """Ids of the responses that count, by polarity and in order; the question of every id; dropped ones by reason.

    `coherence_threshold` is None for a judge without coherence scores; `scores` are those of all responses.
    """

    judge: str
    threshold: float
    ids: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, str]
    total: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    coherence_threshold: float | None = None
    model: str | None = None
    scores: tuple[float, ...] = ()
    why_missing: Mapping[str, int] = field(default_factory=dict)  # the judge's commonest reasons for no score

    @property
    def n_kept(self) -> int:
        """Number of responses that count, of both sides together."""
        return sum(len(ids) for ids in self.ids.values())

    @property
    def name(self) -> str:
        """The judge, with its model if it has one."""
        return f"{self.judge} judge" + (f" {self.model}" if self.model else "")

    def facts(self) -> dict[str, Any]:
        """Return the counts, JSON-ready."""
        return {
            "judge": self.judge,
            "judge_model": self.model,
            "threshold": None if self.judge == "none" else self.threshold,
            "coherence_threshold": self.coherence_threshold,
            **{f"kept_{polarity}": len(self.ids[polarity]) for polarity in POLARITIES},
            "total": self.total,
            "distinct_scores": len(set(self.scores)) if self.scores else None,
            **{f"dropped_{reason}": self.dropped.get(reason, 0) for reason in REASONS},
        }

    def reasons(self) -> str:
        """Return the dropped responses' counts and reasons as text; empty if none was dropped."""
        return ", ".join(f"{self.dropped[key]} {words}" for key, words in REASONS.items() if self.dropped.get(key))

    @property
    def n_unscored(self) -> int:
        """Number of responses that have tokens and no score."""
        return sum(self.dropped.get(key, 0) for key in ("unscored", "refused", "failed"))

    @property
    def problem(self) -> str | None:
        """Why the judge's scores can't be used; None if they can, or if nothing was judged."""
        if self.judge == "none" or not self.total:
            return None
        why = ", ".join(f"{count} times {reason!r}" for reason, count in self.why_missing.items())
        if not self.scores:
            return f"the {self.name} gave no score to any of {self.total} responses ({why or 'all are empty'})"
        n_texts = self.total - self.dropped.get("empty", 0)
        if self.n_unscored > MAX_UNSCORED * n_texts:
            n_scored = n_texts - self.n_unscored
            return (
                f"the {self.name} could score only {n_scored} of {n_texts} responses, {n_scored / n_texts:.0%} ({why})"
            )
        is_constant = self.judge not in MAY_BE_CONSTANT and len(self.scores) >= MIN_SCORES
        if is_constant and (median := _common_score(self.scores)) is not None:
            return f"the {self.name} gives nearly every response the same score ({median:.4g}), so it doesn't judge"
        for polarity, ids in self.ids.items():
            if not ids:
                side = {"pos": "positive", "neg": "negative"}[polarity]
                return f"the {self.name} leaves no {side} response ({self.reasons() or 'there was none'})"
        return None

    @property
    def remedy(self) -> str:
        """Advice for the user if the scores can't be used."""
        return REMEDIES.get(self.judge, "give another --judge-model, or --judge likelihood or none")


def _common_score(scores: tuple[float, ...]) -> float | None:
    """Return the median if nearly all scores are near it; None if they have a spread."""
    median = statistics.median(scores)
    near = sum(abs(score - median) <= SAME for score in scores)
    return median if near >= NEARLY_ALL * len(scores) else None


def filter_responses(
    rows_by_polarity: Mapping[str, Iterable[Row]],
    judge: str,
    threshold: float,
    *,
    coherence_threshold: float = THRESHOLD,
    model: str | None = None,
) -> KeptResponses:
    """Keep the responses whose scores are on their own side: positive at or above the threshold, negative below it.

    A model judge must find them coherent as well. Empty responses and missing scores are dropped and counted, never
    taken for 0. Judge `none` keeps all that are not empty. Rows are read once.
    """
    ids: dict[str, list[str]] = {polarity: [] for polarity in POLARITIES}
    questions: dict[str, str] = {}
    scores: list[float] = []
    dropped: Counter[str] = Counter()
    why_missing: Counter[str] = Counter()
    for polarity in POLARITIES:
        for row in rows_by_polarity[polarity]:
            questions[row["id"]] = row["question"]
            score = row["scores"].get(judge)
            if score is None:
                why_missing[_reason_of(row)] += 1
            else:
                scores.append(score)
            reason = _reason_to_drop(row, polarity, judge, threshold, coherence_threshold)
            if reason is None:
                ids[polarity].append(row["id"])
            else:
                dropped[reason] += 1
    return KeptResponses(
        judge=judge,
        threshold=threshold,
        ids={polarity: tuple(kept) for polarity, kept in ids.items()},
        questions=questions,
        total=len(questions),
        dropped=dict(dropped),
        coherence_threshold=coherence_threshold if is_model_judge(judge) else None,
        model=model,
        scores=tuple(scores),
        why_missing=dict(why_missing.most_common(3)),
    )


def _reason_to_drop(row: Row, polarity: str, judge: str, threshold: float, coherence_threshold: float) -> str | None:
    """Return a key of REASONS; None for a response that counts."""
    if not row["token_ids"]:
        return "empty"
    if judge == "none":
        return None
    on_own_side = shows_side(polarity, row["scores"].get(judge), threshold)
    if on_own_side is not True:
        return _missing_key(row) if on_own_side is None else "wrong_side"
    if not is_model_judge(judge):
        return None
    coherence = row["scores"].get(judge + COHERENCE)
    if coherence is None:
        return _missing_key(row)
    return None if coherence >= coherence_threshold else "incoherent"


def _reason_of(row: Row) -> str:
    """Return the judge's reason for a missing score."""
    return str(row.get("judged", {}).get("reason") or "no score")


def _missing_key(row: Row) -> str:
    """Return the key of REASONS for a missing score."""
    reason = _reason_of(row)
    known = {REFUSED: "refused", EMPTY: "empty"}
    return "failed" if reason.startswith(FAILED) else known.get(reason, "unscored")
