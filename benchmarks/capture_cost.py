"""Measure the cost of capture: the engine with and without it, in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.shapes import random_model
from benchmarks.workload import make_requests, n_tokens
from extraction.activations.pooled import Capture
from extraction.engine.generate import generate
from extraction.model.language_model import LanguageModel
from extraction.utils_batch import Request

PAIRS_PER_REPEAT = 5


def capture_cost(
    shape: str, *, n_examples: int, repeats: int, say: Callable[[str], None], batch_size: int = 32
) -> dict[str, Any]:
    """Run pairs in alternating order; return the ratio of each pair, time with capture over time without."""
    lm = random_model(shape)
    requests = make_requests(n_examples, lm.vocab_size)
    _seconds(lm, requests[:batch_size], batch_size, captures=True)  # warm
    pairs = []
    for i in range(repeats * PAIRS_PER_REPEAT):
        order = (True, False) if i % 2 else (False, True)
        took = {captures: _seconds(lm, requests, batch_size, captures=captures) for captures in order}
        pairs.append((took[True], took[False]))
        say(f"  pair {i}: {took[True] / took[False]:.3f}")
    return {
        "shape": shape,
        "examples": n_examples,
        "tokens": n_tokens(requests),
        "batch_size": batch_size,
        **ratios(pairs),
    }


def ratios(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return median and quartiles of the pairs' ratios, and the ratio of the quickest runs."""
    each = sorted(on / off for on, off in pairs)
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return {
        "pairs": len(each),
        "ratio": {"median": median, "quartile_low": low, "quartile_high": high, "min": each[0], "max": each[-1]},
        "ratio_of_quickest": min(on for on, _ in pairs) / min(off for _, off in pairs),
        "seconds_on": [on for on, _ in pairs],
        "seconds_off": [off for _, off in pairs],
    }


def _seconds(lm: LanguageModel, requests: list[Request], batch_size: int, *, captures: bool) -> float:
    capture = Capture(tuple(range(lm.n_layers))) if captures else None
    gc.collect()
    started = time.perf_counter()
    for _ in generate(lm, requests, batch_size=batch_size, capture=capture):
        pass
    return time.perf_counter() - started
