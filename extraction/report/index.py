"""The index of an experiment: its traits with their verdicts, and links to their reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.report import formatting
from extraction.report.markup import Html, document, table, tag
from extraction.report.sections import WORDS


@dataclass(frozen=True)
class IndexEntry:
    """A trait of an experiment; `link` is the way to its report, None where there is none."""

    trait: str
    card: Mapping[str, Any]
    steering: Mapping[str, Any] | None
    link: str | None


def index_page(experiment: str, entries: Sequence[IndexEntry]) -> bytes:
    """A table of all traits."""
    heads = ("Trait", "Verdict", "Held-out AUROC", "Steering reach", "Vector")
    body = tag(
        "main",
        tag("header", tag("p", "Traitline", class_="kicker"), tag("h1", experiment)),
        tag(
            "p",
            "AUROC, on questions that played no part in making the vector: the chance that a positive response lies "
            "further along the direction than a negative one; 1 is always, 0.5 is guessing. In brackets, the 95% "
            "interval. Steering reach: lowest and highest share of answers that show the trait when the direction is "
            "added to the model, while its text stays coherent.",
        ),
        table(heads, [_row(entry) for entry in entries], caption="Traits of this experiment", class_="figures index"),
    )
    return document(f"{experiment}: Traitline", body)


def _row(entry: IndexEntry) -> list[Any]:
    chosen, word = entry.card["chosen"], entry.card["verdict"]["word"]
    return [
        tag("a", entry.trait, href=entry.link) if entry.link else entry.trait,
        tag("span", word, class_=f"word small {WORDS.get(word, 'not-shown')}"),
        formatting.with_interval("auroc", chosen["test"]["auroc"]),
        _reach(entry.steering),
        f"{chosen['method']}, layer {chosen['layer']}",
    ]


def _reach(steering: Mapping[str, Any] | None) -> str | Html:
    if steering is None:
        return "not measured"
    reached = steering["reached"]
    return f"{formatting.percent(reached['negative'])} to {formatting.percent(reached['positive'])}"
