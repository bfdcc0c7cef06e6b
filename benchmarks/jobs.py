"""The job that everybody does: prompts to continue, each for a given number of tokens, and the means of every layer.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from extraction.utils_batch import Request

PROMPT_TOKENS = (40, 80)
RESPONSE_GAMMA = (2.0, 30.0)  # shape and scale: a mean of 60 tokens, and a long tail
RESPONSE_TOKENS = (2, 150)


@dataclass(frozen=True)
class Answer:
    """A response, and the mean of every layer over its tokens."""

    token_ids: tuple[int, ...]
    means_LD: Tensor


@dataclass(frozen=True)
class Agreement:
    """How many of the answers that both sides have hold the same tokens, and how far the means of those are apart.

    `deviation` is the largest absolute difference over the largest absolute value.
    """

    n_equal: int
    n_compared: int
    deviation: float


def make_requests(n: int, vocab_size: int, seed: int = 0) -> list[Request]:
    """Random prompts and forced response lengths: the same for the same arguments, on any machine."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, n)
    budgets = np.clip(rng.gamma(*RESPONSE_GAMMA, n).round().astype(int), *RESPONSE_TOKENS)
    return [
        Request(f"r{i:04d}", tuple(rng.integers(3, vocab_size, int(length)).tolist()), int(budget))
        for i, (length, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]


def n_tokens(requests: Iterable[Request]) -> int:
    """Response tokens of a job."""
    return sum(request.max_new_tokens for request in requests)


def compare(answers: Mapping[str, Answer], reference: Mapping[str, Answer]) -> Agreement:
    """Against the answers of somebody else. Means are compared where the tokens are equal."""
    both = [(answers[key], reference[key]) for key in reference if key in answers]
    equal = [(ours, theirs) for ours, theirs in both if ours.token_ids == theirs.token_ids]
    return Agreement(len(equal), len(both), max((_deviation(*pair) for pair in equal), default=0.0))


def _deviation(ours: Answer, theirs: Answer) -> float:
    return float((ours.means_LD - theirs.means_LD).abs().max() / theirs.means_LD.abs().max())


def cut(items: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Pieces of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def make_even_requests(n: int, vocab_size: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Random prompts of one length, with answers of one length."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows: list[list[int]] = rng.integers(3, vocab_size, (n, prompt_tokens)).tolist()
    return [Request(f"r{i:05d}", tuple(row), new_tokens) for i, row in enumerate(rows)]
