"""The index of an experiment's capture sets: what each holds, and links to their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from extraction.report import formatting
from extraction.report.markup import Html, document, table, tag


@dataclass(frozen=True)
class SetRow:
    """A capture set; `link` is the way to its page, None where there is none. `asked` prompts, of which `done`."""

    experiment: str
    name: str
    tier: int
    model: str
    traits: Sequence[str]
    layers: Sequence[int]
    done: int
    asked: int
    link: str | None


TIERS = {2: "2: projections", 3: "3: one layer's internals"}


def sets_index(rows: Sequence[SetRow]) -> bytes:
    """A table of the sets, in the order given."""
    experiment = rows[0].experiment if rows else "No capture set"
    heads = ("Set", "Tier", "Traits", "Layers", "Prompts", "Model")
    body = tag(
        "main",
        tag("header", tag("p", "Traitline captures", class_="kicker"), tag("h1", experiment)),
        tag(
            "p",
            "Each set is one prompt file under one configuration, read token by token: how far every token of prompt "
            "and response lies along the traits' directions.",
        ),
        table(heads, [_row(row) for row in rows], caption="Capture sets", class_="figures index")
        if rows
        else tag("p", "There is none yet."),
    )
    return document(f"{experiment}: Traitline captures", body)


def _row(row: SetRow) -> list[Any]:
    link: str | Html = tag("a", row.name, href=row.link) if row.link else row.name
    prompts = f"{row.done:,}" if row.done == row.asked else f"{row.done:,} of {row.asked:,}"
    layers = formatting.ranges(row.layers) if row.layers else "none"
    return [link, TIERS.get(row.tier, str(row.tier)), formatting.listed(list(row.traits)), layers, prompts, row.model]
