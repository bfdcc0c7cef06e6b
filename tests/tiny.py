"""Tiny random models of many architectures, their prompts and tokenizer, and references independent of the engine.

Weights are drawn so that greedy continuations differ between prompts and depend on positions and mask: a test
that drops either must fail. Shapes: T tokens, L layers, D hidden, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 97
LAYERS = 3
HIDDEN = 32
MAX_POSITIONS = 128
WINDOW = 8  # shorter than the prompts

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
_EXPERTS: dict[str, Any] = _ROTARY | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT: dict[str, Any] = _EXPERTS | {  # keys and values have different widths
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_UNTIED: dict[str, Any] = {
    "tie_word_embeddings": False
}  # where scaled embeddings would make every tied continuation constant
_PLAIN_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_LLAMA3_ROPE = _PLAIN_ROPE["rope_parameters"] | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SCALED_QUERIES = _PLAIN_ROPE["rope_parameters"] | {  # a query's scale grows with its position
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_GEMMA4: dict[str, Any] = {  # the last layer reads the second one's keys
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "global_head_dim": 16,
}

# name -> (transformers' model type, what differs from the common sizes)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # rotary positions
    "llama": ("llama", _ROTARY),
    "qwen2": ("qwen2", _ROTARY),
    "qwen3": ("qwen3", _ROTARY),
    "gemma": ("gemma", _ROTARY | _UNTIED),
    "phi": ("phi", _ROTARY | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _ROTARY),
    "olmo": ("olmo", _ROTARY),
    "olmo2": ("olmo2", _ROTARY),
    "granite": ("granite", _ROTARY | {"residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "cohere": ("cohere", _ROTARY | {"logit_scale": 1.0}),
    "stablelm": ("stablelm", _ROTARY | {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", _ROTARY),
    "glm": ("glm", _ROTARY),
    "glm4": ("glm4", _ROTARY),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 48}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "falcon": ("falcon", {}),
    "nemotron": ("nemotron", _ROTARY),
    "persimmon": ("persimmon", {"intermediate_size": 48}),
    "helium": ("helium", _ROTARY),
    "nanochat": ("nanochat", _ROTARY),
    "apertus": ("apertus", _ROTARY | _PLAIN_ROPE),
    "seed_oss": ("seed_oss", _ROTARY),
    "hunyuan": ("hunyuan_v1_dense", _ROTARY),
    "ernie4_5": ("ernie4_5", _ROTARY),
    "diffllama": ("diffllama", _ROTARY),
    "bitnet": ("bitnet", _ROTARY),
    "arcee": ("arcee", _ROTARY),
    "gpt_neox_sequential": ("gpt_neox", {"intermediate_size": 48, "use_parallel_residual": False}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama_3_1": ("llama", _ROTARY | {"rope_parameters": _LLAMA3_ROPE}),
    "ministral3": ("ministral3", _ROTARY | {"sliding_window": WINDOW, "rope_parameters": _SCALED_QUERIES}),
    # learned or sinusoidal absolute positions
    "gpt2": ("gpt2", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "opt_post_norm": ("opt", _UNTIED | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "ctrl": ("ctrl", _UNTIED | {"dff": 48}),
    "biogpt": ("biogpt", _UNTIED | {"intermediate_size": 48}),
    "xglm": ("xglm", _UNTIED | {"ffn_dim": 48}),
    # ALiBi
    "bloom": ("bloom", _UNTIED),
    "mpt": ("mpt", _UNTIED),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    # windows shorter than the prompts, soft-capping, sinks
    "mistral": ("mistral", _ROTARY | {"sliding_window": WINDOW}),
    "ministral": ("ministral", _ROTARY | _ALTERNATING),
    "starcoder2": ("starcoder2", _ROTARY | _UNTIED | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", _ROTARY | _ALTERNATING | _UNTIED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _ROTARY | _ALTERNATING | _UNTIED | {"query_pre_attn_scalar": 8}),
    "cohere2": ("cohere2", _ROTARY | _ALTERNATING | {"logit_scale": 1.0}),
    "olmo3": ("olmo3", _ROTARY | _ALTERNATING),
    "exaone4": ("exaone4", _ROTARY | _ALTERNATING),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW, "intermediate_size": 48},
    ),
    "vaultgemma": ("vaultgemma", _ROTARY | _ALTERNATING | _UNTIED),
    "gemma4": ("gemma4_text", _ROTARY | _UNTIED | _GEMMA4),
    "gpt_oss": ("gpt_oss", _EXPERTS | _ALTERNATING | _PLAIN_ROPE),
    # mixture of experts, latent attention
    "mixtral": ("mixtral", _EXPERTS),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "olmoe": ("olmoe", _EXPERTS),
    "granitemoe": ("granitemoe", _EXPERTS | {"attention_multiplier": 0.3}),
    "phimoe": ("phimoe", _EXPERTS),
    "llama4": ("llama4_text", _EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": MAX_POSITIONS}),
    "llama4_chunked": ("llama4_text", _EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": WINDOW}),
    "jetmoe": ("jetmoe", {"intermediate_size": 48, "kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 4}),
    "flex_olmo": ("flex_olmo", _EXPERTS),
    "minimax_m2": ("minimax_m2", _EXPERTS),
    "glm4_moe": ("glm4_moe", _EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "hunyuan_moe": ("hunyuan_v1_moe", _EXPERTS | {"moe_topk": 2}),
    "ernie4_5_moe": ("ernie4_5_moe", _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
}

_GATED_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 8,
}
_MIXER2: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}
_CONVOLUTIONS: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv"]}
_MAMBA_ATTENTION: dict[str, Any] = {"layer_types": ["mamba", "attention", "mamba"]}
_JAMBA: dict[str, Any] = {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
_ONE_DENSE: dict[str, Any] = _EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_INDEXED: dict[str, Any] = _LATENT | {"index_n_heads": 8, "index_head_dim": 8, "index_topk": 6}

# Models that keep convolution or recurrent states, with or without attention.
HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", _EXPERTS | _GATED_DELTA | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", _ROTARY | _GATED_DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", _EXPERTS | _GATED_DELTA | {"shared_expert_intermediate_size": 16}),
    "kimi_linear": (
        "kimi_linear",
        _LATENT
        | {
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            }
        },
    ),
    "bailing_hybrid": ("bailing_hybrid", _LATENT | {"layer_group_size": 2}),
    "olmo_hybrid": ("olmo_hybrid", _ROTARY | _GATED_DELTA | {"linear_num_key_heads": 4}),
    "falcon_h1": ("falcon_h1", _ROTARY | _MAMBA2 | {"mamba_d_ssm": 64}),
    "bamba": ("bamba", _ROTARY | _MAMBA2 | {"attn_layer_indices": [1]}),
    "granite_hybrid": (
        "granitemoehybrid",
        _EXPERTS | _MAMBA2 | _MAMBA_ATTENTION | {"num_local_experts": 0, "shared_intermediate_size": 48},
    ),
    "granite_hybrid_moe": (
        "granitemoehybrid",
        _EXPERTS | _MAMBA2 | _MAMBA_ATTENTION | {"shared_intermediate_size": 48},
    ),
    "jamba": ("jamba", _EXPERTS | _JAMBA),
    "lfm2": ("lfm2", _ROTARY | _CONVOLUTIONS),
    "lfm2_bias": ("lfm2", _ROTARY | _CONVOLUTIONS | {"conv_bias": True}),  # its left padding is not masked
    "lfm2_moe": ("lfm2_moe", _EXPERTS | _CONVOLUTIONS | {"num_dense_layers": 1}),
    "lfm3": ("lfm3", _ROTARY | _CONVOLUTIONS),
    "mamba": ("mamba", {"state_size": 4}),
    "mamba2": ("mamba2", _MIXER2 | {"expand": 2}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 4}),
    "minimax": ("minimax", _EXPERTS | {"layer_types": _GATED_DELTA["layer_types"], "block_size": 8}),
    "zaya": ("zaya", _ROTARY),
    "inkling": ("inkling_text", _ONE_DENSE),
    # their scan of a text clamps time steps where their decode steps don't
    "nemotron_h": (
        "nemotron_h",
        _ROTARY
        | {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "zamba2": (
        "zamba2",
        _ROTARY
        | {
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1],
            "adapter_rank": 4,
        },
    ),
}

# More decoder-only families of transformers.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", _ONE_DENSE | _ALTERNATING | {"num_dense_layers": 1}),
    "axk1": ("axk1", _LATENT),
    "cohere2_moe": ("cohere2_moe", _ONE_DENSE | _ALTERNATING | {"logit_scale": 1.0}),
    "cwm": ("cwm", _ROTARY | _ALTERNATING),
    "doge": ("doge", _ROTARY),
    "dots1": ("dots1", _ONE_DENSE | {"n_shared_experts": 1}),
    "exaone_moe": ("exaone_moe", _ONE_DENSE | _ALTERNATING | {"num_shared_experts": 1}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "granite_swa": ("granite_swa", _ROTARY | _ALTERNATING),
    "granitemoe_swa": ("granitemoe_swa", _EXPERTS | _ALTERNATING),
    "granitemoeshared": (
        "granitemoeshared",
        _EXPERTS | {"shared_intermediate_size": 16, "attention_multiplier": 0.3},
    ),
    "hy_v3": ("hy_v3", _ONE_DENSE),
    "internlm3": ("internlm3", _ROTARY),
    "iquestcoder": ("iquestcoder", _ROTARY),
    "jais2": ("jais2", _ROTARY),
    "kolibri1": ("kolibri1", _ROTARY),
    "flint": ("flint", _ROTARY),
    "laguna": ("laguna", _ONE_DENSE | _ALTERNATING),
    "mellum": ("mellum", _ONE_DENSE | _ALTERNATING),
    "mimo_v2_flash": ("mimo_v2_flash", _ONE_DENSE | _ALTERNATING),
    "minicpm3": ("minicpm3", _LATENT),
    "minimax_m3": ("minimax_m3_vl_text", _ONE_DENSE),
    "modernbert_decoder": (
        "modernbert-decoder",
        {"intermediate_size": 48, "local_attention": WINDOW, "layer_types": _ALTERNATING["layer_types"]},
    ),
    "hyperclovax": ("hyperclovax", _ROTARY),
    "solar_open": ("solar_open", _ONE_DENSE | {"n_shared_experts": 1}),
    "youtu": ("youtu", _LATENT),
    "phi4_multimodal": ("phi4_multimodal", _ROTARY),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "aria_text": ("aria_text", _EXPERTS | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "gemma4_unified": ("gemma4_unified_text", _ROTARY | _UNTIED | _GEMMA4),
    # a sparse attention's indexer chooses the columns
    "deepseek_v32": ("deepseek_v32", _INDEXED),
    "glm_moe_dsa": ("glm_moe_dsa", _INDEXED),
    "axk2": ("axk2", _INDEXED),
}

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": HIDDEN,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}
_SECTIONS: dict[str, Any] = {"rope_parameters": _PLAIN_ROPE["rope_parameters"] | {"mrope_section": [2, 1, 1]}}
_HALF_ROTARY = _SECTIONS["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}


def _vision(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind} | _VISION | changes


# Multimodal models, of which only the text side is used: name -> (model type, text config, vision config)
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl", _ROTARY | _SECTIONS, _VISION | {"hidden_size": HIDDEN}),
    "qwen2_5_vl": ("qwen2_5_vl", _ROTARY | _SECTIONS, _VISION),
    "qwen3_vl": ("qwen3_vl", _ROTARY | _SECTIONS, _VISION | {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ("qwen3_vl_moe", _EXPERTS | _SECTIONS, _VISION | {"deepstack_visual_indexes": [0]}),
    "qwen3_5_vl": ("qwen3_5", _ROTARY | _SECTIONS | _GATED_DELTA, _VISION),
    "mistral3": ("mistral3", _ROTARY | {"model_type": "mistral", "sliding_window": WINDOW}, _vision("pixtral")),
    "ministral3_vl": ("mistral3", _ROTARY | {"model_type": "ministral3"}, _vision("pixtral")),
    "llava": ("llava", _ROTARY | {"model_type": "llama"}, _vision("clip_vision_model")),
    "llava_next": ("llava_next", _ROTARY | {"model_type": "llama"}, _vision("clip_vision_model")),
    "llava_onevision": ("llava_onevision", _ROTARY | {"model_type": "qwen2"}, _vision("siglip_vision_model")),
    "glm4v": ("glm4v", _ROTARY | {"rope_parameters": _HALF_ROTARY}, _VISION),
    "idefics3": ("idefics3", _ROTARY | {"model_type": "llama"}, _VISION),
    "smolvlm": ("smolvlm", _ROTARY | {"model_type": "llama"}, _VISION),
    "internvl": (
        "internvl",
        _ROTARY | {"model_type": "qwen2"},
        _VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
    ),
    "aya_vision": (
        "aya_vision",
        _ROTARY | _ALTERNATING | {"model_type": "cohere2", "logit_scale": 1.0},
        _vision("siglip_vision_model"),
    ),
    "lfm2_vl": ("lfm2_vl", _ROTARY | _CONVOLUTIONS | {"model_type": "lfm2"}, _vision("siglip2_vision_model")),
    "ovis2": ("ovis2", _ROTARY | {"model_type": "qwen2"}, _VISION | {"hidden_stride": 2}),
    "gemma3_vl": ("gemma3", _ROTARY | _ALTERNATING | _UNTIED | {"query_pre_attn_scalar": 8}, _VISION),
    "llama4_vl": ("llama4", _EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": MAX_POSITIONS}, _VISION),
}

# All of the above in one table; the laws for every architecture hold for each name. Only those of QUICK among the three
# later tables run by default: one of each kind.
EVERY_ARCHITECTURE = (*ARCHITECTURES, *HYBRID, *MORE, *MULTIMODAL)
QUICK = ("qwen3_next", "falcon_h1", "lfm2_bias", "mamba", "mamba2", "minimax", "deepseek_v32", "qwen2_5_vl", "mistral3")

# One of each kind: rotary with grouped queries, learned positions, parallel residual, ALiBi, sliding window,
# alternating windows with soft-capping, mixture of experts, latent attention.
FAMILIES = ("llama", "gpt2", "gpt_neox", "bloom", "mistral", "gemma2", "mixtral", "deepseek_v3")

# Models that the engine refuses: name -> (model type, what differs)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}),
    "bart": ("bart", {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}),
    "rwkv": ("rwkv", {"context_length": MAX_POSITIONS}),
    "recurrent_gemma": ("recurrent_gemma", _ROTARY | {"lru_width": HIDDEN, "attention_window_size": WINDOW}),
    "openai-gpt": ("openai-gpt", {}),
    "bert-generation": ("bert-generation", {"intermediate_size": 48}),
    "vit": ("vit", {"image_size": 16, "patch_size": 8, "intermediate_size": 48}),
}


def _config(model_type: str, changes: dict[str, Any]) -> Any:
    """Build a tiny config; skip the test if this transformers lacks the architecture."""
    if "text_config" not in changes:
        changes = _COMMON | changes
    try:
        return AutoConfig.for_model(model_type, **deepcopy(changes))  # some configs change their lists
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        import transformers

        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def _draw(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter with seeded values; norms and biases get their initial value plus noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() < 2:
            noise = parameter.detach().double() + 0.1 * noise
        else:
            noise = noise * (0.3 if "emb" in name or name.endswith(("wte.weight", "wpe.weight")) else 2.0 / HIDDEN**0.5)
        parameter.data.copy_(noise.to(parameter.dtype))


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a seeded random model of EVERY_ARCHITECTURE, in eval mode; `changes` go to its (text) config."""
    if name in MULTIMODAL:
        model_type, text, vision = MULTIMODAL[name]
        text = _COMMON | text | changes
        config, auto = _config(model_type, {"text_config": text, "vision_config": vision}), AutoModelForImageTextToText
    else:
        model_type, differences = {**ARCHITECTURES, **HYBRID, **MORE}[name]
        config, auto = _config(model_type, differences | changes), AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    _draw(model, seed)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.requires_grad_(False)
    return model.eval()


# With seed 0, rounding alone moves activations of this one by 1e-4; with 1 to 3 by at most 2e-5, as of its text model.
SEEDS = {"qwen3_5_vl": 1}


@cache
def shared_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return `tiny_model`, built once a process. A test that changes a model builds its own."""
    return tiny_model(name, dtype=dtype, seed=SEEDS.get(name, 0))


def refused_model(name: str) -> PreTrainedModel:
    """Build a model of one of REFUSED, with the auto class that accepts it."""
    from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM

    model_type, changes = REFUSED[name]
    auto = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "vit": AutoModelForImageClassification}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto.get(name, AutoModelForCausalLM).from_config(_config(model_type, changes))
    _draw(model, seed=0)
    return model.eval()


# --- prompts and tokenizer -------------------------------------------------------------------------------------------


def prompts(n: int, seed: int = 0, vocab: int = VOCABULARY, longest: int = 24) -> list[tuple[int, ...]]:
    """Draw dissimilar prompts of lengths 1 to `longest`, both included; ids 0, 1, 2 are pad, BOS and EOS."""
    rng = random.Random(seed)
    lengths = [longest, 1] + [rng.randint(2, longest - 1) for _ in range(n)]
    return [tuple(rng.randrange(3, vocab) for _ in range(length)) for length in lengths[:n]]


_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-_/+*=<>|{}[]#@&%$"
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tiny_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token a character, 97 in all, and of `more`, with a chat template. Decoding is exact."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*(_SPECIAL + list(_CHARACTERS))[:VOCABULARY], *more]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- references: one sequence at a time, no padding, transformers alone ----------------------------------------------


def until_stop(token_ids: Iterable[int], stop_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the tokens before the first stop token."""
    stops, kept = set(stop_ids), []
    for token in token_ids:
        if token in stops:
            break
        kept.append(token)
    return tuple(kept)


@torch.no_grad()
def reference_greedy(
    model: PreTrainedModel, ids: Sequence[int], n: int, stop_ids: Iterable[int] = ()
) -> tuple[int, ...]:
    """Return the greedy response of `model.generate`, without the stop token."""
    prompt_1T = torch.tensor([list(ids)])
    stops = sorted(stop_ids) or [model.config.get_text_config().vocab_size]  # an id that no token has: never stop
    config = GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=stops, pad_token_id=0)
    out_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), generation_config=config)
    return until_stop(out_1T[0, len(ids) :].tolist(), stop_ids)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks: the outermost list of the right length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return min(lists, key=lambda item: (item[0].count("."), len(item[0])))[1]


def _alone(ids: Sequence[int]) -> dict[str, Tensor]:
    prompt_1T = torch.tensor([list(ids)])
    return {"input_ids": prompt_1T, "attention_mask": torch.ones_like(prompt_1T)}


def _plain(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def taps(modules: Iterable[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect copies of each module's output (or input), in call order."""
    seen: list[Tensor] = []

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_plain(output).detach().clone())

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    handles = [
        m.register_forward_pre_hook(before, with_kwargs=True) if inputs else m.register_forward_hook(after)
        for m in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference_hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return block outputs [L, T, D]: transformers' hidden states, and a hook for the last, which they norm."""
    with taps([blocks(model)[-1]]) as last:
        out = model(**_alone(ids), output_hidden_states=True, use_cache=False)
    # the embeddings come first; the Mamba models, which have no attention, leave them out
    before_last = out.hidden_states[1:-1] if hasattr(out, "past_key_values") else out.hidden_states[:-2]
    return torch.stack([*(h[0] for h in before_last), last[0].reshape(1, len(ids), -1)[0]])


@torch.no_grad()
def reference_site(
    model: PreTrainedModel, ids: Sequence[int], pick: Callable[[nn.Module], nn.Module], *, inputs: bool = False
) -> Tensor:
    """Return the output (or input) of the picked part of every block: [L, T, D]."""
    with taps([pick(block) for block in blocks(model)], inputs=inputs) as seen:
        model(**_alone(ids), use_cache=False)
    return torch.stack([tensor.reshape(len(ids), -1) for tensor in seen])


def pooled(hidden_LTD: Tensor, n_prompt: int, pooling: str) -> Tensor:
    """Pool a reference over prompt + response, as the engine's poolings are named."""
    prompt_LTD, response_LTD = hidden_LTD[:, :n_prompt].double(), hidden_LTD[:, n_prompt:].double()
    if pooling.startswith("response_first:"):
        return response_LTD[:, : int(pooling.split(":")[1])].mean(1)
    table = {
        "response_mean": lambda: response_LTD.mean(1),
        "response_last": lambda: response_LTD[:, -1],
        "prompt_mean": lambda: prompt_LTD.mean(1),
        "prompt_last": lambda: prompt_LTD[:, -1],
        "all": lambda: response_LTD.transpose(0, 1),
    }
    return table[pooling]()


def deviation(got: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value wanted; inf for NaN or other shapes."""
    if got.shape != wanted.shape or not torch.isfinite(got).all():
        return float("inf")
    scale = wanted.double().abs().max().clamp_min(1e-30)
    return float((got.double() - wanted.double()).abs().max() / scale) if wanted.numel() else 0.0
