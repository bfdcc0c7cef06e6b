"""Measure how time and memory grow with examples, batch size, captured layers and response length.

One quantity changes along an axis, the others are fixed. Examples are varied in whole runs: the command in a fresh
process, with start, load and writing. The other axes are jobs of the engine alone. A line is fitted to the medians; the
largest relative deviation from it is reported. All points of an axis take turns.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.processes import TRAIT, run_measured, save_model, words_of
from benchmarks.reading_cost import device_name
from benchmarks.shapes import random_model
from benchmarks.workload import in_turn, make_even_requests
from extraction.activations.pooled import Capture
from extraction.engine.generate import generate
from extraction.model.language_model import LanguageModel

EXPERIMENT = "whole"
COUNTS = (200, 1000, 5000, 20_000)  # examples, both polarities together
SETTINGS = {"--max-new-tokens": 40, "--batch-size": 64, "--shard-size": 100, "--judge": "none", "--self-check": 0}


def whole_runs(
    shape: str,
    *,
    counts: Sequence[int],
    repeats: int,
    threads: int,
    say: Callable[[str], None],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Measure seconds and peak memory (MiB) of `traitline batched` at each number of examples, in turn."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = {
            **{"--experiment": EXPERIMENT, "--trait": TRAIT, "--root": folder, "--raw": True, "--threads": threads},
            **{"--model": save_model(folder / "model", shape, dtype=dtype), "--device": device},
            **{"--dtype": str(dtype).removeprefix("torch."), **SETTINGS},
        }
        found: dict[str, list[tuple[float, float]]] = {str(count): [] for count in counts}
        for order in in_turn(list(found), repeats):
            for name in order:
                words = ["batched", *words_of({**given, "--n-examples": int(name) // 2})]
                found[name].append(_measure_command(words, folder))
                say(f"  {name} examples: {found[name][-1][0]:.1f} s, {found[name][-1][1]:.0f} MiB")
    seconds = [statistics.median(took for took, _ in each) for each in found.values()]
    new_tokens = SETTINGS["--max-new-tokens"]
    return {
        "title": "examples",
        "of": "run",
        "job": {"new_tokens": new_tokens, "batch_size": SETTINGS["--batch-size"],
                "shard_size": SETTINGS["--shard-size"], "n_layers": None},
        "points": list(counts),
        "seconds": seconds,
        "tokens_per_second": [count * int(new_tokens) / took for count, took in zip(counts, seconds, strict=True)],
        "peak_mib": [max(peak for _, peak in each) for each in found.values()],
    }  # fmt: skip


def _measure_command(words: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run one command; return its seconds and peak memory, and delete its files."""
    started = time.perf_counter()
    peak = run_measured(words, folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "experiments")
    return seconds, peak


Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Sizes of one job. `n_layers` captured layers (the first ones); None means all."""

    n_examples: int = 128
    prompt_tokens: int = 60
    new_tokens: int = 40
    batch_size: int = 64
    n_layers: int | None = None


@dataclass(frozen=True)
class Axis:
    """One quantity that changes. `of` is what is measured: seconds of the job, or of a step."""

    title: str
    job: Job
    field: str
    points: tuple[int, ...]
    of: str = "job"


AXES = {
    "batch": Axis("batch size", Job(), "batch_size", (1, 2, 4, 8, 16, 32, 64, 128), of="step"),
    "layers": Axis("layers captured", Job(), "n_layers", ()),
    "length": Axis("response tokens", Job(), "new_tokens", (10, 20, 40, 80, 160, 320)),
}


def scaling(
    shape: str,
    *,
    repeats: int,
    threads: int,
    say: Say,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    most: int = COUNTS[-1],
) -> dict[str, Any]:
    """Measure every axis, each point `repeats` times in turn. `most` limits the examples."""
    counts = (*(count for count in COUNTS if count < most), most)
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    runs = whole_runs(shape, counts=counts, repeats=repeats, threads=threads, say=say, **place)
    lm = random_model(shape, **place)
    seconds(lm, Job(n_examples=8, new_tokens=4))  # warm
    return {
        "shape": shape,
        "device": device_name(device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "parameters": sum(weights.numel() for weights in lm.model.parameters()),
        "layers": lm.n_layers,
        "repeats": repeats,
        "axes": {
            "examples": {**runs, **fit_line(runs["points"], runs["seconds"])},
            **{name: _measured(lm, fitted(axis, lm, most), repeats, say) for name, axis in AXES.items()},
        },
    }


def fitted(axis: Axis, lm: LanguageModel, most: int) -> Axis:
    """Limit an axis to the model's layers and to `most` examples."""
    n_examples = min(axis.job.n_examples, most)
    points = {
        "n_layers": tuple(sorted({0, 1, lm.n_layers // 2, lm.n_layers})),
        "batch_size": tuple(point for point in axis.points if point <= n_examples),
    }
    return replace(axis, job=replace(axis.job, n_examples=n_examples), points=points.get(axis.field, axis.points))


def _measured(lm: LanguageModel, axis: Axis, repeats: int, say: Say) -> dict[str, Any]:
    names = [str(point) for point in axis.points]
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for order in in_turn(names, repeats):
        for name in order:
            rounds[name].append(seconds(lm, job_at(axis, int(name))))
            say(f"  {axis.title} {name}: {rounds[name][-1]:.2f} s")
    medians = [_per(axis, point, statistics.median(rounds[str(point)])) for point in axis.points]
    jobs = [job_at(axis, point) for point in axis.points]
    return {
        "title": axis.title,
        "of": axis.of,
        "job": {key: value for key, value in vars(axis.job).items() if key != axis.field},
        "points": list(axis.points),
        "seconds": medians,
        "tokens_per_second": [
            job.n_examples * job.new_tokens / statistics.median(rounds[name])
            for job, name in zip(jobs, names, strict=True)
        ],
        **fit_line(axis.points, medians),
    }


def job_at(axis: Axis, point: int) -> Job:
    """Return an axis's job at one of its points."""
    job: Job = replace(axis.job, **{axis.field: point})
    return job


def _per(axis: Axis, point: int, took: float) -> float:
    """Return the seconds of the job, or of one step of a full batch with its share of the prefill."""
    if axis.of == "job":
        return took
    rounds = -(-axis.job.n_examples // point)
    return took / (rounds * axis.job.new_tokens)


def fit_line(points: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """Fit a line, and return it with the largest relative deviation from it.

    The fit minimises relative errors, so that small points count as much as large ones.
    """
    weights = 1 / np.maximum(np.asarray(found, dtype=float), 1e-12)
    slope, start = np.polyfit(np.asarray(points, dtype=float), np.asarray(found, dtype=float), 1, w=weights)
    line = slope * np.asarray(points, dtype=float) + start
    deviation = np.abs(np.asarray(found) - line) / np.abs(line)
    return {"start": float(start), "slope": float(slope), "largest_deviation": float(deviation.max())}


def seconds(lm: LanguageModel, job: Job) -> float:
    """Run a job through the engine, without keeping the results, and return its seconds."""
    requests = make_even_requests(job.n_examples, lm.vocab_size, job.prompt_tokens, job.new_tokens)
    n_layers = lm.n_layers if job.n_layers is None else job.n_layers
    capture = Capture(tuple(range(n_layers))) if n_layers else None
    started = time.perf_counter()
    for _ in generate(lm, requests, batch_size=job.batch_size, capture=capture):
        pass
    return time.perf_counter() - started
