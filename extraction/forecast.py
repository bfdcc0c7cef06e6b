"""What a job will take: memory by part, tokens, time, disk and cost, before any weight is loaded.

Shapes and sizes come from the model's config; speed from a short measurement of the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from extraction.jobs import Job
    from extraction.models import LanguageModel

MAX_AUTO_BATCH = 256
CPU_AUTO_BATCH = 32
SAFE_SHARE = 0.8  # of the free memory
PROMPT_GUESS = 96  # tokens of a prompt with its instruction, where no tokenizer is loaded
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_ALLOC_FAILED", "can't allocate memory")
EAGER_LAYER_SECONDS = {"cpu": 3.5e-4, "cuda": 9e-4, "mps": 1.2e-3}  # a decoder block's Python, measured


@dataclass(frozen=True)
class Forecast:
    """What a job will take. Bytes, tokens, seconds; `cost` in the currency of the price, None without one."""

    device: str
    batch_size: int
    n_parameters: int
    memory: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    disk: int
    cost: float | None

    @property
    def peak(self) -> int:
        """All parts of the memory together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and time depend on."""

    n_layers: int
    hidden: int
    vocabulary: int
    kv_width: int  # keys and values of one token in one layer
    n_parameters: int
    n_bytes: int  # of one weight


def shape_of(config: Any, dtype: torch.dtype) -> Shape:
    """Read a model's sizes off its text config; parameters are counted on a model without storage."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(
        n_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        kv_width=2 * kv_heads * head_dim,
        n_parameters=_count_parameters(config),
        n_bytes=dtype.itemsize,
    )


def _count_parameters(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_by_part(shape: Shape, batch_size: int, columns: int, n_points: int) -> dict[str, int]:
    """Bytes of weights, cache, running sums and workspace (logits in float32, a prefill's activations)."""
    entering = max(1, batch_size // 4 + 1)
    return {
        "weights": shape.n_parameters * shape.n_bytes,
        "cache": batch_size * columns * shape.n_layers * shape.kv_width * shape.n_bytes,
        "running sums": 2 * n_points * batch_size * shape.hidden * 4,
        "workspace": 3 * batch_size * shape.vocabulary * 4 + 8 * entering * columns * shape.hidden * shape.n_bytes,
    }


def columns_of(prompt_tokens: int, max_new_tokens: int) -> int:
    """Columns of the window, as the engine makes them."""
    longest = prompt_tokens + max_new_tokens
    return longest + max(32, longest // 4)


def forecast(job: Job, *, serial: bool = False, gpu_price: float | None = None) -> Forecast:
    """Forecast the generation of every trait of a job."""
    from extraction.models import pick_device

    settings = job.experiment
    dtype = _dtype_of(job)
    device = pick_device(job.spec)
    shape = shape_of(job.model_config, dtype)
    n_points = len(job.layers) * len(settings.capture.sites) * len(settings.capture.poolings)
    columns = columns_of(PROMPT_GUESS, settings.generation.max_new_tokens)
    fitting = _fitting(shape, columns, n_points, device) if settings.batch_size == "auto" else int(settings.batch_size)
    batch_size = 1 if serial else fitting
    n_examples = sum(len(shard) for trait in job.traits for shard in job.shards(trait))
    n_new = n_examples * settings.generation.max_new_tokens
    seconds = _seconds(shape, n_examples, n_new, batch_size, device, dtype)
    per_example = n_points * shape.hidden * getattr(torch, settings.capture.dtype).itemsize
    return Forecast(
        device=device,
        batch_size=batch_size,
        n_parameters=shape.n_parameters,
        memory=memory_by_part(shape, batch_size, columns, n_points),
        prompt_tokens=n_examples * PROMPT_GUESS,
        new_tokens=n_new,
        seconds=seconds,
        disk=n_examples * (per_example + 16 * (PROMPT_GUESS + settings.generation.max_new_tokens)),
        cost=None if gpu_price is None else gpu_price * seconds / 3600,
    )


def _dtype_of(job: Job) -> torch.dtype:
    if job.spec.dtype != "auto":
        return getattr(torch, job.spec.dtype)  # type: ignore[no-any-return]
    stored = getattr(job.model_config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _seconds(shape: Shape, n_examples: int, n_new: int, batch_size: int, device: str, dtype: torch.dtype) -> float:
    """Prefill at the device's speed; each decode step at the larger of reading the weights and multiplying by them."""
    flops, bandwidth = measure_device(device, dtype)
    prefill = 2 * shape.n_parameters * n_examples * PROMPT_GUESS / flops
    n_steps = n_new / batch_size
    step = max(shape.n_parameters * shape.n_bytes / bandwidth, 2 * shape.n_parameters * batch_size / flops)
    overhead = EAGER_LAYER_SECONDS.get(device.partition(":")[0], 1e-3) * shape.n_layers
    return prefill + n_steps * (step + overhead)


def measure_device(device: str, dtype: torch.dtype, seconds: float = 0.2) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s of a copy), each the best of repeated tries within the given time."""
    size = 4096 if device.startswith("cuda") else 512
    left = torch.randn(size, size, device=device).to(dtype)
    large = torch.zeros(2**28 if device.startswith("cuda") else 2**24, dtype=torch.uint8, device=device)
    product = _best_seconds(lambda: left @ left, device, seconds)
    copy = _best_seconds(lambda: large.clone(), device, seconds)
    return 2 * size**3 / product, 2 * large.numel() / copy


def _best_seconds(work: Any, device: str, seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def auto_batch_size(lm: LanguageModel, max_new_tokens: int) -> int:
    """A batch size for a loaded model: a power of two that fits the free memory, or a good one for a processor."""
    config = lm.model.config.get_text_config()
    shape = shape_of(config, lm.dtype)
    columns = columns_of(PROMPT_GUESS, max_new_tokens)
    return _fitting(shape, columns, shape.n_layers, str(lm.device), loaded=True)


def _fitting(shape: Shape, columns: int, n_points: int, device: str, *, loaded: bool = False) -> int:
    if not device.startswith("cuda"):
        return CPU_AUTO_BATCH
    free = torch.cuda.mem_get_info()[0] * SAFE_SHARE
    batch_size = MAX_AUTO_BATCH
    while batch_size > 1:
        parts = memory_by_part(shape, batch_size, columns, n_points)
        if sum(parts.values()) - (parts["weights"] if loaded else 0) <= free:
            break
        batch_size //= 2
    return batch_size


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the ways it is said."""
    if isinstance(failure, torch.OutOfMemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in OUT_OF_MEMORY)
