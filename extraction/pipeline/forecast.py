"""The forecast of a run for --dry-run: memory by part, tokens, time, disk and cost, before any weight is loaded.

Sizes come from the model's config, speed from a measurement of the device that takes fractions of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from extraction.model.devices import device_list, free_memory, synchronize
from extraction.model.memory import ModelShape, Workload, largest_batch_size, memory_by_part, shape_of
from extraction.model.onednn_linear import matmul
from extraction.pipeline.executors.slice import groups_of_slice
from extraction.pipeline.session import PromptEncoder

if TYPE_CHECKING:
    from extraction.config.experiments import GenerationSettings
    from extraction.pipeline.plan import RunGroup, RunPlan

ROW_BYTES = 20  # of a response's line on disk, per token of prompt and response
PROBE_BYTES = 2**26
PROBE_SECONDS = 0.1
MAX_PROBE_ROWS = 1024
N_SAMPLED = 64  # prompts of each shard that are encoded for their lengths
# measured: seconds of Python for one decoder block in one decode step
EAGER_LAYER_SECONDS = {"cpu": 3.5e-4, "cuda": 9e-4, "mps": 1.2e-3}


@dataclass(frozen=True)
class Forecast:
    """The forecast, in bytes, tokens and seconds; `cost` in the currency of the price, None without one."""

    device: str
    batch_size: int
    n_parameters: int
    n_examples: int
    n_groups: int
    memory: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    seconds: float
    disk: int
    cost: float | None

    @property
    def peak(self) -> int:
        """Bytes of all parts of the memory."""
        return sum(self.memory.values())


def forecast(plan: RunPlan, work_name: str = "batched", *, gpu_price: float | None = None) -> Forecast:
    """Return the forecast for all traits of a plan. `work_name`: a mode of stage 1, or `capture`; price per hour."""
    from extraction.pipeline.plan import MODES

    settings, dtype, devices = plan.experiment, _dtype_of(plan), device_list(plan.spec.device)
    is_capture = work_name == "capture"
    mode = MODES["responses" if is_capture else work_name]  # stage 2 reads the shards that `generate` made
    groups = groups_of_slice(plan, mode)
    shape, work, device = shape_of(plan.model_config, dtype, plan.spec.quantize), _work(plan, groups), devices[0]
    if settings.batch_size == "auto":
        batch_size = largest_batch_size(shape, work, device, free_memory(devices))
    else:
        batch_size = int(settings.batch_size)
    largest = max((sum(len(shard.examples) for shard in group) for group in groups), default=1)
    batch_size = 1 if mode.serial and not is_capture else min(batch_size, largest)
    n_new = 0 if is_capture else work.n_examples * work.max_new_tokens
    n_read = round(work.n_examples * (work.prompt_mean + (work.max_new_tokens if is_capture else 0)))
    seconds = _seconds(shape, settings.generation, n_read, n_new, batch_size, DeviceSpeed(device, dtype))
    captures = is_capture or mode.captures
    activation = work.n_points * shape.hidden * getattr(torch, settings.capture.dtype).itemsize if captures else 0
    return Forecast(
        device=" and ".join(devices),
        batch_size=batch_size,
        n_parameters=shape.n_parameters,
        n_examples=work.n_examples,
        n_groups=len(groups),
        memory=memory_by_part(shape, work, batch_size, device),
        prompt_tokens=round(work.n_examples * work.prompt_mean),
        new_tokens=n_new,
        seconds=seconds,
        disk=round(work.n_examples * (activation + ROW_BYTES * (work.prompt_mean + work.max_new_tokens))),
        cost=None if gpu_price is None else gpu_price * seconds / 3600,
    )


def _work(plan: RunPlan, groups: Sequence[RunGroup]) -> Workload:
    """Count the examples; prompt lengths are those of a sample, encoded by the model's own tokenizer."""
    from extraction.model.loading import max_positions, read_tokenizer

    settings = plan.experiment
    encoder = PromptEncoder(plan, read_tokenizer(plan.spec), max_tokens=max_positions(plan.model_config))
    shards = [shard.examples for group in groups for shard in group]
    sampled = [example for shard in shards for example in shard[:N_SAMPLED]]
    lengths = [len(prompt.token_ids) for prompt in encoder.encode(sampled)]
    return Workload(
        n_examples=sum(map(len, shards)),
        prompt_mean=sum(lengths) / max(1, len(lengths)),
        prompt_longest=max(lengths, default=0),
        max_new_tokens=settings.generation.max_new_tokens,
        n_points=len(plan.layers) * len(settings.capture.sites) * len(settings.capture.poolings),
    )


def _dtype_of(plan: RunPlan) -> torch.dtype:
    if plan.spec.dtype != "auto":
        chosen: torch.dtype = getattr(torch, plan.spec.dtype)
        return chosen
    stored = getattr(plan.model_config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _seconds(
    shape: ModelShape, settings: GenerationSettings, n_read: int, n_new: int, batch_size: int, speed: DeviceSpeed
) -> float:
    """Return seconds: prompts at the speed of a large product, decode steps at that of a small one plus Python."""
    prompt_rows = min(MAX_PROBE_ROWS, max(batch_size, n_read))
    prefill = n_read * shape.n_multiplied * speed.seconds_per_weight(prompt_rows, shape.hidden) / prompt_rows
    if not n_new:
        return prefill
    product = shape.n_multiplied * speed.seconds_per_weight(batch_size, shape.hidden)
    python = EAGER_LAYER_SECONDS.get(speed.kind, 1e-3) * shape.n_layers
    sampling = speed.seconds_to_sample(settings, batch_size, shape.vocabulary)
    return prefill + n_new / batch_size * (product + python + sampling)


@dataclass(frozen=True)
class DeviceSpeed:
    """A device and a dtype, whose speed is measured on demand."""

    device: str
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """The kind of device: cpu, cuda or mps."""
        return self.device.partition(":")[0]

    def seconds_per_weight(self, rows: int, hidden: int) -> float:
        """Return seconds per weight of a product of `rows` rows with a matrix larger than the caches (for few rows)."""
        width = max(1, PROBE_BYTES // (max(rows, hidden) * self.dtype.itemsize))
        left = torch.randn(rows, hidden, device=self.device).to(self.dtype)
        weight = torch.zeros(width, hidden, device=self.device, dtype=self.dtype)
        return best_seconds(lambda: matmul(left, weight), self.device, PROBE_SECONDS) / (hidden * width)

    def seconds_to_sample(self, settings: GenerationSettings, rows: int, vocabulary: int) -> float:
        """Return seconds to sample one token in each of `rows` rows."""
        from extraction.engine.sampler import Sample

        choose = Sample.of(settings)
        logits_BV = torch.randn(rows, vocabulary, device=self.device).to(self.dtype)
        uniform_B = torch.full((rows,), 0.5, device=self.device)
        return best_seconds(lambda: choose(logits_BV, uniform_B), self.device, PROBE_SECONDS)


@torch.inference_mode()
def best_seconds(work: Callable[[], object], device: str, seconds: float, least: int = 1) -> float:
    """Return the shortest time of `work`, tried at least `least` times and for `seconds`, after one warm-up."""
    work()
    synchronize(device)
    took: list[float] = []
    while len(took) < least or sum(took) < seconds:
        started = time.perf_counter()
        work()
        synchronize(device)
        took.append(time.perf_counter() - started)
    return min(took)
