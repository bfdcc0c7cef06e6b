"""What a report is made from: plain values that a caller has read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.core.records import Trait

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ReportData:
    """One trait's run. `steering` is None where no sweep was made; `kept` are the ids of the responses that count.

    `judge` is the name under which a row's `scores` hold the score that decided. `files` are paths below the run's
    folder: `vectors` (of the chosen method), `steering` (of the method that steers), `pos` and `neg`. `hashes` are
    sha256 by what they are of, and `made_with` is what the receipts tell of versions and hardware.
    """

    trait: Trait
    card: Mapping[str, Any]
    steering: Mapping[str, Any] | None
    rows: Sequence[Row]
    kept: Collection[str]
    judge: str
    config: Mapping[str, Any]
    files: Mapping[str, str]
    hashes: Mapping[str, str]
    made_with: Mapping[str, Any]
