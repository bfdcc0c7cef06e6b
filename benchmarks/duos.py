"""Two models of one vocabulary and prompts for them: the bundled ones, or random ones of any other shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.jobs import make_requests
from benchmarks.shapes import random_model
from extraction.config.experiments import find_root, resolve_model
from extraction.config.traits import list_traits, load_trait, make_examples
from extraction.model.chat_template import encode_example
from extraction.model.loading import LanguageModel, load
from extraction.utils_batch import Request

NOISE = 0.05  # of a random model's weights, to have another one of nearly the same mind


def bundled(name: str) -> LanguageModel:
    """A model of configs/models, in float32."""
    return load(resolve_model(name, find_root(), {"dtype": "float32", "device": "cpu"}))


def random_twin(shape: str) -> LanguageModel:
    """The random model of a shape, a little off."""
    lm = random_model(shape)
    generator = torch.Generator().manual_seed(1)
    for weights in lm.model.parameters():
        spread = NOISE * float(weights.std(correction=0))
        weights.data.add_(spread * torch.randn(weights.shape, generator=generator))
    return lm


def ask(lm: LanguageModel, n: int, max_new_tokens: int, before: str = "") -> list[Request]:
    """Questions of all traits in turn, uninstructed, as the model's chat template has them; random ids without one.

    `before` goes before each.
    """
    if lm.tokenizer is None:
        return [replace(r, max_new_tokens=max_new_tokens) for r in make_requests(n, lm.vocab_size)]
    root = find_root()
    names = list_traits(root)
    examples = [make_examples(load_trait(name, root), n // len(names) + 1)[::2] for name in names]
    plain = [example for each in zip(*examples, strict=True) for example in each][:n]
    asked = [replace(example, system=None, question=before + example.question) for example in plain]
    return [
        Request(f"r{i:04d}", encode_example(lm.tokenizer, example).token_ids, max_new_tokens)
        for i, example in enumerate(asked)
    ]


def timed(do: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds that it takes."""
    started = time.perf_counter()
    found = do()
    return found, time.perf_counter() - started


def in_turn(names: Sequence[str], repeats: int) -> list[list[str]]:
    """The order of every round: all sides, another one first each time."""
    return [[*names[i % len(names) :], *names[: i % len(names)]] for i in range(repeats)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
