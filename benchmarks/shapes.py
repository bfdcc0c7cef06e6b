"""Models of known shapes with random weights, so that measurements need no download.

Weights are drawn on their device and in their type: a shape needs the memory of its weights once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, LlamaConfig
from transformers.initialization import no_init_weights

import extraction
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.model.memory import shape_of as counted
from extraction.pipeline.forecast import free_memory

POCKET = Path(extraction.__file__).parent / "pocket" / "pocket" / "config.json"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
LLAMAS: dict[str, tuple[int, ...]] = {
    "tiny": (32, 64, 3, 4, 2, 97),
    "pocket": (256, 672, 6, 8, 8, 2048),  # where the bundled model is not there yet
    "15m": (288, 768, 6, 6, 6, 32000),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "8b": (4096, 14336, 32, 32, 8, 128256),  # Llama-3-8B
}
GEMMAS: dict[str, tuple[int, ...]] = {
    "tiny-gemma": (32, 64, 3, 4, 2, 97),
    "2b": (2304, 9216, 26, 8, 4, 256000),  # Gemma-2-2B
}
HEAD_DIMS = {"tiny-gemma": 8, "2b": 256}
UNTIED = {"8b"}  # the head is a matrix of its own
SHAPES = (*LLAMAS, *GEMMAS)
HALF = {"2b": torch.bfloat16, "8b": torch.bfloat16}  # the others are measured in float32
POSITIONS = 1024
BLOCK = 4_194_301  # random numbers
SPARE = 1.3  # times the weights: room for caches and buffers
HALF_ON_CPU = 3.0  # the roofline of 2b in bfloat16 came to 2.9 times its weights


def sizes_of(shape: str) -> dict[str, int]:
    """Return the sizes of a shape; `pocket` has those of the bundled model."""
    if shape == "pocket" and POCKET.is_file():
        found = json.loads(POCKET.read_text(encoding="utf-8"))
        return {name: int(found[name]) for name in SIZES}
    return dict(zip(SIZES, (LLAMAS | GEMMAS)[shape], strict=True))


def config_of(shape: str) -> Any:
    """Return a shape's config, without special tokens."""
    no_ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common: dict[str, Any] = {**sizes_of(shape), **no_ids, "max_position_embeddings": POSITIONS}
    if shape in GEMMAS:
        return Gemma2Config(**common, head_dim=HEAD_DIMS[shape], query_pre_attn_scalar=HEAD_DIMS[shape])
    return LlamaConfig(**common, tie_word_embeddings=shape not in UNTIED)


def dtype_of(shape: str, name: str = "auto") -> torch.dtype:
    """Return a type by name; `auto` is the usual one of the shape."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    return HALF.get(shape, torch.float32)


def lacking(shape: str, dtype: torch.dtype, device: str) -> str | None:
    """Return the reason why a shape does not fit into memory, None where it fits."""
    spare = HALF_ON_CPU if device == "cpu" and dtype.itemsize < 4 else SPARE
    needed = spare * counted(config_of(shape), dtype).n_parameters * dtype.itemsize
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{shape} in {name} needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on {device}: skipped"


def random_model(
    shape: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Return a seeded random model without an end token."""
    devices = [torch.device(device).index or 0] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model: Any = _poured(shape, dtype) if shape in HALF else _drawn(shape, dtype)
    model.generation_config = GenerationConfig()
    return wrap(model.requires_grad_(False), stop_ids=())


def _drawn(shape: str, dtype: torch.dtype) -> nn.Module:
    """Every weight drawn. Blocks are large beside the embeddings: with a tied head, small ones would repeat the last
    token for ever."""
    model: Any = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
    return model


def _poured(shape: str, dtype: torch.dtype) -> nn.Module:
    """The weights of a large shape: one block of random numbers, again and again.

    Drawing billions of numbers takes minutes on a processor. The block's length is a prime, so rows differ.
    """
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    model.tie_weights()
    block = torch.randn(BLOCK).to(dtype)
    for name, weights in model.named_parameters():
        if weights.dim() > 1:
            std = 0.02 if "embed" in name or "lm_head" in name else 1.5 / weights.shape[1] ** 0.5
            _pour(weights.data.view(-1), block * std)
    return model


def _pour(flat: torch.Tensor, block: torch.Tensor) -> None:
    for start in range(0, len(flat), len(block)):
        piece = flat[start : start + len(block)]
        piece.copy_(block[: len(piece)])
