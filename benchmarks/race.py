"""Compare all peers in one run. Their runs take turns, so that a slow machine slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.hardware import linear_rate
from benchmarks.peer_processes import PeerMissingError, peer_processes_for
from benchmarks.peers import PEERS, Answers, Peer
from benchmarks.shapes import random_model
from benchmarks.workload import Agreement, compare, in_turn, make_requests, n_tokens, spread
from extraction.model.language_model import LanguageModel
from extraction.model.onednn_linear import without_onednn
from extraction.utils_batch import Request

Say = Callable[[str], None]
ALWAYS = ("traitline", "serial")  # always run: the subject and the reference answers
REFERENCES = ("serial", "batched")


@dataclass(frozen=True)
class Run:
    """One run of one peer: batch size, rate and answers."""

    peer: str
    batch_size: int
    tokens_per_second: float
    answers: Answers


@dataclass(frozen=True)
class Comparison:
    """The peers, and the model and requests that they run on."""

    peers: Mapping[str, Peer]
    lm: LanguageModel
    requests: Sequence[Request]
    n_serial: int

    def run(self, name: str, batch_size: int, say: Say) -> Run:
        """Run one peer once. `serial` runs on the first `n_serial` examples: all would take hours."""
        requests = self.requests[: self.n_serial] if name == "serial" else self.requests
        gc.collect(1)  # what the last run left; all of it would take a second
        started = time.perf_counter()
        with without_onednn(self.lm.model) if name != "traitline" else nullcontext():
            answers = self.peers[name].run(self.lm, requests, batch_size)
        rate = n_tokens(requests) / (time.perf_counter() - started)
        say(f"  {name}, batch {batch_size}: {rate:.0f} tokens/s")
        return Run(name, batch_size, rate, answers)


@dataclass(frozen=True)
class Selection:
    """The peers to run. `isolated` run in processes and environments of their own.

    `only` names peers to run beside ALWAYS; empty means all. `sizes` replaces the batch sizes of peers with several.
    """

    isolated: Sequence[str] = ()
    only: Sequence[str] = ()
    sizes: tuple[int, ...] = ()


ALL = Selection()


def race(
    shape: str,
    *,
    n_examples: int,
    n_serial: int,
    repeats: int,
    scouts: int = 1,
    say: Say,
    selection: Selection = ALL,
) -> dict[str, Any]:
    """Run every batch size `scouts` times to find each peer's best, then the best ones `repeats` times in turn."""
    lm = random_model(shape)
    requests = make_requests(n_examples, lm.vocab_size)
    local, isolated = select_peers(selection.only, selection.isolated)
    with peer_processes_for(isolated, lm, requests, say) as found:
        peers = {name: PEERS[name] for name in local} | {name: peer for name, (peer, _) in found.items()}
        if selection.sizes:
            peers = {
                n: replace(p, batch_sizes=selection.sizes) if len(p.batch_sizes) > 1 else p for n, p in peers.items()
            }
        measured = run_all(Comparison(peers, lm, requests, n_serial), repeats=repeats, scouts=scouts, say=say)
    return {
        "shape": shape,
        **measured,
        "floor": max(linear_rate(lm, size) for size in PEERS["traitline"].batch_sizes),
        "versions": {name: installed for name, (_, installed) in found.items()},
        "left_out": [name for name in isolated if name not in measured["peers"]],
        "not_asked": [name for name in PEERS if name not in local],
    }


def select_peers(only: Sequence[str], isolated: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the peers of this process, and the isolated ones: those that `only` names, and all of `isolated`."""
    local = [name for name in PEERS if not only or name in only or name in ALWAYS]
    return local, list(dict.fromkeys((*isolated, *(name for name in only if name not in PEERS))))


def run_all(comparison: Comparison, *, repeats: int, scouts: int, say: Say) -> dict[str, Any]:
    """Run trials, then rounds in turn; return the figures of every peer whose process did not end."""
    n_examples, present = len(comparison.requests), dict(comparison.peers)
    tried: list[Run] = []
    for _ in range(scouts):
        for name in list(present):
            tried += _runs(comparison, present, name, present[name].sizes_for(n_examples), say)
    tried = [run for run in tried if run.peer in present]
    best = {run.peer: run.batch_size for run in sorted(tried, key=lambda run: run.tokens_per_second)}
    raced = [
        [run for name in order if name in present for run in _runs(comparison, present, name, [best[name]], say)]
        for order in in_turn(list(best), repeats)
    ]
    rounds = [{run.peer: run for run in runs if run.peer in present} for runs in raced]
    return {
        "parameters": sum(weights.numel() for weights in comparison.lm.model.parameters()),
        "examples": n_examples,
        "tokens": n_tokens(comparison.requests),
        "serial_examples": min(comparison.n_serial, n_examples),
        "repeats": repeats,
        "ratio": spread([_ratio(rates_of(each)) for each in rounds]),
        "peers": {name: _figures(peer.title, tried, rounds, name) for name, peer in present.items()},
    }


def _runs(comparison: Comparison, present: dict[str, Peer], name: str, sizes: Sequence[int], say: Say) -> list[Run]:
    """One peer at some batch sizes. An process_ whose process ends is present no longer, with a line."""
    try:
        return [comparison.run(name, size, say) for size in sizes]
    except PeerMissingError as reason:
        say(f"  left out: {reason}")
        del present[name]
        return []


def rates_of(each: Mapping[str, Run]) -> dict[str, float]:
    """Return the tokens per second of one round, by peer."""
    return {name: run.tokens_per_second for name, run in each.items()}


def _ratio(rates: Mapping[str, float]) -> float:
    """Return Traitline's rate over that of the best other peer."""
    return rates["traitline"] / max(rate for name, rate in rates.items() if name != "traitline")


def _figures(title: str, tried: Sequence[Run], rounds: Sequence[Mapping[str, Run]], name: str) -> dict[str, Any]:
    """Return one peer's figures. `ratio` is Traitline's rate over the peer's, in the same round."""
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
    """Return the fewest equal answers and the largest deviation over all runs of a peer."""
    return Agreement(
        min(each.n_equal for each in agreements),
        agreements[0].n_compared,
        max(each.deviation for each in agreements),
    )
