"""Measure how memory grows with the number of examples: the commands in fresh processes, on a tiny model.

Also on random activations of a large model's shape, and for each method with many rows a layer.
Shapes: n rows, L layers, D hidden.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import ROOT, TRAIT, run_measured, save_model, words_of
from benchmarks.workload import trained_traits
from extraction.core.records import Example, Trait
from extraction.pipeline.plan import RunPlan, make_plan
from extraction.vectors.method_table import DEFAULT_METHODS

EXPERIMENT = "memory"
STEPS = {  # the second continues the run of the first
    "responses and activations": ("batched",),
    "vectors and validation": ("extract", "--quick", "--methods", "mean_diff"),
}
LARGE = (26, 2304)  # layers and hidden size of a model with 2 billion parameters
N_TRAITS = 11  # as many as are shipped

Say = Callable[[str], None]
Options = dict[str, Any]


def memory_growth(*, counts: Sequence[int], threads: int, say: Say, large: tuple[int, int] = LARGE) -> dict[str, Any]:
    """Measure the peak memory (MiB) of each step at each number of examples, both polarities together.

    The last step has activations of the `large` shape, which need disk space for the largest count.
    """
    n_layers, hidden_size = large
    of_large = f"vectors and validation, {n_layers} layers of {hidden_size}"
    peaks: dict[str, dict[str, float]] = {name: {} for name in (*STEPS, of_large)}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            options = _options(Path(folder), count, threads)
            found = {name: _peak(command, options) for name, command in STEPS.items()}
        with tempfile.TemporaryDirectory() as folder:
            options = _options(Path(folder), count, threads)
            _write_activations(options, large, [TRAIT])
            found[of_large] = _peak(STEPS["vectors and validation"], options)
        for name, peak in found.items():
            peaks[name][str(count)] = peak
            say(f"  {count} examples, {name}: {peak:.0f} MiB")
    growth = {name: by_count[str(counts[-1])] / by_count[str(counts[0])] for name, by_count in peaks.items()}
    return {"trait": TRAIT, "counts": list(counts), "peak_mib": peaks, "growth": growth}


def many_rows(shape: tuple[int, int, int], *, threads: int, say: Say, n_traits: int = N_TRAITS) -> dict[str, Any]:
    """Measure peak (MiB) and seconds of commands over [n, L, D] activations: vectors of each method, and a card.

    The traits share one set of files, which needs n L D numbers of 4 bytes on the disk.
    """
    names = [TRAIT, *(name for name in trained_traits(ROOT) if name != TRAIT)][:n_traits]
    with tempfile.TemporaryDirectory() as folder:
        options = _options(Path(folder), shape[0], threads)
        _write_activations(options, shape[1:], names)
        stored = {name: value for name, value in options.items() if name in ("--experiment", "--root", "--judge")}
        one, all_ = {**stored, "--trait": TRAIT}, {**stored, "--traits": ",".join(names)}
        card = {**one, "--methods": "mean_diff", "--quick": True, "--threads": threads}
        cells = {
            **{f"{name} vectors": (("vectors",), {**one, **_method_options(name)}) for name in DEFAULT_METHODS},
            f"mean_diff vectors of {len(names)} traits": (("vectors",), {**all_, "--methods": "mean_diff"}),
            "mean_diff card": (("validate",), card),
        }
        return {"shape": list(shape), "cells": {name: _timed(name, *cell, say) for name, cell in cells.items()}}


def _method_options(method: str) -> Options:
    """Return the method's options: all layers for mean_diff, else one, since a method holds one layer at a time."""
    return {"--methods": method} | ({} if method == "mean_diff" else {"--layers": "0"})


def _timed(name: str, command: Sequence[str], options: Options, say: Say) -> dict[str, float]:
    started = time.perf_counter()
    peak = _peak(command, options)
    seconds = time.perf_counter() - started
    say(f"  {name}: {peak:.0f} MiB, {seconds:.1f} s")
    return {"peak_mib": peak, "seconds": seconds}


def _peak(command: Sequence[str], options: Options) -> float:
    return run_measured([*command, *words_of(options)], Path(options["--root"]))


# --- runs -----------------------------------------------------------------------------------------------------------


def _options(folder: Path, count: int, threads: int) -> Options:
    """Save a tiny model in the folder; return the options of a run on it."""
    return {
        "--experiment": EXPERIMENT,
        "--root": str(folder),
        "--model": str(save_model(folder / "model")),
        "--trait": TRAIT,
        "--n-examples": count // 2,
        "--max-new-tokens": 4,
        "--batch-size": 64,
        "--judge": "none",
        "--threads": threads,
        "--self-check": 0,
        "--raw": True,
    }


def _write_activations(options: Options, shape: tuple[int, int], traits: Sequence[str]) -> None:
    """Write runs that lack only their vectors, with random activations of a shape.

    All traits share the same files.
    """
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
    settings = {name: given[name] for name in ("model", "n_examples", "max_new_tokens", "judge", "raw")}
    job = make_plan(EXPERIMENT, ",".join(traits), root=given["root"], options=settings)
    first, *others = job.traits
    _write_run(job, first, shape)
    for trait in others:
        _write_run(job, trait, None)
        shutil.copytree(job.folder(first).path / "activations", job.folder(trait).path / "activations",
                        copy_function=os.link, dirs_exist_ok=True)  # fmt: skip


def _write_run(job: RunPlan, trait: Trait, shape: tuple[int, int] | None) -> None:
    folder, generator = job.folder(trait), torch.Generator().manual_seed(0)
    with folder.lock():
        folder.open(job.config(trait))
        for i, shard in enumerate(job.shards(trait)):
            meta = {"captured": True, "instruction_as": "raw", "batch_size": 1}
            folder.write_responses_shard(i, [_row(example) for example in shard], meta)
            if shape is not None:
                tensors = {"residual.response_mean": _activations(shard, shape, generator)}
                layers = list(range(shape[0]))
                folder.write_activations_shard(i, [e.id for e in shard], tensors, {**meta, "layers": layers})


def _row(example: Example) -> dict[str, Any]:
    said = {"prompt": "", "prompt_token_ids": [1], "response": "a", "token_ids": [1] * 4, "finish_reason": "length"}
    return {**vars(example), **said}


def _activations(shard: Sequence[Example], shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Draw activations [n, L, D], with the positive rows shifted."""
    positive_n11 = torch.tensor([example.polarity == "pos" for example in shard])[:, None, None]
    return torch.randn(len(shard), *shape, generator=generator) + 0.1 * positive_n11
