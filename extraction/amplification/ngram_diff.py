"""Phrases of three words that are more frequent in one set of texts than in another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from extraction.amplification.stats import fisher_exact

N_WORDS = 3
MAX_PHRASES = 3
SIGNIFICANCE = 0.05
WORD = re.compile(r"\w+(?:['’]\w+)?")

Phrase = tuple[str, ...]


def frequent_phrases(texts: Sequence[str], baseline: Sequence[str]) -> list[dict[str, Any]]:
    """Return the phrases whose share of the texts exceeds that of the baseline, by gain: at most MAX_PHRASES.

    A phrase counts once a text. Phrases that overlap one already listed are left out, and so are those that are not
    significant (Fisher's exact test, Bonferroni-corrected for the number of phrases).
    """
    if not baseline:
        return []
    n_texts_with, n_baseline_with = _document_counts(texts), _document_counts(baseline)
    n_tests = len({*n_texts_with, *n_baseline_with})
    occurrences = Counter(phrase for text in texts for phrase in _phrases(text))  # of a loop, the start comes first

    def gain(phrase: Phrase) -> float:
        return n_texts_with[phrase] / len(texts) - n_baseline_with[phrase] / len(baseline)

    candidates = sorted(n_texts_with, key=lambda phrase: (-gain(phrase), -occurrences[phrase], phrase))
    found: list[Phrase] = []
    for phrase in candidates[: 20 * MAX_PHRASES]:
        p = fisher_exact(n_texts_with[phrase], len(texts), n_baseline_with[phrase], len(baseline))
        significant = gain(phrase) > 0 and p * n_tests < SIGNIFICANCE
        if len(found) < MAX_PHRASES and significant and not _overlaps(phrase, found):
            found.append(phrase)
    return [
        {
            "phrase": " ".join(phrase),
            "share": n_texts_with[phrase] / len(texts),
            "share_at_0": n_baseline_with[phrase] / len(baseline),
        }
        for phrase in found
    ]


def _document_counts(texts: Iterable[str]) -> Counter[Phrase]:
    """Count the texts that contain each phrase."""
    return Counter(phrase for text in texts for phrase in set(_phrases(text)))


def _phrases(text: str) -> Iterator[Phrase]:
    words = WORD.findall(text)
    return zip(*(words[start:] for start in range(N_WORDS)), strict=False)


def _overlaps(phrase: Phrase, others: Iterable[Phrase]) -> bool:
    """True if the first words of a phrase are the last of another, or the reverse: both may be of one longer phrase."""
    return any(
        phrase[shift:] == other[:-shift] or other[shift:] == phrase[:-shift]
        for other in others
        for shift in range(1, N_WORDS)
    )
