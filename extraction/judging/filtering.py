"""Which responses count towards a vector, and why the others don't."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from extraction.core.records import POLARITIES
from extraction.judging.registry import EMPTY, FAILED, READERS, THRESHOLD, keep
from extraction.judging.rubric import REFUSED

Row = Mapping[str, Any]

COHERENCE = "_coherence"  # behind a judge's name: its other score
# why a response is dropped, in the order of reports: the key of the counts, and the words
REASONS = {
    "wrong_side": "on the wrong side",
    "incoherent": "incoherent",
    "unscored": "without a score",
    "refused": "refused by the judge",
    "failed": "that the judge could not be asked about",
    "empty": "empty",
}
FEW = 10  # scores, below which nothing is said of their spread
SAME, NEARLY_ALL = 1.0, 0.95  # so many scores this near to their median are no spread


@dataclass(frozen=True)
class KeptResponses:
    """Ids that count, by polarity and in order; the question of every id; how many were dropped for which reason.

    `coherence_threshold` is None where the judge rates no coherence; `scores` are all that were given.
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
    why_missing: Mapping[str, int] = field(default_factory=dict)  # in the judge's own words

    @property
    def n_kept(self) -> int:
        """How many count, both sides together."""
        return sum(len(ids) for ids in self.ids.values())

    @property
    def name(self) -> str:
        """The judge, with its model where it has one."""
        return f"{self.judge} judge" + (f" {self.model}" if self.model else "")

    def facts(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
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
        """What was dropped and why, in words; empty where nothing was."""
        return ", ".join(f"{self.dropped[key]} {words}" for key, words in REASONS.items() if self.dropped.get(key))

    @property
    def problem(self) -> str | None:
        """Why this judge can't be relied on here; None where nothing speaks against it, or it only counts words."""
        if self.judge not in READERS:
            return None
        if self.total and not self.scores:
            said = ", ".join(f"{count} times {reason!r}" for reason, count in self.why_missing.items())
            return f"the {self.name} gave no score to any of {self.total} responses ({said or 'all are empty'})"
        if len(self.scores) >= FEW and (middle := _same_score(self.scores)) is not None:
            return f"the {self.name} gives nearly every response the same score ({middle:.4g}), so it doesn't judge"
        for polarity, ids in self.ids.items():
            if not ids:
                side = {"pos": "positive", "neg": "negative"}[polarity]
                return f"the {self.name} leaves no {side} response ({self.reasons() or 'there was none'})"
        return None


def _same_score(scores: tuple[float, ...]) -> float | None:
    """The median, where nearly all scores are; None where they have a spread."""
    middle = statistics.median(scores)
    near = sum(abs(score - middle) <= SAME for score in scores)
    return middle if near >= NEARLY_ALL * len(scores) else None


def filter_responses(
    rows_by_polarity: Mapping[str, Iterable[Row]],
    judge: str,
    threshold: float,
    *,
    coherence_threshold: float = THRESHOLD,
    model: str | None = None,
) -> KeptResponses:
    """Apply a judge's scores: positive at or above the threshold, negative below. Rows are read once.

    A judge that reads must find a response coherent, too. An empty response and a missing score are dropped and
    counted; neither is a score of 0. Judge `none` keeps the rest.
    """
    ids: dict[str, list[str]] = {polarity: [] for polarity in POLARITIES}
    questions: dict[str, str] = {}
    scores: list[float] = []
    dropped: Counter[str] = Counter()
    why_missing: Counter[str] = Counter()
    for polarity in POLARITIES:
        for row in rows_by_polarity[polarity]:
            questions[row["id"]] = row["question"]
            scores += [score for score in (row["scores"].get(judge),) if score is not None]
            if row["scores"].get(judge) is None:
                why_missing[_why_missing(row)] += 1
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
        coherence_threshold=coherence_threshold if judge in READERS else None,
        model=model,
        scores=tuple(scores),
        why_missing=dict(why_missing.most_common(3)),
    )


def _reason_to_drop(row: Row, polarity: str, judge: str, threshold: float, coherence_threshold: float) -> str | None:
    """A key of REASONS; None for a response that counts."""
    if not row["token_ids"]:
        return "empty"
    if judge == "none":
        return None
    verdict = keep(polarity, row["scores"].get(judge), threshold)
    if verdict is not True:
        return _missing(row) if verdict is None else "wrong_side"
    if judge not in READERS:
        return None
    coherence = row["scores"].get(judge + COHERENCE)
    if coherence is None:
        return _missing(row)
    return None if coherence >= coherence_threshold else "incoherent"


def _why_missing(row: Row) -> str:
    return str(row.get("judged", {}).get("reason") or "no score")


def _missing(row: Row) -> str:
    reason = _why_missing(row)
    known = {REFUSED: "refused", EMPTY: "empty"}
    return "failed" if reason.startswith(FAILED) else known.get(reason, "unscored")
