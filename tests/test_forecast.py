"""The forecast: its sizes are those of the engine, its batch fits in memory, its sums add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraction.activations.pooled import Capture, PooledCapture
from extraction.engine.batch import ContinuousBatch
from extraction.engine.sequence import BatchLimits
from extraction.model.loading import wrap
from extraction.model.memory import (
    CPU_AUTO_BATCH,
    MAX_AUTO_BATCH,
    Workload,
    auto_batch_size,
    is_out_of_memory,
    largest_batch_size,
    memory_by_part,
    shape_of,
)
from extraction.pipeline.forecast import forecast
from extraction.pipeline.plan import make_plan
from extraction.pipeline.session import PromptEncoder
from extraction.utils_batch import Request
from tests.runs import EXPERIMENT, make_root
from tests.tiny import shared_model, tiny_tokenizer

ARCHITECTURES = ("llama", "gpt2", "gemma2", "bloom", "opt")


def work_of(prompt: int = 30, new: int = 20, points: int = 3) -> Workload:
    return Workload(n_examples=8, prompt_mean=prompt, prompt_longest=prompt, max_new_tokens=new, n_points=points)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_forecast_memory_equals_the_engines_memory(name):
    """Weights, KV cache and pooling sums to the byte, from the config alone."""
    model, work = shared_model(name), work_of()
    lm = wrap(model)
    requests = [Request(str(i), tuple(range(3, 33)), 20) for i in range(8)]
    batch = ContinuousBatch(lm, BatchLimits.of(requests, 4), capture=Capture((0, 1, 2)))
    batch.add(requests)
    with batch.attached():
        batch.step()
    parts = memory_by_part(shape_of(model.config, torch.float32), work, 4, "cpu")
    caches = [tensor for layer in batch.stepper.model.cache.layers for tensor in (layer.keys, layer.values)]
    assert parts["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert parts["cache"] == sum(tensor.numel() * 4 for tensor in caches)
    observer = batch.stepper.capture
    assert isinstance(observer, PooledCapture)
    sums = [observer.fed_TKBD, *(accumulator.sum_KBD for accumulator in observer.poolings.values())]
    assert parts["running sums"] == sum(tensor.numel() * 4 for tensor in sums)
    assert batch.kv.mask_BS.shape[1] == work.columns


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_the_models(name):
    model = shared_model(name)
    shape = shape_of(model.config, torch.bfloat16)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    embeddings = 0 if tied else head.numel()
    assert (shape.n_layers, shape.hidden, shape.vocabulary, shape.n_bytes) == (3, 32, 97, 2)
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert shape.n_multiplied == shape.n_parameters - embeddings


@given(st.integers(1, 10**12), st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(["cpu", "cuda"]))
def test_the_batch_fits_and_twice_as_much_would_not(free, prompt, new, device):
    shape, work = shape_of(shared_model("llama").config, torch.float32), work_of(prompt, new)
    size = largest_batch_size(shape, work, device, free)
    most = MAX_AUTO_BATCH if device == "cuda" else CPU_AUTO_BATCH
    assert size in [2**i for i in range(10)]
    assert size <= most
    takes = {n: sum(memory_by_part(shape, work, n, device).values()) for n in (size, 2 * size)}
    assert size == 1 or takes[size] <= 0.8 * free
    assert size == most or takes[2 * size] > 0.8 * free


def test_scores_count_where_attention_is_eager():
    eager, fused = (shape_of(shared_model(name).config, torch.float32) for name in ("gemma2", "llama"))
    assert (eager.keeps_scores, fused.keeps_scores) == (True, False)
    takes = [memory_by_part(shape, work_of(400), 4, "cpu")["workspace"] for shape in (eager, fused)]
    assert takes[0] > 4 * takes[1]


def test_a_batch_for_a_loaded_model():
    lm = wrap(shared_model("llama"), tiny_tokenizer())
    assert auto_batch_size(lm, [10, 20], 30) == CPU_AUTO_BATCH


@pytest.mark.parametrize(
    ("failure", "yes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_known_by_its_signs(failure, yes):
    assert is_out_of_memory(failure) == yes


def test_the_forecast_of_a_run_adds_up(tmp_path: Path):
    root = make_root(tmp_path)
    plan = make_plan("demo", root=str(root))
    whole = forecast(plan, gpu_price=3.0)
    settings = EXPERIMENT["generation"]
    assert whole.n_examples == 48
    assert whole.new_tokens == 48 * settings["max_new_tokens"]
    assert whole.batch_size == EXPERIMENT["batch_size"]
    assert whole.peak == sum(whole.memory.values())
    assert whole.cost == pytest.approx(3.0 * whole.seconds / 3600)
    encoder = PromptEncoder(plan, tiny_tokenizer(), max_tokens=None)
    prompts = [prompt for shard in plan.shards(plan.traits[0]) for prompt in encoder.encode(shard)]
    assert whole.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    serial, capture = forecast(plan, "responses"), forecast(plan, "capture")
    assert serial.batch_size == 1
    assert serial.cost is None
    assert capture.new_tokens == 0
    assert serial.disk < whole.disk
    half = forecast(make_plan("demo", root=str(root), slice_text="1/2"))
    assert (whole.n_groups, half.n_groups) == (2, 1)
    assert half.n_examples == 40  # shards of 20, 20 and 8: the first run group has two


def test_more_work_takes_more(tmp_path: Path):
    root = str(make_root(tmp_path))
    small, large = (forecast(make_plan("demo", root=root, options={"max_new_tokens": n})) for n in (4, 400))
    assert large.seconds > small.seconds
    assert large.memory["cache"] > small.memory["cache"]
    assert large.disk > small.disk
