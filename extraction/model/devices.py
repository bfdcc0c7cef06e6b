"""Which devices there are, what is free on them, and how to give it back: the only module that names CUDA.

ROCm goes by CUDA's name in torch; Apple's device is `mps`.
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

SPREADS = ("balanced", "balanced_low_0", "sequential")  # accelerate's words for a model over all GPUs
# tokens that are read at once, padding counted: a processor is quickest where what a layer makes stays in its caches
PREFILL_TOKENS, PREFILL_ELSEWHERE = {"cpu": 1024}, 8192
WEIGHTS_SHARE = 0.8  # of a GPU's free memory, of a model over several; the rest is for caches and activations


def pick_device(asked: str) -> str:
    """The device asked for, or the best there is: CUDA (and ROCm), Apple's, else the processor.

    Of several devices (`balanced`), the first. Raises ModelError for one that this machine lacks.
    """
    if asked not in ("auto", *SPREADS):
        _refuse_absent(asked)
        return asked
    if torch.cuda.is_available():
        return "cuda:0" if asked in SPREADS else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def placing(asked: str) -> dict[str, Any]:
    """What transformers places weights by: a device, or accelerate's word for several, with what each may hold."""
    devices = device_list(asked)
    if asked not in SPREADS or not is_cuda(devices[0]):
        return {"device_map": devices[0]}
    room: dict[int | str, int] = {i: int(WEIGHTS_SHARE * (_free_on(device) or 0)) for i, device in enumerate(devices)}
    return {"device_map": asked, "max_memory": room | {"cpu": _free_on("cpu") or 0}}


def _refuse_absent(device: str) -> None:
    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if int(index or 0) >= count.get(kind, 1):
        raise ModelError(f"--device {device!r}: this machine has no such device; give auto or cpu")


def prefill_tokens(device: str | torch.device) -> int:
    """How many tokens, padding counted, are read at once at most, where they are several texts'."""
    return PREFILL_TOKENS.get(str(device).partition(":")[0], PREFILL_ELSEWHERE)


def prefill_rows(lengths: Sequence[int], device: str | torch.device) -> int:
    """How many of the first of these texts are best read at once, padded to the longest: one at least."""
    padded = [n_rows * longest for n_rows, longest in enumerate(accumulate(lengths, max), start=1)]
    return max(1, sum(n_tokens <= prefill_tokens(device) for n_tokens in padded))


def is_cuda(device: str | torch.device) -> bool:
    """Whether a device is a GPU that CUDA's functions are for."""
    return str(device).startswith("cuda")


def runs_on(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module computes: not where its weight waits, if that is fetched for every pass."""
    hooks = getattr(getattr(module, "_hf_hook", None), "hooks", None) or [getattr(module, "_hf_hook", None)]
    places: list[Any] = [getattr(hook, "execution_device", None) for hook in hooks]
    place = next((place for place in places if place is not None), None)
    return weight.device if place is None else torch.device(place)


def device_list(asked: str) -> tuple[str, ...]:
    """The devices that a model is spread over, or the one that it is on."""
    first = pick_device(asked)
    if asked in SPREADS and is_cuda(first):
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return (first,)


def free_memory(devices: Iterable[str]) -> int | None:
    """Bytes that are free on devices, together; None where nobody says."""
    found = [_free_on(device) for device in devices]
    known = [n_bytes for n_bytes in found if n_bytes is not None]
    return sum(known) if len(known) == len(found) else None


def _free_on(device: str) -> int | None:
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return None


def peak_memory() -> int:
    """The most this process has held: on the GPUs where they are used, else in main memory, in bytes."""
    import resource
    import sys

    if torch.cuda.is_available():
        held = [int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count())]
        if any(held):
            return sum(held)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def empty_cache() -> None:
    """Return memory that nobody uses any more to the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


Record = Callable[[Callable[[], None]], Callable[[], None]]


def recorder_for(device: torch.device) -> Record | None:
    """What records work of a device, without doing it, and returns what does it; None where nothing can.

    A CUDA graph (a HIP graph on ROCm): work that would have to ask the host for anything raises RuntimeError.
    """
    if not is_cuda(device):
        return None
    pool = torch.cuda.graph_pool_handle()  # the graphs of a batch take turns, so they may share memory

    def record(work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def synchronize(device: str) -> None:
    """Until a device has done what it was given."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same in main memory: from a GPU all at once, through pages that the system holds in place, and one wait."""
    if not any(is_cuda(tensor.device) for tensor in tensors):
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    for device in {tensor.device for tensor in tensors if is_cuda(tensor.device)}:
        torch.cuda.current_stream(device).synchronize()
    return [copy.clone() for copy in copies]  # pages that are held in place are few
