"""The machine: its name, its memory bandwidth and peak of operations, and the rate of a step's linear layers alone."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from extraction.model.devices import synchronize
from extraction.model.language_model import LanguageModel
from extraction.model.onednn_linear import matmul
from extraction.pipeline.forecast import best_seconds


def describe(threads: int) -> dict[str, Any]:
    """Return processor, cores, threads and versions."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
    }


def _processor() -> str:
    """Return the processor's model name where the system has it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


READ_BYTES = {"cpu": 2**29, "cuda": 2**31}  # many times the size of the caches
SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is timed
SECONDS, MIN_TRIES = 1.0, 3  # of each measurement


@dataclass(frozen=True)
class Limits:
    """Bandwidth and peak of a device, for a type and a number of processor threads."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, n_bytes: float, flops: float) -> float:
        """Return the least seconds from memory; weights that stay in a processor's cache can be read quicker."""
        return max(n_bytes / self.bytes_per_second, flops / self.flops_per_second)

    def bound(self, n_bytes: float, flops: float) -> str:
        """Return which of the two bounds the time: memory or arithmetic."""
        memory = n_bytes / self.bytes_per_second >= flops / self.flops_per_second
        return "memory" if memory else "arithmetic"


@torch.inference_mode()
def limits(device: str, dtype: torch.dtype, seconds: float = SECONDS, read_bytes: int | None = None) -> Limits:
    """Measure the limits with torch's current threads: the best of several tries."""
    kind = torch.device(device).type
    n_read = read_bytes or READ_BYTES[kind]
    size = SQUARE[kind] if read_bytes is None else 256
    return Limits(_bandwidth(device, dtype, n_read, seconds), _peak(device, dtype, size, seconds))


def _bandwidth(device: str, dtype: torch.dtype, n_bytes: int, seconds: float) -> float:
    """Measure the best rate of matrix-vector product, sum and copy (which counts its bytes twice)."""
    width = 4096
    matrix = torch.ones(n_bytes // dtype.itemsize // width, width, dtype=dtype, device=device)
    vector = torch.ones(width, dtype=dtype, device=device)
    other = torch.empty_like(matrix)
    tries: list[tuple[Callable[[], object], int]] = [
        (lambda: torch.mv(matrix, vector), matrix.nbytes),
        (matrix.sum, matrix.nbytes),
        (lambda: other.copy_(matrix), 2 * matrix.nbytes),
    ]
    return max(moved / best_seconds(work, device, seconds, MIN_TRIES) for work, moved in tries)


def _peak(device: str, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Measure a product of large square matrices, in the library that the engine's linear layers use."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / best_seconds(lambda: matmul(left, right), device, seconds, MIN_TRIES))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run the block with another number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def linear_rate(lm: LanguageModel, batch_size: int, seconds: float = 0.5) -> float:
    """Return the tokens per second of a decode step's linear layers alone, head included."""
    linear = [module for module in lm.model.modules() if isinstance(module, nn.Linear)]
    inputs = [
        torch.randn(batch_size, module.in_features, device=lm.device).to(module.weight.dtype) for module in linear
    ]
    steps, started = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - started < seconds:
        for module, rows in zip(linear, inputs, strict=True):
            module(rows)
        synchronize(str(lm.device))
        steps += 1
    return steps * batch_size / (time.perf_counter() - started)
