"""How time and memory grow: with the examples, the batch size, the layers captured, and the length of the answers.

Along every axis the rest stays as it is. With the examples it is a whole run that grows, as a user starts it; along the
other axes, a job of the engine alone. A line is laid through the medians; the largest deviation from it says how
straight the growth is. All points of an axis take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.duos import in_turn
from benchmarks.jobs import make_even_requests
from benchmarks.reading_cost import device_name
from benchmarks.shapes import random_model
from benchmarks.whole_runs import COUNTS, whole_runs
from extraction.activations.pooled import Capture
from extraction.engine.generate import generate
from extraction.model.loading import LanguageModel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is run: `n_layers` of capture (the first ones), None for all."""

    n_examples: int = 128
    prompt_tokens: int = 60
    new_tokens: int = 40
    batch_size: int = 64
    n_layers: int | None = None


@dataclass(frozen=True)
class Axis:
    """One thing that changes. `of`: what is measured against it, the job's seconds or those of a step."""

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
    """Every axis, each point `repeats` times in turn. `most`: examples, at most."""
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
            "examples": {**runs, **straight(runs["points"], runs["seconds"])},
            **{name: _measured(lm, fitted(axis, lm, most), repeats, say) for name, axis in AXES.items()},
        },
    }


def fitted(axis: Axis, lm: LanguageModel, most: int) -> Axis:
    """An axis whose points this model and this much patience allow."""
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
        **straight(axis.points, medians),
    }


def job_at(axis: Axis, point: int) -> Job:
    """An axis' job at one of its points."""
    job: Job = replace(axis.job, **{axis.field: point})
    return job


def _per(axis: Axis, point: int, took: float) -> float:
    """Of the job, or of one step of a full batch with its share of the prefill."""
    if axis.of == "job":
        return took
    rounds = -(-axis.job.n_examples // point)
    return took / (rounds * axis.job.new_tokens)


def straight(points: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """The line through them, and the largest deviation from it, relative to the line.

    Relative errors are what is kept small, so that the small points count as much as the large ones.
    """
    weights = 1 / np.maximum(np.asarray(found, dtype=float), 1e-12)
    slope, start = np.polyfit(np.asarray(points, dtype=float), np.asarray(found, dtype=float), 1, w=weights)
    line = slope * np.asarray(points, dtype=float) + start
    deviation = np.abs(np.asarray(found) - line) / np.abs(line)
    return {"start": float(start), "slope": float(slope), "largest_deviation": float(deviation.max())}


def seconds(lm: LanguageModel, job: Job) -> float:
    """A job through the engine; what comes out is let go at once."""
    requests = make_even_requests(job.n_examples, lm.vocab_size, job.prompt_tokens, job.new_tokens)
    n_layers = lm.n_layers if job.n_layers is None else job.n_layers
    capture = Capture(tuple(range(n_layers))) if n_layers else None
    started = time.perf_counter()
    for _ in generate(lm, requests, batch_size=job.batch_size, capture=capture):
        pass
    return time.perf_counter() - started
