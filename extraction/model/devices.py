"""Devices: choosing one, their free memory, CUDA graphs and copies to the host.

The only module that uses `torch.cuda` and `torch.mps`. In torch, ROCm devices are named `cuda`, and Apple's `mps`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from extraction.core.errors import ModelError
from extraction.core.records import DEVICE_STRATEGIES

# most tokens of a prefill, with padding: a CPU is fastest while a layer's intermediate results fit its caches
PREFILL_TOKENS_BY_DEVICE, PREFILL_TOKENS_DEFAULT = {"cpu": 1024}, 8192
WEIGHTS_FRACTION = (
    0.8  # of each GPU's free memory, for a model over several GPUs; the rest is for caches and activations
)


def pick_device(requested: str) -> str:
    """Return the requested device; for `auto` CUDA (or ROCm), else MPS, else the CPU.

    For a model over several GPUs, the first of them. Raises ModelError if this machine lacks the device.
    """
    if requested not in ("auto", *DEVICE_STRATEGIES):
        _check_present(requested)
        return requested
    if torch.cuda.is_available():
        return "cuda:0" if requested in DEVICE_STRATEGIES else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_map_for(requested: str) -> dict[str, Any]:
    """Return `from_pretrained`'s placement arguments: one device, or a strategy with the bytes that each may hold."""
    devices = device_list(requested)
    if requested not in DEVICE_STRATEGIES or not is_cuda(devices[0]):
        return {"device_map": devices[0]}
    limits: dict[int | str, int] = {
        i: int(WEIGHTS_FRACTION * (_free_on(device) or 0)) for i, device in enumerate(devices)
    }
    return {"device_map": requested, "max_memory": limits | {"cpu": _free_on("cpu") or 0}}


def _check_present(device: str) -> None:
    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if int(index or 0) >= count.get(kind, 1):
        raise ModelError(f"--device {device!r}: this machine has no such device; give auto or cpu")


def prefill_tokens(device: str | torch.device) -> int:
    """Return the most tokens, with padding, of a prefill of several rows."""
    return PREFILL_TOKENS_BY_DEVICE.get(str(device).partition(":")[0], PREFILL_TOKENS_DEFAULT)


def prefill_rows(lengths: Sequence[int], device: str | torch.device) -> int:
    """Return how many of the first rows to prefill at once, padded to the longest of them; at least 1."""
    padded = [n_rows * longest for n_rows, longest in enumerate(accumulate(lengths, max), start=1)]
    return max(1, sum(n_tokens <= prefill_tokens(device) for n_tokens in padded))


def is_cuda(device: str | torch.device) -> bool:
    """Return True for a CUDA or ROCm device."""
    return str(device).startswith("cuda")


def compute_device(module: nn.Module, weight: Tensor) -> torch.device:
    """Return the device that a module computes on: for offloaded weights not the one that they are stored on."""
    hooks = getattr(getattr(module, "_hf_hook", None), "hooks", None) or [getattr(module, "_hf_hook", None)]
    devices: list[Any] = [getattr(hook, "execution_device", None) for hook in hooks]
    device = next((device for device in devices if device is not None), None)
    return weight.device if device is None else torch.device(device)


def device_list(requested: str) -> tuple[str, ...]:
    """Return the devices that a model is placed on: all GPUs for one of DEVICE_STRATEGIES, else one."""
    first = pick_device(requested)
    if requested in DEVICE_STRATEGIES and is_cuda(first):
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return (first,)


def free_memory(devices: Iterable[str]) -> int | None:
    """Return the sum of the devices' free bytes; None if one is unknown."""
    free = [_free_on(device) for device in devices]
    known = [n_bytes for n_bytes in free if n_bytes is not None]
    return sum(known) if len(known) == len(free) else None


def _free_on(device: str) -> int | None:
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return None


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on the GPUs if they are used, else in main memory."""
    import resource
    import sys

    if torch.cuda.is_available():
        peaks = [int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count())]
        if any(peaks):
            return sum(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def empty_cache() -> None:
    """Free unreferenced memory and return it to the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


Record = Callable[[Callable[[], None]], Callable[[], None]]


def recorder_for(device: torch.device) -> Record | None:
    """Return a function that captures work as a CUDA graph (on ROCm a HIP graph); None for other devices.

    `record(work)` captures without running and returns the replay function. Work that needs the host raises
    RuntimeError.
    """
    if not is_cuda(device):
        return None
    pool = torch.cuda.graph_pool_handle()  # the graphs of a batch never run at once, so they can share memory

    def record(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def synchronize(device: str) -> None:
    """Wait until a device has finished its queued work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to main memory; those on a GPU through page-locked memory, with one wait for all."""
    if not any(is_cuda(tensor.device) for tensor in tensors):
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    for device in {tensor.device for tensor in tensors if is_cuda(tensor.device)}:
        torch.cuda.current_stream(device).synchronize()
    return [copy.clone() for copy in copies]  # page-locked memory is scarce
