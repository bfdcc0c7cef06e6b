"""Models, prompts and answers that the measurements share, and their comparison.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import random_model
from extraction.config.experiments import find_root, load_experiment, resolve_model
from extraction.config.traits import load_trait, make_examples
from extraction.model.chat_template import encode_example
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load
from extraction.utils_batch import Request

PROMPT_TOKENS = (40, 80)
RESPONSE_GAMMA = (2.0, 30.0)  # shape and scale: a mean of 60 tokens, and a long tail
RESPONSE_TOKENS = (2, 150)


@dataclass(frozen=True)
class Answer:
    """One response, and the mean of every layer over its tokens."""

    token_ids: tuple[int, ...]
    means_LD: Tensor


@dataclass(frozen=True)
class Agreement:
    """Number of equal answers among those compared, and the deviation of their means.

    `deviation` is the largest absolute difference over the largest absolute value.
    """

    n_equal: int
    n_compared: int
    deviation: float


def make_requests(n: int, vocab_size: int, seed: int = 0) -> list[Request]:
    """Draw random prompts and forced response lengths; the arguments determine them, on any machine."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, n)
    budgets = np.clip(rng.gamma(*RESPONSE_GAMMA, n).round().astype(int), *RESPONSE_TOKENS)
    return [
        Request(f"r{i:04d}", tuple(rng.integers(3, vocab_size, int(length)).tolist()), int(budget))
        for i, (length, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]


def n_tokens(requests: Iterable[Request]) -> int:
    """Return the number of response tokens of a job."""
    return sum(request.max_new_tokens for request in requests)


def compare(answers: Mapping[str, Answer], reference: Mapping[str, Answer]) -> Agreement:
    """Compare answers with a reference. Means are compared where the tokens are equal."""
    both = [(answers[key], reference[key]) for key in reference if key in answers]
    equal = [(ours, theirs) for ours, theirs in both if ours.token_ids == theirs.token_ids]
    return Agreement(len(equal), len(both), max((_deviation(*pair) for pair in equal), default=0.0))


def _deviation(ours: Answer, theirs: Answer) -> float:
    return float((ours.means_LD - theirs.means_LD).abs().max() / theirs.means_LD.abs().max())


def cut(items: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Split requests into batches of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def make_even_requests(n: int, vocab_size: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Draw random prompts of one length, with responses of one length."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows: list[list[int]] = rng.integers(3, vocab_size, (n, prompt_tokens)).tolist()
    return [Request(f"r{i:05d}", tuple(row), new_tokens) for i, row in enumerate(rows)]


NOISE = 0.05  # relative noise on a random model's weights, for a second model that often agrees


def bundled(name: str) -> LanguageModel:
    """Load a model of configs/models in float32."""
    return load(resolve_model(name, find_root(), {"dtype": "float32", "device": "cpu"}))


def random_twin(shape: str) -> LanguageModel:
    """Return the random model of a shape with noise on its weights."""
    lm = random_model(shape)
    generator = torch.Generator().manual_seed(1)
    for weights in lm.model.parameters():
        spread = NOISE * float(weights.std(correction=0))
        weights.data.add_(spread * torch.randn(weights.shape, generator=generator))
    return lm


def trained_traits(root: Path) -> tuple[str, ...]:
    """Return the names of the traits that the bundled model was trained on, sorted."""
    experiment, _ = load_experiment("pocket", root)
    return tuple(sorted(experiment.traits))


def trait_requests(lm: LanguageModel, n: int, max_new_tokens: int, before: str = "") -> list[Request]:
    """Return questions of all traits in turn, without instruction, in the chat template; random ids if there is none.

    `before` is prepended to each question.
    """
    if lm.tokenizer is None:
        return [replace(r, max_new_tokens=max_new_tokens) for r in make_requests(n, lm.vocab_size)]
    root = find_root()
    names = trained_traits(root)
    examples = [make_examples(load_trait(name, root, "pocket"), n // len(names) + 1)[::2] for name in names]
    plain = [example for each in zip(*examples, strict=True) for example in each][:n]
    uninstructed = [replace(example, system=None, question=before + example.question) for example in plain]
    return [
        Request(f"r{i:04d}", encode_example(lm.tokenizer, example).token_ids, max_new_tokens)
        for i, example in enumerate(uninstructed)
    ]


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function; return its result and the seconds it took."""
    started = time.perf_counter()
    result = do()
    return result, time.perf_counter() - started


def in_turn(names: Sequence[str], repeats: int) -> list[list[str]]:
    """Return the order of every round: all names, starting with another one each time."""
    return [[*names[i % len(names) :], *names[: i % len(names)]] for i in range(repeats)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
