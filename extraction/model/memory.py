"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from extraction.model.devices import free_memory, is_cuda, prefill_tokens
from extraction.model.loading import MAIN_MEMORY

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel


MAX_AUTO_BATCH = 256


CPU_AUTO_BATCH = 64


SAFE_SHARE = 0.8  # of the free memory


TOLERATED, FULL_SHARE = 1.1, 0.9  # of the forecast, and of the free memory: what the first queue may have taken


OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_ALLOC_FAILED", "can't allocate memory")


LIBRARY_BYTES = {"cpu": 440_000_000}


QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # of one weight; 4 bits have a scale for every 64


SCORE_COPIES, MASK_COPIES = 5, 2  # of a row's columns, where attention is eager; where it is fused, the mask


HIDDEN_COPIES, INNER_COPIES, LOGIT_COPIES = 4, 3, 6


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and time depend on."""

    n_layers: int
    hidden: int
    inner: int  # the MLP's width
    heads: int
    vocabulary: int
    kv_width: int  # keys and values of one token in one layer
    n_parameters: int
    n_multiplied: int  # parameters that every token is multiplied by: all but the embeddings, unless they are the head
    n_bytes: int  # of one number of the hidden states, and of one weight that is not quantised
    weights: int  # bytes of all
    keeps_scores: bool  # whether attention is eager


def shape_of(config: Any, dtype: torch.dtype, quantize: str | None = None) -> Shape:
    """Read a model's sizes off its text config; parameters are counted on a model without storage."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    n_parameters, n_rounded, eager = _looked_over(config)
    rounded = QUANTIZED_BYTES.get(quantize or "", dtype.itemsize)
    return Shape(
        n_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        vocabulary=config.vocab_size,
        kv_width=2 * kv_heads * head_dim,
        n_parameters=n_parameters,
        n_multiplied=n_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size),
        n_bytes=dtype.itemsize,
        weights=round((n_parameters - n_rounded) * dtype.itemsize + n_rounded * rounded),
        keeps_scores=eager,
    )


def _looked_over(config: Any) -> tuple[int, int, bool]:
    """Parameters; those among them that quantisation rounds, the linear layers' but the head's; is attention eager."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    n_rounded = sum(module.weight.numel() for module in linear)
    eager = model.config.get_text_config()._attn_implementation == "eager"
    return sum(p.numel() for p in model.parameters()), n_rounded, eager


@dataclass(frozen=True)
class Work:
    """What is to be done: examples, the lengths of their prompts, the longest response, and points of capture."""

    n_examples: int
    prompt_mean: float
    prompt_longest: int
    max_new_tokens: int
    n_points: int

    @property
    def columns(self) -> int:
        """Columns of the window, as the engine makes them."""
        longest = self.prompt_longest + self.max_new_tokens
        return longest + max(32, longest // 4)


def memory_by_part(shape: Shape, work: Work, batch_size: int, device: str) -> dict[str, int]:
    """Bytes of weights, cache, running sums, workspace (a prefill, logits in float32) and the libraries."""
    kind, width = device.partition(":")[0], work.prompt_longest
    scores = SCORE_COPIES * shape.heads * width if shape.keeps_scores else MASK_COPIES * width
    token = HIDDEN_COPIES * shape.hidden + INNER_COPIES * shape.inner + scores
    n_read = min(batch_size * width, max(width, prefill_tokens(device)))
    logits = 4 * LOGIT_COPIES * batch_size * shape.vocabulary
    return {
        "weights": shape.weights,
        "cache": batch_size * work.columns * shape.n_layers * shape.kv_width * shape.n_bytes,
        "running sums": work.n_points * batch_size * shape.hidden * (4 + shape.n_bytes),
        "workspace": n_read * token * shape.n_bytes + logits,
        "libraries": LIBRARY_BYTES.get(kind, 0),
    }


def auto_batch_size(lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int) -> int:
    """A batch size for a loaded model: the largest power of two that fits the free memory, up to what pays.

    Of several devices, the one with the least room decides; layers in main memory have their cache on the first.
    """
    shape, work = _loaded(lm, prompt_lengths, max_new_tokens)
    places = lm.spread or {str(lm.device): lm.n_layers}
    fetched = places.pop(MAIN_MEMORY, 0)
    places = {str(lm.device): 0, **places}
    places[str(lm.device)] += fetched
    return min(
        fitting(replace(shape, n_layers=n_layers), work, place, free_memory((place,)), loaded=True)
        for place, n_layers in places.items()
    )


def _loaded(lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int) -> tuple[Shape, Work]:
    shape = shape_of(lm.model.config.get_text_config(), lm.dtype)
    return shape, Work(len(prompt_lengths), 0.0, max(prompt_lengths, default=1), max_new_tokens, shape.n_layers)


def beyond_weights(lm: LanguageModel, prompt_lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> int:
    """Bytes that a loaded model should take besides its weights, as `auto_batch_size` counts them."""
    parts = memory_by_part(*_loaded(lm, prompt_lengths, max_new_tokens), batch_size, str(lm.device))
    return sum(parts.values()) - parts["weights"] - parts["libraries"]


def corrected(batch_size: int, expected: int, seen: int, room: int) -> int:
    """The batch size for what follows, from the bytes that one of it was expected to take, took, and could take.

    Half of it, where more was taken than expected by a tenth, and hardly anything was left.
    """
    is_tight = seen > TOLERATED * expected and seen > FULL_SHARE * room
    return max(1, batch_size // 2) if is_tight else batch_size


def fitting(shape: Shape, work: Work, device: str, free: int | None, *, loaded: bool = False) -> int:
    """The largest power of two, up to what pays on the device, whose memory is within the free bytes (None: unknown).

    With `loaded`, weights and libraries are there already.
    """
    batch_size = MAX_AUTO_BATCH if is_cuda(device) else CPU_AUTO_BATCH
    while free is not None and batch_size > 1:
        parts = memory_by_part(shape, work, batch_size, device)
        there = parts["weights"] + parts["libraries"] if loaded else 0
        if sum(parts.values()) - there <= free * SAFE_SHARE:
            break
        batch_size //= 2
    return batch_size


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the ways it is said."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in OUT_OF_MEMORY)
