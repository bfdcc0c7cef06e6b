"""Measure a decode step and a teacher-forced pass over the time that memory and arithmetic need for them.

A decode step reads all weights once and every row's cache; its operations are two for every weight and row, and four
for every cached token, row and number of a query. The teacher-forced pass does the same for whole texts, without the
head. Both are measured through the engine's public functions.

Shapes: B rows, P prompt tokens, N new tokens.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks.hardware import Limits, limits, linear_rate, threads
from benchmarks.reading_cost import device_name
from benchmarks.shapes import random_model
from benchmarks.workload import make_even_requests, spread
from extraction.activations.pooled import Capture
from extraction.engine.generate import generate, teacher_force
from extraction.model.devices import synchronize
from extraction.model.language_model import LanguageModel
from extraction.model.memory import shape_of

PROMPT_TOKENS = 60
BATCH_SIZES = {"cpu": (1, 8, 32, 64), "cuda": (1, 8, 32, 64, 128)}
NEW_TOKENS = 33  # the first comes with the prompt
FORCED_TOKENS = 128
LARGE = 10**9  # parameters; from here on a processor takes seconds a step
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """Bytes and operations of a step or a pass."""

    n_bytes: float
    flops: float


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the floor of a model.

    `body` and `head` count weights that every row is multiplied by. `cache_bytes` are the keys and values of a token in
    all layers. `query_width` is the sum of the query widths of all layers.
    """

    body: int
    head: int
    itemsize: int
    cache_bytes: int
    query_width: int

    @staticmethod
    def of(config: Any, dtype: torch.dtype) -> Sizes:
        """Return the sizes of a model's text config, without weights."""
        shape = shape_of(config, dtype)
        head = config.vocab_size * config.hidden_size
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // shape.heads
        return Sizes(
            body=shape.n_multiplied - head,
            head=head,
            itemsize=dtype.itemsize,
            cache_bytes=shape.kv_width * dtype.itemsize,
            query_width=shape.heads * head_dim * shape.n_layers,
        )

    @staticmethod
    def of_model(lm: LanguageModel) -> Sizes:
        """Return the sizes of a loaded model."""
        return Sizes.of(lm.model.config.get_text_config(), lm.dtype)

    def decode_step(self, rows: int, columns: float) -> Work:
        """Return the work of one token for every row, each with `columns` tokens in its cache."""
        weights = self.body + self.head
        flops = 2 * weights * rows + 4 * self.query_width * columns * rows
        return Work(weights * self.itemsize + self.cache_bytes * columns * rows, flops)

    def forced_pass(self, rows: int, tokens: int) -> Work:
        """Return the work of a pass over whole texts, without the head; causal attention is half of the square."""
        flops = 2 * self.body * rows * tokens + 4 * self.query_width * rows * tokens * tokens / 2
        return Work(self.body * self.itemsize, flops)


def roofline(
    shape: str,
    *,
    repeats: int,
    say: Say,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] | None = None,
    most_threads: int = 1,
    probe: Callable[[str, torch.dtype], Limits] = limits,
) -> dict[str, Any]:
    """Measure decode steps and teacher-forced passes at several batch sizes over their floors; best of `repeats`."""
    before = probe(device, dtype)
    say(f"  {before.bytes_per_second / 1e9:.1f} GB/s, {before.flops_per_second / 1e9:.0f} GFLOP/s")
    lm = random_model(shape, dtype=dtype, device=device)
    sizes, n_parameters = Sizes.of_model(lm), sum(weights.numel() for weights in lm.model.parameters())
    kind = torch.device(device).type
    sizes_to_run = batch_sizes or (
        BATCH_SIZES[kind] if n_parameters < LARGE or kind == "cuda" else BATCH_SIZES[kind][:3]
    )
    cells = []
    for rows in sizes_to_run:
        cells.append(_decoded(lm, sizes, before, rows, repeats))
        say(f"  {cells[-1]['pass']}, batch {rows}: {cells[-1]['over_floor']:.2f} times its floor")
        cells.append(_forced(lm, sizes, before, rows, repeats))
        say(f"  {cells[-1]['pass']}, batch {rows}: {cells[-1]['over_floor']:.2f} times its floor")
    return {
        "shape": shape,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": n_parameters,
        "limits": asdict(before),
        "by_threads": _limits_by_threads(dtype, most_threads, probe) if kind == "cpu" else {},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "forced_tokens": FORCED_TOKENS,
        "repeats": repeats,
        "cells": cells,
    }


def _limits_by_threads(
    dtype: torch.dtype, most: int, probe: Callable[[str, torch.dtype], Limits]
) -> dict[str, dict[str, float]]:
    """Measure the processor's limits with one thread and with all."""
    found = {}
    for count in sorted({1, most}):
        with threads(count):
            found[str(count)] = asdict(probe("cpu", dtype))
    return found


def _decoded(lm: LanguageModel, sizes: Sizes, limit: Limits, rows: int, repeats: int) -> dict[str, Any]:
    tries = [decode_seconds(lm, rows) for _ in range(repeats + 1)][1:]
    work = sizes.decode_step(rows, PROMPT_TOKENS + NEW_TOKENS / 2)
    return _cell("decode step", rows, tries, work, limit) | {"matrices_seconds": rows / linear_rate(lm, rows)}


def _forced(lm: LanguageModel, sizes: Sizes, limit: Limits, rows: int, repeats: int) -> dict[str, Any]:
    tries = [forced_seconds(lm, rows) for _ in range(repeats + 1)][1:]
    return _cell("teacher-forced pass", rows, tries, sizes.forced_pass(rows, FORCED_TOKENS), limit)


def _cell(name: str, rows: int, tries: Sequence[float], work: Work, limit: Limits) -> dict[str, Any]:
    floor = limit.floor(work.n_bytes, work.flops)
    return {
        "pass": name,
        "batch_size": rows,
        "seconds": spread(tries),
        "floor_seconds": floor,
        "bound": limit.bound(work.n_bytes, work.flops),
        "over_floor": min(tries) / floor,
        **asdict(work),
    }


def decode_seconds(lm: LanguageModel, rows: int, new_tokens: int = NEW_TOKENS, *, captures: bool = True) -> float:
    """Return the median seconds of a decode step. All prompts and responses have equal lengths: the batch stays full.

    The median leaves out the prefill and the recording of CUDA graphs; steps that run in a row share their time.
    """
    requests = make_even_requests(rows, lm.vocab_size, PROMPT_TOKENS, new_tokens)
    capture = Capture(tuple(range(lm.n_layers))) if captures else None
    ends: list[tuple[float, int]] = []

    def note(n_tokens: int) -> None:
        ends.append((time.perf_counter(), n_tokens))

    with _without_gc():
        for _ in generate(lm, requests, batch_size=rows, capture=capture, on_progress=note):
            pass
    most = max(n_tokens for _, n_tokens in ends[1:])  # with capture, a last step runs the last token and samples none
    whole = [(end - was) * rows / n for (was, _), (end, n) in pairwise(ends) if n == most]
    return median(whole)


def forced_seconds(lm: LanguageModel, rows: int, tokens: int = FORCED_TOKENS) -> float:
    """Return the seconds of a teacher-forced pass with the means of all layers."""
    requests = make_even_requests(rows, lm.vocab_size, tokens, 1)
    half = tokens // 2
    texts = [(request.id, request.token_ids[:half], request.token_ids[half:]) for request in requests]
    with _without_gc():
        started = time.perf_counter()
        for _ in teacher_force(lm, texts, capture=Capture(tuple(range(lm.n_layers))), batch_size=rows):
            pass
        synchronize(str(lm.device))
        return time.perf_counter() - started


@contextmanager
def _without_gc() -> Iterator[None]:
    """Switch garbage collection off for the block."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
