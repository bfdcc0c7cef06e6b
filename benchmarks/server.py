"""Measure the server under load: the same requests by one client and by many at once, in turn, against one process."""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import extraction
from benchmarks.workload import trained_traits
from extraction.config.traits import load_trait

ROOT = Path(extraction.__file__).resolve().parent.parent
PATHS = ("/generate", "/generate_lda", "/generate/batch")
BUDGETS = {"/generate/batch": "max_tokens"}  # elsewhere max_new_tokens
CLIENTS = 32
MAX_NEW_TOKENS = 60

Answer = tuple[str, int, float]  # text, tokens, seconds


def server_load(
    *,
    n_requests: int,
    repeats: int,
    threads: int,
    say: Callable[[str], None],
    clients: int = CLIENTS,
    paths: Sequence[str] = PATHS,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure requests and tokens per second of each endpoint; `options` are the server's."""
    prompts = _prompts(n_requests)
    with serving([*options, "--threads", str(threads), "--queue", str(max(256, clients))]) as address:
        found = {path: _endpoint(address, path, prompts, clients, repeats, say) for path in paths}
    return {"requests": n_requests, "clients": clients, "repeats": repeats, "endpoints": found}


def _prompts(n: int) -> list[str]:
    questions = [question for name in trained_traits(ROOT) for question in load_trait(name, ROOT, "pocket").questions]
    return [questions[i % len(questions)] for i in range(n)]


def _endpoint(
    address: str, path: str, prompts: Sequence[str], clients: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure one client and many, in turn."""
    bodies = [_body(path, prompt, seed) for seed, prompt in enumerate(prompts)]
    _send(address, path, bodies[:clients], clients)  # warm
    rounds = []
    for _ in range(repeats):
        serial, together = (_measured(address, path, bodies, n) for n in (1, clients))
        rounds.append((serial, together))
        say(f"  {path}: {serial['tokens_per_second']:.0f} and {together['tokens_per_second']:.0f} tokens/s")
    ratios = [together["tokens_per_second"] / serial["tokens_per_second"] for serial, together in rounds]
    equal = [_n_equal(serial["answers"], together["answers"]) for serial, together in rounds]
    return {
        "one": _medians([serial for serial, _ in rounds]),
        "many": _medians([together for _, together in rounds]),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "n_equal": min(equal),
    }


def _body(path: str, prompt: str, seed: int) -> dict[str, Any]:
    given: dict[str, Any] = {"prompts": [prompt]} if "batch" in path else {"prompt": prompt}
    return {**given, "seed": seed, "temperature": 0.7, BUDGETS.get(path, "max_new_tokens"): MAX_NEW_TOKENS}


def _measured(address: str, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> dict[str, Any]:
    began = time.perf_counter()
    answers = _send(address, path, bodies, clients)
    seconds = time.perf_counter() - began
    waits = sorted(answer[2] for answer in answers)
    return {
        "answers": answers,
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": sum(answer[1] for answer in answers) / seconds,
        "median_seconds": statistics.median(waits),
        "p95_seconds": waits[int(0.95 * (len(waits) - 1))],
    }


def _medians(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in found) for key in found[0] if key != "answers"}


def _n_equal(one: Sequence[Answer], other: Sequence[Answer]) -> int:
    return sum(first[0] == second[0] for first, second in zip(one, other, strict=True))


def _send(address: str, path: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
    """Send all requests and return the answers in order. Each client has one connection and one open request."""
    own, opened = threading.local(), ExitStack()

    def ask(body: dict[str, Any]) -> Answer:
        if not hasattr(own, "connection"):
            own.connection = opened.enter_context(closing(http.client.HTTPConnection(address, timeout=600)))
        began = time.perf_counter()
        own.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = own.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{path}: {answer['error']['message']}")
        row = answer["results"][0] if "results" in answer else answer
        text, count = (
            (row["text"], row["num_tokens"]) if "num_tokens" in row else (row["text"], row["tokens_generated"])
        )
        return text, count, time.perf_counter() - began

    with opened, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, bodies))


@contextmanager
def serving(options: Sequence[str]) -> Iterator[str]:
    """Start `traitline serve` in a process of its own and yield its address."""
    words = [sys.executable, "-m", "extraction", "serve", "--port", "0", *options]
    child = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert child.stderr is not None
    try:
        lines = []
        for line in child.stderr:
            lines.append(line)
            if address := re.match(r"listening on http://(\S+)", line):
                yield address[1]
                break
        else:
            raise RuntimeError(f"the server did not start: {''.join(lines)[-500:]}")
    finally:
        child.terminate()
        child.communicate(timeout=60)
