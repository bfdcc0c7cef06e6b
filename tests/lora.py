"""LoRA adapters with random weights over tiny models, saved by peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import tiny_model, tiny_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved_base(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer."""
    tiny_model(name, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_adapter(folder: Path, base: Path, *, seed: int = 1, scale: float = 0.3, **options: Any) -> Path:
    """Save an adapter over the model in `base`, named by a relative path, with random tensors."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear"} | options)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / WEIGHTS)
    drawn = {name: scale * torch.randn(t.shape, generator=generator) for name, t in sorted(tensors.items())}
    save_file(drawn, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, base_model_name_or_path=f"../{base.name}")
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's config."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def peft_reference(folder: Path, base: Path) -> PreTrainedModel:
    """Return the reference: the adapter on its base, by peft alone, unmerged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.eval()
