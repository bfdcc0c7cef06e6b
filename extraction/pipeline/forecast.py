"""What a job will take: memory by part, tokens, time, disk and cost, before any weight is loaded.

Shapes and sizes come from the model's config; speed from a short measurement of the device.
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

if TYPE_CHECKING:
    from extraction.config.experiments import GenerationSettings
    from extraction.pipeline.plan import RunGroup, RunPlan

ROW_BYTES = 20  # of a response's line, per token of prompt and response
PROBE_BYTES = 2**26
PROBE_SECONDS = 0.1
MAX_PROBE_ROWS = 1024
N_SAMPLED = 64  # prompts of each trait that are encoded to know their lengths
# measured: the Python of a decoder block; what torch and transformers take by themselves; copies that live at once
EAGER_LAYER_SECONDS = {"cpu": 3.5e-4, "cuda": 9e-4, "mps": 1.2e-3}


@dataclass(frozen=True)
class Forecast:
    """What a job will take. Bytes, tokens, seconds; `cost` in the currency of the price, None without one."""

    device: str
    batch_size: int
    n_parameters: int
    n_examples: int
    n_queues: int
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


def forecast(job: RunPlan, work_name: str = "batched", *, gpu_price: float | None = None) -> Forecast:
    """Forecast what is to be done for every trait of a job: `work_name` is a mode of stage 1, or `capture`."""
    from extraction.pipeline.plan import MODES

    settings, dtype, devices = job.experiment, _dtype_of(job), device_list(job.spec.device)
    mode = MODES[work_name] if work_name in MODES else MODES["responses"]  # `capture` takes what that made
    queues = job.own_queues(mode)
    shape, work, device = shape_of(job.model_config, dtype, job.spec.quantize), _work(job, queues), devices[0]
    asked = settings.batch_size
    fits = largest_batch_size(shape, work, device, free_memory(devices)) if asked == "auto" else int(asked)
    longest = max((sum(len(shard.examples) for shard in queue) for queue in queues), default=1)
    batch_size = 1 if work_name != "capture" and mode.serial else min(fits, longest)
    captures = work_name == "capture" or MODES[work_name].captures
    n_new = 0 if work_name == "capture" else work.n_examples * work.max_new_tokens
    n_read = round(work.n_examples * (work.prompt_mean + (work.max_new_tokens if work_name == "capture" else 0)))
    seconds = _seconds(shape, settings.generation, n_read, n_new, batch_size, DeviceSpeed(device, dtype))
    activation = work.n_points * shape.hidden * getattr(torch, settings.capture.dtype).itemsize if captures else 0
    return Forecast(
        device=" and ".join(devices),
        batch_size=batch_size,
        n_parameters=shape.n_parameters,
        n_examples=work.n_examples,
        n_queues=len(queues),
        memory=memory_by_part(shape, work, batch_size, device),
        prompt_tokens=round(work.n_examples * work.prompt_mean),
        new_tokens=n_new,
        seconds=seconds,
        disk=round(work.n_examples * (activation + ROW_BYTES * (work.prompt_mean + work.max_new_tokens))),
        cost=None if gpu_price is None else gpu_price * seconds / 3600,
    )


def _work(job: RunPlan, queues: Sequence[RunGroup]) -> Workload:
    """The job's examples; prompts are encoded with the model's own tokenizer, a sample of each trait."""
    from extraction.model.loading import max_positions, read_tokenizer

    settings, tokenizer = job.experiment, read_tokenizer(job.spec)
    shards = [shard.examples for queue in queues for shard in queue]
    sampled = [example for shard in shards for example in shard[:N_SAMPLED]]
    room = max_positions(job.model_config)
    lengths = [len(prompt.token_ids) for prompt in job.prompts(tokenizer, sampled, max_tokens=room)]
    return Workload(
        n_examples=sum(map(len, shards)),
        prompt_mean=sum(lengths) / max(1, len(lengths)),
        prompt_longest=max(lengths, default=0),
        max_new_tokens=settings.generation.max_new_tokens,
        n_points=len(job.layers) * len(settings.capture.sites) * len(settings.capture.poolings),
    )


def _dtype_of(job: RunPlan) -> torch.dtype:
    if job.spec.dtype != "auto":
        asked: torch.dtype = getattr(torch, job.spec.dtype)
        return asked
    stored = getattr(job.model_config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _seconds(
    shape: ModelShape, settings: GenerationSettings, n_read: int, n_new: int, batch_size: int, place: DeviceSpeed
) -> float:
    """Prompts at the speed of a large product; each decode step at that of a small one, plus Python and sampling."""
    prompt_rows = min(MAX_PROBE_ROWS, max(batch_size, n_read))
    prefill = n_read * shape.n_multiplied * place.seconds_per_weight(prompt_rows, shape.hidden) / prompt_rows
    if not n_new:
        return prefill
    product = shape.n_multiplied * place.seconds_per_weight(batch_size, shape.hidden)
    python = EAGER_LAYER_SECONDS.get(place.kind, 1e-3) * shape.n_layers
    choice = place.seconds_to_sample(settings, batch_size, shape.vocabulary)
    return prefill + n_new / batch_size * (product + python + choice)


@dataclass(frozen=True)
class DeviceSpeed:
    """Where a job runs, to be measured in fractions of a second."""

    device: str
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.partition(":")[0]

    def seconds_per_weight(self, rows: int, hidden: int) -> float:
        """Of a product of so many rows with a matrix that, for few rows, is larger than the caches."""
        width = max(1, PROBE_BYTES // (max(rows, hidden) * self.dtype.itemsize))
        left = torch.randn(rows, hidden, device=self.device).to(self.dtype)
        weight = torch.zeros(width, hidden, device=self.device, dtype=self.dtype)
        return best_seconds(lambda: matmul(left, weight), self.device, PROBE_SECONDS) / (hidden * width)

    def seconds_to_sample(self, settings: GenerationSettings, rows: int, vocabulary: int) -> float:
        """Of one step's choices."""
        from extraction.engine.sampler import Sample

        choose = Sample(settings.temperature, settings.top_k, settings.top_p)
        logits_BV = torch.randn(rows, vocabulary, device=self.device).to(self.dtype)
        uniform_B = torch.full((rows,), 0.5, device=self.device)
        return best_seconds(lambda: choose(logits_BV, uniform_B), self.device, PROBE_SECONDS)


@torch.inference_mode()
def best_seconds(work: Callable[[], object], device: str, seconds: float, least: int = 1) -> float:
    """The quickest of `least` tries or more, until so many seconds are over; the first does not count."""
    work()
    synchronize(device)
    took: list[float] = []
    while len(took) < least or sum(took) < seconds:
        started = time.perf_counter()
        work()
        synchronize(device)
        took.append(time.perf_counter() - started)
    return min(took)
