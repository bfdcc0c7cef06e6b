"""What the machine can do at most: bytes per second from memory, and floating-point operations per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from extraction.model.onednn_linear import matmul
from extraction.pipeline.forecast import best_seconds

READ_BYTES = {"cpu": 2**29, "cuda": 2**31}  # many times the caches
SQUARE = {"cpu": 2048, "cuda": 8192}  # of the large product
SECONDS, LEAST = 1.0, 3  # for each kind of try; how often at least


@dataclass(frozen=True)
class Limits:
    """Of a device, a type and a number of threads (of the processor)."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, n_bytes: float, flops: float) -> float:
        """Seconds that can't be beaten from memory; weights that stay in a processor's cache can be read quicker."""
        return max(n_bytes / self.bytes_per_second, flops / self.flops_per_second)

    def bound(self, n_bytes: float, flops: float) -> str:
        """Which of the two is the floor."""
        memory = n_bytes / self.bytes_per_second >= flops / self.flops_per_second
        return "memory" if memory else "arithmetic"


@torch.inference_mode()
def limits(device: str, dtype: torch.dtype, seconds: float = SECONDS, read_bytes: int | None = None) -> Limits:
    """Measured now, with the threads that torch has: the best of several tries of each kind."""
    kind = torch.device(device).type
    n_read = read_bytes or READ_BYTES[kind]
    size = SQUARE[kind] if read_bytes is None else 256
    return Limits(_bandwidth(device, dtype, n_read, seconds), _peak(device, dtype, size, seconds))


def _bandwidth(device: str, dtype: torch.dtype, n_bytes: int, seconds: float) -> float:
    """The best of reading (a matrix times a vector) and copying (read and written: twice the bytes)."""
    width = 4096
    matrix = torch.ones(n_bytes // dtype.itemsize // width, width, dtype=dtype, device=device)
    vector = torch.ones(width, dtype=dtype, device=device)
    other = torch.empty_like(matrix)
    tries: list[tuple[Callable[[], object], int]] = [
        (lambda: torch.mv(matrix, vector), matrix.nbytes),
        (matrix.sum, matrix.nbytes),
        (lambda: other.copy_(matrix), 2 * matrix.nbytes),
    ]
    return max(moved / best_seconds(work, device, seconds, LEAST) for work, moved in tries)


def _peak(device: str, dtype: torch.dtype, size: int, seconds: float) -> float:
    """A large product of square matrices, by the library that the engine's linear layers use."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return float(2 * size**3 / best_seconds(lambda: matmul(left, right), device, seconds, LEAST))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Torch with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
