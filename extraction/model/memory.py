"""Forecast the memory of a run, and choose the batch size that fits it.

`memory_by_part` counts bytes from a model's sizes; `auto_batch_size` and `largest_batch_size` choose from them, and
`adjusted_batch_size` corrects the choice by what a first run took. The constants were fitted to measured runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from extraction.model.devices import free_memory, is_cuda, prefill_tokens
from extraction.model.kv_cache import CacheWindow, cache_argument, make_cache
from extraction.model.language_model import MAIN_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from extraction.model.language_model import LanguageModel

MAX_AUTO_BATCH = 256
CPU_AUTO_BATCH = 64
SAFE_FRACTION = 0.8  # of the free memory that a forecast may fill
TOLERATED_EXCESS = 1.1  # times the forecast, that the first run group may take
FULL_FRACTION = 0.9  # of the free memory, beyond which the batch is halved
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_ALLOC_FAILED", "can't allocate memory")
LIBRARY_BYTES = {"cpu": 440_000_000}
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # per weight; at 4 bits there is a scale for every 64 weights
SCORE_COPIES, MASK_COPIES = 5, 2  # of a row's columns: with eager attention; with fused attention, the mask only
HIDDEN_COPIES, INNER_COPIES, LOGIT_COPIES = 4, 3, 6


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory and time depend on."""

    n_layers: int
    hidden: int
    inner: int  # the MLP's width
    heads: int
    vocabulary: int
    kv_width: int  # numbers of keys and values of one token in all layers
    state_bytes: int  # bytes of a row's convolution and recurrent states
    n_parameters: int
    n_multiplied: int  # parameters that every token is multiplied by: all but the embeddings, unless tied to the head
    n_bytes: int  # of one number of the hidden states or of one unquantised weight
    weights: int  # bytes of all weights
    keeps_scores: bool  # True for eager attention


def shape_of(config: Any, dtype: torch.dtype, quantize: str | None = None) -> ModelShape:
    """Return a model's sizes from its text config; parameters are counted on the meta device."""
    model = _meta_model(config)
    n_parameters, n_quantized, is_eager = _count_parameters(model)
    kv_width, state_bytes = _cached_per_row(model, config, dtype)
    quantized_bytes = QUANTIZED_BYTES.get(quantize or "", dtype.itemsize)
    return ModelShape(
        n_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=getattr(config, "num_attention_heads", None) or 1,  # a model without attention has none
        vocabulary=config.vocab_size,
        kv_width=kv_width,
        state_bytes=state_bytes,
        n_parameters=n_parameters,
        n_multiplied=n_parameters
        - (0 if getattr(config, "tie_word_embeddings", False) else config.vocab_size * config.hidden_size),
        n_bytes=dtype.itemsize,
        weights=round((n_parameters - n_quantized) * dtype.itemsize + n_quantized * quantized_bytes),
        keeps_scores=is_eager,
    )


def _meta_model(config: Any) -> PreTrainedModel:
    """Build a model without memory for its weights: with a head, where transformers has a text class with one."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config)
    return model


def _count_parameters(model: PreTrainedModel) -> tuple[int, int, bool]:
    """Return (number of parameters, number that quantisation applies to, True if attention is eager).

    Quantisation applies to all linear layers but the head.
    """
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    linear: list[Any] = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    n_head = (
        0
        if head is not None or getattr(config, "tie_word_embeddings", False)
        else config.vocab_size * config.hidden_size
    )
    n_parameters = sum(p.numel() for p in model.parameters()) + n_head
    return n_parameters, sum(module.weight.numel() for module in linear), config._attn_implementation == "eager"


def _cached_per_row(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Return (numbers in the cache by token, bytes of states by row), by a pass on the meta device.

    A model whose pass needs numbers counts as one with keys and values of `head_dim` in all layers.
    """
    cache = make_cache(model, CacheWindow(slots=1, columns=4))
    inputs: dict[str, Any] = {cache_argument(inspect.signature(model.forward).parameters): cache, "use_cache": True}
    try:
        model.set_experts_implementation("batched_mm")  # one that chooses experts without looking at numbers
        module: torch.nn.Module = model.eval()
        module.to(dtype)
        with torch.device("meta"), cache.window.prefilling(torch.zeros(1, dtype=torch.long), cursor=4):
            module(input_ids=torch.zeros(1, 4, dtype=torch.long), **inputs)
    except Exception:  # an architecture may raise anything
        heads = getattr(config, "num_attention_heads", None) or 1
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return 2 * int(config.num_hidden_layers) * kv_heads * head_dim, 0
    buffers = [buffer for layer in cache.slot_layers for buffer in layer.columned.values()]
    return sum(buffer.shape[1] * buffer.shape[3] for buffer in buffers), cache.state_bytes


@dataclass(frozen=True)
class Workload:
    """Examples to run: prompt lengths, the longest response and `n_points`, the captured sites by layers."""

    n_examples: int
    prompt_mean: float
    prompt_longest: int
    max_new_tokens: int
    n_points: int

    @property
    def columns(self) -> int:
        """Number of columns of the engine's cache window."""
        longest = self.prompt_longest + self.max_new_tokens
        return longest + max(32, longest // 4)


def memory_by_part(shape: ModelShape, work: Workload, batch_size: int, device: str) -> dict[str, int]:
    """Return bytes of weights, KV cache, running sums, workspace (a prefill, float32 logits) and libraries."""
    kind, width = device.partition(":")[0], work.prompt_longest
    scores = SCORE_COPIES * shape.heads * width if shape.keeps_scores else MASK_COPIES * width
    token = HIDDEN_COPIES * shape.hidden + INNER_COPIES * shape.inner + scores
    n_read = min(batch_size * width, max(width, prefill_tokens(device)))
    logits = 4 * LOGIT_COPIES * batch_size * shape.vocabulary
    return {
        "weights": shape.weights,
        "cache": batch_size * (work.columns * shape.kv_width * shape.n_bytes + shape.state_bytes),
        "running sums": work.n_points * batch_size * shape.hidden * (4 + shape.n_bytes),
        "workspace": n_read * token * shape.n_bytes + logits,
        "libraries": LIBRARY_BYTES.get(kind, 0),
    }


def auto_batch_size(lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int) -> int:
    """Return a batch size for a loaded model: the largest power of two that fits the free memory of every device.

    It is at most MAX_AUTO_BATCH (on CPUs CPU_AUTO_BATCH). Layers offloaded to main memory have their cache on the first
    device.
    """
    shape, work = _shape_and_workload(lm, prompt_lengths, max_new_tokens)
    n_layers_by_device = lm.spread or {str(lm.device): lm.n_layers}
    n_offloaded = n_layers_by_device.pop(MAIN_MEMORY, 0)
    n_layers_by_device = {str(lm.device): 0, **n_layers_by_device}
    n_layers_by_device[str(lm.device)] += n_offloaded
    return min(
        largest_batch_size(_part_of(shape, n_layers), work, device, free_memory((device,)), loaded=True)
        for device, n_layers in n_layers_by_device.items()
    )


def _part_of(shape: ModelShape, n_layers: int) -> ModelShape:
    """Return the sizes of some of a model's layers."""
    share = n_layers / shape.n_layers
    kv_width, state_bytes = round(shape.kv_width * share), round(shape.state_bytes * share)
    return replace(shape, n_layers=n_layers, kv_width=kv_width, state_bytes=state_bytes)


def _shape_and_workload(
    lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int
) -> tuple[ModelShape, Workload]:
    shape = shape_of(lm.model.config.get_text_config(), lm.dtype)
    return shape, Workload(len(prompt_lengths), 0.0, max(prompt_lengths, default=1), max_new_tokens, shape.n_layers)


def runtime_bytes(lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> int:
    """Forecast the bytes that a run takes besides the weights and libraries, as `auto_batch_size` does."""
    parts = memory_by_part(*_shape_and_workload(lm, prompt_lengths, max_new_tokens), batch_size, str(lm.device))
    return sum(parts.values()) - parts["weights"] - parts["libraries"]


def adjusted_batch_size(batch_size: int, expected: int, seen: int, room: int) -> int:
    """Return the next run group's batch size: half, if this one took more memory than forecast and nearly all.

    Args:
        expected: bytes that were forecast.
        seen: bytes that were taken.
        room: bytes that were free.
    """
    is_tight = seen > TOLERATED_EXCESS * expected and seen > FULL_FRACTION * room
    return max(1, batch_size // 2) if is_tight else batch_size


def largest_batch_size(
    shape: ModelShape, work: Workload, device: str, free: int | None, *, loaded: bool = False
) -> int:
    """Return the largest power of two, up to the device's limit, whose forecast fits `free` bytes (None: unknown).

    With `loaded`, weights and libraries are in memory already and don't count.
    """
    batch_size = MAX_AUTO_BATCH if is_cuda(device) else CPU_AUTO_BATCH
    while free is not None and batch_size > 1:
        parts = memory_by_part(shape, work, batch_size, device)
        n_loaded = parts["weights"] + parts["libraries"] if loaded else 0
        if sum(parts.values()) - n_loaded <= free * SAFE_FRACTION:
            break
        batch_size //= 2
    return batch_size


def is_out_of_memory(failure: BaseException) -> bool:
    """Return True for any of the exceptions that torch and Python raise when memory runs out."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(part in str(failure) for part in OUT_OF_MEMORY)
