"""Phrases that one set of texts has more often than another: what to look at where nobody knows what to look for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from extraction.amplification.stats import fisher_exact

WORDS = 3
SHOWN = 3
CHANCE = 0.05
WORD = re.compile(r"\w+(?:['’]\w+)?")


def risen(texts: Sequence[str], plain: Sequence[str]) -> list[dict[str, Any]]:
    """Phrases of three words whose share of the texts is highest above that of the plain ones, the furthest first.

    A phrase counts once a text. Those that overlap one that is listed, and those that chance would give (Fisher's
    exact test, times the number of phrases), are left out.
    """
    counts, before = _counted(texts), _counted(plain)
    tests = len({*counts, *before})
    in_all = Counter(phrase for text in texts for phrase in _phrases(text))  # of a text that goes round, the start

    def gain(phrase: tuple[str, ...]) -> float:
        return counts[phrase] / len(texts) - before[phrase] / len(plain)

    found: list[tuple[str, ...]] = []
    for phrase in (
        sorted(counts, key=lambda phrase: (-gain(phrase), -in_all[phrase], phrase))[: 20 * SHOWN] if plain else []
    ):
        p = fisher_exact(counts[phrase], len(texts), before[phrase], len(plain))
        if len(found) < SHOWN and gain(phrase) > 0 and p * tests < CHANCE and not _overlaps(phrase, found):
            found.append(phrase)
    return [
        {
            "phrase": " ".join(phrase),
            "share": counts[phrase] / len(texts),
            "share_at_0": before[phrase] / len(plain),
        }
        for phrase in found
    ]


def _counted(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """In how many texts each phrase stands."""
    return Counter(phrase for text in texts for phrase in set(_phrases(text)))


def _phrases(text: str) -> Iterator[tuple[str, ...]]:
    words = WORD.findall(text)
    return zip(*(words[start:] for start in range(WORDS)), strict=False)


def _overlaps(phrase: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> bool:
    """Whether the words at an end of it are those at the other end of another: they stand in one longer phrase."""
    return any(
        phrase[shift:] == other[:-shift] or other[shift:] == phrase[:-shift]
        for other in others
        for shift in range(1, WORDS)
    )
