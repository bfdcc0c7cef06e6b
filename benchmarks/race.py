"""The race: all peers in one run, interleaved, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.floor import linear_rate
from benchmarks.jobs import Agreement, compare, make_requests, n_tokens
from benchmarks.peers import PEERS, Answers
from benchmarks.shapes import random_model
from extraction.models import LanguageModel
from extraction.utils_batch import Request

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One peer, once: its batch size, its rate, its answers."""

    peer: str
    batch_size: int
    tokens_per_second: float
    answers: Answers


def race(shape: str, *, n_examples: int, n_serial: int, repeats: int, scouts: int = 1, say: Say) -> dict[str, Any]:
    """Every batch size `scouts` times, to find each peer's best; then the best ones `repeats` times, in turn.

    One at a time is measured on the first `n_serial` examples, since all of them would take hours.
    """
    lm = random_model(shape)
    requests = make_requests(n_examples, lm.vocab_size)
    tried = [
        _run(name, size, lm, _share(name, requests, n_serial), say)
        for _ in range(scouts)
        for name, peer in PEERS.items()
        for size in peer.sizes_for(n_examples)
    ]
    best = {run.peer: run.batch_size for run in sorted(tried, key=lambda run: run.tokens_per_second)}
    rounds = [
        {name: _run(name, best[name], lm, _share(name, requests, n_serial), say) for name in PEERS}
        for _ in range(repeats)
    ]
    return {
        "shape": shape,
        "parameters": sum(weights.numel() for weights in lm.model.parameters()),
        "examples": n_examples,
        "tokens": n_tokens(requests),
        "serial_examples": min(n_serial, n_examples),
        "repeats": repeats,
        "floor": max(linear_rate(lm, size) for size in PEERS["traitline"].batch_sizes),
        "ratio": _spread([_ratio(rates_of(each)) for each in rounds]),
        "peers": {name: _figures(name, tried, rounds, best[name]) for name in PEERS},
    }


def _share(name: str, requests: Sequence[Request], n_serial: int) -> Sequence[Request]:
    return requests[:n_serial] if name == "serial" else requests


def _run(name: str, batch_size: int, lm: LanguageModel, requests: Sequence[Request], say: Say) -> Run:
    gc.collect()
    started = time.perf_counter()
    answers = PEERS[name].run(lm, requests, batch_size)
    rate = n_tokens(requests) / (time.perf_counter() - started)
    say(f"  {name}, batch {batch_size}: {rate:.0f} tokens/s")
    return Run(name, batch_size, rate, answers)


def rates_of(each: Mapping[str, Run]) -> dict[str, float]:
    """Tokens per second of one round."""
    return {name: run.tokens_per_second for name, run in each.items()}


def _ratio(rates: Mapping[str, float]) -> float:
    """How many times faster than the best of the others."""
    return rates["traitline"] / max(rate for name, rate in rates.items() if name != "traitline")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _figures(name: str, tried: Sequence[Run], rounds: Sequence[Mapping[str, Run]], best: int) -> dict[str, Any]:
    """What one peer's row tells."""
    runs = [run for run in tried if run.peer == name] + [each[name] for each in rounds]
    references = {
        "serial": next(run.answers for run in tried if run.peer == "serial"),
        "batched": next(run.answers for run in tried if run.peer == "batched"),
    }
    return {
        "title": PEERS[name].title,
        "batch_size": best,
        "tokens_per_second": _spread([each[name].tokens_per_second for each in rounds]),
        "by_batch_size": {
            str(run.batch_size): run.tokens_per_second
            for run in sorted(tried, key=lambda run: (run.batch_size, run.tokens_per_second))
            if run.peer == name  # of several runs the quickest stays
        },
        "agreement": {
            other: asdict(_worst([compare(run.answers, answers) for run in runs]))
            for other, answers in references.items()
        },
    }


def _worst(agreements: Sequence[Agreement]) -> Agreement:
    """Over all runs of a peer: the fewest equal, the largest deviation."""
    return Agreement(
        min(each.n_equal for each in agreements),
        agreements[0].n_compared,
        max(each.deviation for each in agreements),
    )
