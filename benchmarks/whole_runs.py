"""How a whole run grows with its examples: the command itself, in fresh processes, from the start to the last shard.

What a user waits for and what the machine must hold, so start and load are in the time, and the files are written.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.duos import in_turn
from benchmarks.processes import TRAIT, run_measured, save_model, words_of

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
    """Median seconds and highest peak (resident, MiB) of `traitline batched` at each number of examples, in turn."""
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
                found[name].append(_measured(words, folder))
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


def _measured(words: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak of one command; what it wrote is let go."""
    started = time.perf_counter()
    peak = run_measured(words, folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "experiments")
    return seconds, peak
