"""The models that are measured: Llama decoders of known shapes with random weights, so that anybody can repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import extraction
from extraction.models import LanguageModel, wrap

POCKET = Path(extraction.__file__).parent / "pocket" / "pocket" / "config.json"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES: dict[str, tuple[int, ...]] = {
    "tiny": (32, 64, 3, 4, 2, 97),
    "pocket": (256, 672, 6, 8, 8, 2048),  # where the bundled model is not there yet
    "15m": (288, 768, 6, 6, 6, 32000),
    "135m": (576, 1536, 30, 9, 3, 49152),
}


def sizes_of(shape: str) -> dict[str, int]:
    """The sizes of a shape; those of the bundled model for `pocket`."""
    if shape == "pocket" and POCKET.is_file():
        found = json.loads(POCKET.read_text(encoding="utf-8"))
        return {name: int(found[name]) for name in SIZES}
    return dict(zip(SIZES, SHAPES[shape], strict=True))


def random_model(shape: str, seed: int = 0) -> LanguageModel:
    """A seeded random model in float32 that never stops of its own accord."""
    no_ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes: dict[str, Any] = {**sizes_of(shape), **no_ids}
    config = LlamaConfig(**sizes, max_position_embeddings=1024, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
        _enliven(model)
    model.generation_config = GenerationConfig()
    return wrap(model.requires_grad_(False), stop_ids=())


def _enliven(model: LlamaForCausalLM) -> None:
    """Blocks large beside the embeddings: with a tied head, small ones would repeat the last token for ever."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
