"""The lexical judge: scores a response by the share of the trait's positive markers among all of its markers."""

from __future__ import annotations

import re
from functools import lru_cache

from extraction.config.patterns import count
from extraction.core.errors import TraitError
from extraction.core.records import Markers, Trait
from extraction.judging.base import RuleJudge


def lexical_score(text: str, markers: Markers) -> float | None:
    """Return 100 * p / (p + n) for p positive and n negative markers in the text's judged part; None if it has none.

    Markers are whole words or phrases, or regular expressions behind `re:`; case does not count. Raises TraitError for
    a pattern that does not compile.
    """
    positive = sum(count(pattern, text) for pattern in _compile_all(markers.positive))
    negative = sum(count(pattern, text) for pattern in _compile_all(markers.negative))
    total = positive + negative
    return 100.0 * positive / total if total else None


@lru_cache(maxsize=256)
def _compile_all(markers: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(_compile(marker) for marker in markers)


def _compile(marker: str) -> re.Pattern[str]:
    """Compile `re:...` as it stands, anything else as a phrase between word boundaries with any white space inside."""
    if marker.startswith("re:"):
        source = marker[3:]
    else:
        phrase = r"\s+".join(re.escape(word) for word in marker.split())
        source = rf"(?<!\w){phrase}(?!\w)"
    try:
        return re.compile(source, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as failure:
        raise TraitError(f"marker {marker!r}: not a valid pattern: {failure}; correct it") from failure


def judge_lexical(question: str, response: str, trait: Trait) -> float | None:
    """Return the lexical score of the response. Raises TraitError without markers, or for an invalid pattern."""
    if trait.markers is None:
        raise TraitError(
            f"trait {trait.name}: has no markers for the lexical judge; add "
            f"'markers: {{positive: [...], negative: [...]}}' to configs/traits/{trait.name}.yaml, or give --judge none"
        )
    try:
        return lexical_score(response, trait.markers)
    except TraitError as failure:
        raise TraitError(f"trait {trait.name}: {failure}") from failure


def _check(trait: Trait) -> None:
    judge_lexical("", "", trait)


JUDGE = RuleJudge(judge_lexical, _check)
