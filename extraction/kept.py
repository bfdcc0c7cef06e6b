"""Which responses count towards a vector, and why the others don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.judges import keep
from extraction.records import POLARITIES

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Ids that count, by polarity and in order; the question of every id; how many were dropped for which reason."""

    judge: str
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
            **{f"kept_{polarity}": len(self.ids[polarity]) for polarity in POLARITIES},
            "total": self.total,
            "dropped_empty": self.empty,
            "dropped_unscored": self.unscored,
            "dropped_wrong_side": self.wrong_side,
        }


def kept_examples(rows_by_polarity: Mapping[str, Sequence[Row]], judge: str, threshold: float) -> Kept:
    """Apply a judge's scores: positive at or above the threshold, negative below.

    An empty response and a missing score are dropped and counted; neither is a score of 0. Judge `none` keeps the rest.
    """
    verdicts = {
        row["id"]: _reason_to_drop(row, polarity, judge, threshold)
        for polarity in POLARITIES
        for row in rows_by_polarity[polarity]
    }
    reasons = list(verdicts.values())
    return Kept(
        judge=judge,
        ids={
            polarity: tuple(row["id"] for row in rows_by_polarity[polarity] if verdicts[row["id"]] is None)
            for polarity in POLARITIES
        },
        questions={row["id"]: row["question"] for rows in rows_by_polarity.values() for row in rows},
        total=len(verdicts),
        empty=reasons.count("empty"),
        unscored=reasons.count("unscored"),
        wrong_side=reasons.count("wrong side"),
    )


def _reason_to_drop(row: Row, polarity: str, judge: str, threshold: float) -> str | None:
    if not row["token_ids"]:
        return "empty"
    if judge == "none":
        return None
    verdict = keep(polarity, row["scores"].get(judge), threshold)
    return {None: "unscored", False: "wrong side", True: None}[verdict]
