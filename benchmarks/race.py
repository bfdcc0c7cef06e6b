"""The race: all peers in one run, interleaved, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.duos import in_turn, spread
from benchmarks.floor import linear_rate
from benchmarks.jobs import Agreement, compare, make_requests, n_tokens
from benchmarks.outside import AbsentError, outsiders
from benchmarks.peers import PEERS, Answers, Peer
from benchmarks.shapes import random_model
from extraction.model.loading import LanguageModel
from extraction.model.onednn_linear import without_onednn
from extraction.utils_batch import Request

Say = Callable[[str], None]
ALWAYS = ("traitline", "serial")  # who is raced against, and whose answers are the right ones
REFERENCES = ("serial", "batched")


@dataclass(frozen=True)
class Run:
    """One peer, once: its batch size, its rate, its answers."""

    peer: str
    batch_size: int
    tokens_per_second: float
    answers: Answers


@dataclass(frozen=True)
class Track:
    """Who runs, and on what."""

    peers: Mapping[str, Peer]
    lm: LanguageModel
    requests: Sequence[Request]
    n_serial: int

    def run(self, name: str, batch_size: int, say: Say) -> Run:
        """One peer, once. One at a time is measured on the first `n_serial` examples: all would take hours."""
        requests = self.requests[: self.n_serial] if name == "serial" else self.requests
        gc.collect(1)  # what the last run left; all of it would take a second
        started = time.perf_counter()
        with without_onednn(self.lm.model) if name != "traitline" else nullcontext():
            answers = self.peers[name].run(self.lm, requests, batch_size)
        rate = n_tokens(requests) / (time.perf_counter() - started)
        say(f"  {name}, batch {batch_size}: {rate:.0f} tokens/s")
        return Run(name, batch_size, rate, answers)


@dataclass(frozen=True)
class Entry:
    """Who races. `guests` are outsiders, which run in processes of their own beside the peers of this one.

    `only`: who races besides those of ALWAYS; everybody where none is named. `sizes`: batch sizes to try, for those
    that have more than one; else each peer's own.
    """

    guests: Sequence[str] = ()
    only: Sequence[str] = ()
    sizes: tuple[int, ...] = ()


ENTRY = Entry()


def race(
    shape: str,
    *,
    n_examples: int,
    n_serial: int,
    repeats: int,
    scouts: int = 1,
    say: Say,
    entry: Entry = ENTRY,
) -> dict[str, Any]:
    """Every batch size `scouts` times, to find each peer's best; then the best ones `repeats` times, in turn."""
    lm = random_model(shape)
    requests = make_requests(n_examples, lm.vocab_size)
    at_home, invited = field_of(entry.only, entry.guests)
    with outsiders(invited, lm, requests, say) as found:
        peers = {name: PEERS[name] for name in at_home} | {name: peer for name, (peer, _) in found.items()}
        if entry.sizes:
            peers = {n: replace(p, batch_sizes=entry.sizes) if len(p.batch_sizes) > 1 else p for n, p in peers.items()}
        measured = run_all(Track(peers, lm, requests, n_serial), repeats=repeats, scouts=scouts, say=say)
    return {
        "shape": shape,
        **measured,
        "floor": max(linear_rate(lm, size) for size in PEERS["traitline"].batch_sizes),
        "versions": {name: installed for name, (_, installed) in found.items()},
        "left_out": [name for name in invited if name not in measured["peers"]],
        "not_asked": [name for name in PEERS if name not in at_home],
    }


def field_of(only: Sequence[str], guests: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which peers of this process race, and which outsiders: those of `only` where it names any, and all `guests`."""
    at_home = [name for name in PEERS if not only or name in only or name in ALWAYS]
    return at_home, list(dict.fromkeys((*guests, *(name for name in only if name not in PEERS))))


def run_all(track: Track, *, repeats: int, scouts: int, say: Say) -> dict[str, Any]:
    """Scouts, then rounds in turn: the figures of every peer that lasts to the end."""
    n_examples, present = len(track.requests), dict(track.peers)
    tried: list[Run] = []
    for _ in range(scouts):
        for name in list(present):
            tried += _runs(track, present, name, present[name].sizes_for(n_examples), say)
    tried = [run for run in tried if run.peer in present]
    best = {run.peer: run.batch_size for run in sorted(tried, key=lambda run: run.tokens_per_second)}
    raced = [
        [run for name in order if name in present for run in _runs(track, present, name, [best[name]], say)]
        for order in in_turn(list(best), repeats)
    ]
    rounds = [{run.peer: run for run in runs if run.peer in present} for runs in raced]
    return {
        "parameters": sum(weights.numel() for weights in track.lm.model.parameters()),
        "examples": n_examples,
        "tokens": n_tokens(track.requests),
        "serial_examples": min(track.n_serial, n_examples),
        "repeats": repeats,
        "ratio": spread([_ratio(rates_of(each)) for each in rounds]),
        "peers": {name: _figures(peer.title, tried, rounds, name) for name, peer in present.items()},
    }


def _runs(track: Track, present: dict[str, Peer], name: str, sizes: Sequence[int], say: Say) -> list[Run]:
    """One peer at some batch sizes. An outsider whose process ends is present no longer, with a line."""
    try:
        return [track.run(name, size, say) for size in sizes]
    except AbsentError as reason:
        say(f"  left out: {reason}")
        del present[name]
        return []


def rates_of(each: Mapping[str, Run]) -> dict[str, float]:
    """Tokens per second of one round."""
    return {name: run.tokens_per_second for name, run in each.items()}


def _ratio(rates: Mapping[str, float]) -> float:
    """How many times faster than the best of the others."""
    return rates["traitline"] / max(rate for name, rate in rates.items() if name != "traitline")


def _figures(title: str, tried: Sequence[Run], rounds: Sequence[Mapping[str, Run]], name: str) -> dict[str, Any]:
    """What one peer's row tells. `ratio`: the engine's tokens per second over its own, in the same round."""
    runs = [run for run in tried if run.peer == name] + [each[name] for each in rounds]
    answered = {run.peer: run.answers for run in reversed(tried)}
    references = {other: answered[other] for other in REFERENCES if other in answered}
    rates = [rates_of(each) for each in rounds]
    return {
        "title": title,
        "batch_size": rounds[0][name].batch_size,
        "tokens_per_second": spread([each[name] for each in rates]),
        "ratio": spread([each["traitline"] / each[name] for each in rates]),
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
