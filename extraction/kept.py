"""Which responses count towards a vector, and why the others don't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from extraction.judges import keep
from extraction.records import POLARITIES

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Ids that count, by polarity and in order; the question of every id; how many were dropped for which reason."""

    judge: str
    threshold: float
    ids: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, str]
    total: int
    empty: int
    unscored: int
    wrong_side: int

    @property
    def n_kept(self) -> int:
        """How many count, both sides together."""
        return sum(len(ids) for ids in self.ids.values())

    def facts(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        return {
            "judge": self.judge,
            "threshold": None if self.judge == "none" else self.threshold,
            **{f"kept_{polarity}": len(self.ids[polarity]) for polarity in POLARITIES},
            "total": self.total,
            "dropped_empty": self.empty,
            "dropped_unscored": self.unscored,
            "dropped_wrong_side": self.wrong_side,
        }


def kept_examples(rows_by_polarity: Mapping[str, Iterable[Row]], judge: str, threshold: float) -> Kept:
    """Apply a judge's scores: positive at or above the threshold, negative below. Rows are read once.

    An empty response and a missing score are dropped and counted; neither is a score of 0. Judge `none` keeps the rest.
    """
    ids: dict[str, list[str]] = {polarity: [] for polarity in POLARITIES}
    questions: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for polarity in POLARITIES:
        for row in rows_by_polarity[polarity]:
            questions[row["id"]] = row["question"]
            reason = _reason_to_drop(row, polarity, judge, threshold)
            if reason is None:
                ids[polarity].append(row["id"])
            else:
                dropped[reason] += 1
    return Kept(
        judge=judge,
        threshold=threshold,
        ids={polarity: tuple(kept) for polarity, kept in ids.items()},
        questions=questions,
        total=len(questions),
        empty=dropped["empty"],
        unscored=dropped["unscored"],
        wrong_side=dropped["wrong side"],
    )


def _reason_to_drop(row: Row, polarity: str, judge: str, threshold: float) -> str | None:
    if not row["token_ids"]:
        return "empty"
    if judge == "none":
        return None
    verdict = keep(polarity, row["scores"].get(judge), threshold)
    return {None: "unscored", False: "wrong side", True: None}[verdict]
