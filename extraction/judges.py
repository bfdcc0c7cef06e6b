"""Judges: how far an answer shows a trait, from 0 (the negative side) to 100 (the positive side).

A judge is a function `(question, answer, trait) -> float | None`. None means that it could not tell: missing, never 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import lru_cache

from extraction.errors import ConfigError, TraitError
from extraction.records import Markers, Trait

Judge = Callable[[str, str, Trait], float | None]

THRESHOLD = 50.0


# --- the lexical judge ----------------------------------------------------------------------------------------------


def lexical_score(text: str, markers: Markers) -> float | None:
    """100 * p / (p + n), where p and n count the positive and the negative markers in a text; None when it has none.

    Markers are whole words or phrases, and case does not count. Raises TraitError for a pattern that does not compile.
    """
    positive = sum(_count(pattern, text) for pattern in _compiled(markers.positive))
    negative = sum(_count(pattern, text) for pattern in _compiled(markers.negative))
    total = positive + negative
    return 100.0 * positive / total if total else None


def _count(pattern: re.Pattern[str], text: str) -> int:
    """Matches that hold at least one character."""
    return sum(found.end() > found.start() for found in pattern.finditer(text))


@lru_cache(maxsize=256)
def _compiled(markers: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(_compile(marker) for marker in markers)


def _compile(marker: str) -> re.Pattern[str]:
    """`re:...` as it stands, anything else as a phrase between word boundaries; any space stands for any spaces."""
    if marker.startswith("re:"):
        source = marker[3:]
    else:
        phrase = r"\s+".join(re.escape(word) for word in marker.split())
        source = rf"(?<!\w){phrase}(?!\w)"
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as failure:
        raise TraitError(f"marker {marker!r}: not a valid pattern: {failure}; correct it") from failure


def judge_lexical(question: str, answer: str, trait: Trait) -> float | None:
    """The lexical score of the answer. Raises TraitError where the trait has no markers, or a pattern is invalid."""
    if trait.markers is None:
        raise _no_markers(trait)
    try:
        return lexical_score(answer, trait.markers)
    except TraitError as failure:
        raise TraitError(f"trait {trait.name}: {failure}") from failure


def _no_markers(trait: Trait) -> TraitError:
    return TraitError(
        f"trait {trait.name}: has no markers for the lexical judge; "
        f"add 'markers: {{positive: [...], negative: [...]}}' to configs/traits/{trait.name}.yaml, or give --judge none"
    )


def judge_none(question: str, answer: str, trait: Trait) -> float | None:
    """No judge: every score is missing."""
    return None


# --- choosing -------------------------------------------------------------------------------------------------------

JUDGES: dict[str, Judge] = {"lexical": judge_lexical, "none": judge_none}


def resolve_judge(name: str, trait: Trait) -> tuple[str, Judge]:
    """The judge of a name, ready for a trait: `auto` is lexical where the trait has markers, else none.

    Raises ConfigError for an unknown name, TraitError where the trait can't be judged by it.
    """
    if name == "auto":
        name = "lexical" if trait.markers else "none"
    if name not in JUDGES:
        raise ConfigError(f"judge {name!r}: not known; {_nearest(name)}")
    if name == "lexical":
        judge_lexical("", "", trait)
    return name, JUDGES[name]


def _nearest(name: str) -> str:
    known = ["auto", *JUDGES]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def keep(polarity: str, score: float | None, threshold: float = THRESHOLD) -> bool | None:
    """Whether a response shows its side: `pos` at or above the threshold, `neg` below it. None for a missing score."""
    if score is None:
        return None
    return score >= threshold if polarity == "pos" else score < threshold
