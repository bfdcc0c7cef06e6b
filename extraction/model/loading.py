"""Load causal language models and their tokenizers.

`load` reads a model and checks that the engine can run it; the result is a `LanguageModel`: the transformers model, its
tokenizer, its decoder blocks in order and the ids that generation needs. `wrap` makes one of a model in memory.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from extraction.core.errors import ModelError
from extraction.model.decode_probe import check_decoding
from extraction.model.devices import device_map_for
from extraction.model.language_model import LanguageModel, decoder_of
from extraction.model.lora import LoraAdapter, attach_lora, find_lora, merge_lora, share_weights
from extraction.model.onednn_linear import use_onednn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from extraction.config.experiments import ModelSpec

GGUF, GGUF_DTYPE = ".gguf", torch.bfloat16


def load(spec: ModelSpec) -> LanguageModel:
    """Load a model and its tokenizer from a folder, the local cache or the hub.

    A LoRA adapter is merged into the base model that its config names; over quantised weights it stays unmerged.

    Raises:
        ModelError: weights are missing, gated, truncated, of the wrong shape, or of an unsupported architecture. The
            message is one line and never shows an access token.
    """
    adapter = adapter_of(spec)
    model = _load_weights(spec if adapter is None else base_of(spec, adapter))
    tokenizer = read_tokenizer(spec)
    with _one_line_errors(spec):
        if adapter is None:
            lm = wrap(model, tokenizer)
            return replace(lm, notes=(*_gguf_notes(spec, lm), *lm.notes))
        if spec.quantize is not None:  # merging would round the quantised weights a second time
            return wrap(attach_lora(model, adapter), tokenizer)
        return wrap(merge_lora(model, adapter), tokenizer)


def _gguf_notes(spec: ModelSpec, lm: LanguageModel) -> tuple[str, ...]:
    if not spec.source.endswith(GGUF):
        return ()
    dtype = str(lm.dtype).removeprefix("torch.")
    return (f"{Path(spec.source).name}: its quantised weights are unpacked to {dtype}; --dtype sets another",)


def load_over(base: LanguageModel, spec: ModelSpec) -> LanguageModel:
    """Load a LoRA adapter over a loaded base model, sharing its weights in memory.

    The two models have modules of their own, so hooks on one do not affect the other. The adapter's
    `keeps_base_weights` must be True. Raises ModelError as `load` does.
    """
    adapter = adapter_of(spec)
    assert adapter is not None
    assert adapter.keeps_base_weights
    tokenizer = read_tokenizer(spec)
    with _one_line_errors(spec):
        return wrap(attach_lora(share_weights(base.model), adapter), tokenizer)


def _load_weights(spec: ModelSpec) -> PreTrainedModel:
    with _one_line_errors(spec):
        is_gguf = spec.source.endswith(GGUF)
        loaded: Any = _auto_class(_full_config(spec)).from_pretrained(
            **_place(spec),
            dtype=_dtype(spec),
            **device_map_for(spec.device),
            quantization_config=_quantization(spec),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=None if is_gguf else True,
        )
    model, info = loaded
    broken = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if broken:
        raise ModelError(f"{spec.name}: {len(broken)} weights are missing or misshapen ({broken[0]}); fetch it again")
    return without_vision(model)


def _place(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a model is: a folder, a hub id or a GGUF file."""
    common: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision}
    if not spec.source.endswith(GGUF):
        return {"pretrained_model_name_or_path": spec.source, **common}
    path = Path(spec.source)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **common}


def _auto_class(config: Any) -> Any:
    """Return transformers' class that loads a model with this config: a multimodal one where no text class does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto_map = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in auto_map:
        return AutoModelForCausalLM
    is_multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM


def without_vision(model: PreTrainedModel) -> PreTrainedModel:
    """Drop the parts of a multimodal model that read images or sound, which text never passes; return the model."""
    if model.config.get_text_config() is model.config:
        return model
    kept = {id(module) for part in (decoder_of(model), model.get_input_embeddings()) for module in part.modules()}
    for parent in {id(part): part for part in (model, model.base_model)}.values():
        for name, child in list(parent.named_children()):
            is_text = child is model.get_output_embeddings() or any(id(module) in kept for module in child.modules())
            if not is_text and any(True for _ in child.parameters()):
                setattr(parent, name, nn.Identity())
    return model


def adapter_of(spec: ModelSpec) -> LoraAdapter | None:
    """Return the LoRA adapter that a spec names; None if it names a full model."""
    if spec.source.endswith(GGUF):
        return None
    with _one_line_errors(spec):
        return find_lora(spec.source, spec.revision)


def base_of(spec: ModelSpec, adapter: LoraAdapter) -> ModelSpec:
    """Return the spec of an adapter's base model. Raises ModelError if the base is an adapter too."""
    base = replace(spec, source=adapter.base, revision=adapter.base_revision)
    with _one_line_errors(spec):
        if find_lora(base.source, base.revision) is not None:
            raise ModelError(f"model {spec.name}: its base {base.source} is an adapter too; merge that into its base")
    return base


def read_config(spec: ModelSpec) -> Any:
    """Read a model's text config without its weights; an adapter's is that of its base. Raises ModelError as `load`."""
    adapter = adapter_of(spec)
    config = _full_config(spec if adapter is None else base_of(spec, adapter))
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {spec.name} is an encoder-decoder; a decoder-only (causal) model is needed")
    return config.get_text_config()


def _full_config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    with _one_line_errors(spec):
        return AutoConfig.from_pretrained(**_place(spec))


def read_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer; an adapter without one uses its base's. Raises ModelError as `load` does."""
    from transformers import AutoTokenizer

    adapter = adapter_of(spec)
    holder = spec if adapter is None or adapter.has_tokenizer else base_of(spec, adapter)
    with _one_line_errors(holder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_place(holder))
    ids = tokenizer("Words, words; 0123456789.", add_special_tokens=False)["input_ids"]
    if set(ids) <= set(tokenizer.all_special_ids):  # some versions return an empty tokenizer if its files are absent
        raise ModelError(f"model {spec.name}: its tokenizer has an empty vocabulary; fetch its files again")
    return tokenizer


def _dtype(spec: ModelSpec) -> Any:
    """Return the dtype to load in. The weights of a GGUF file are quantised and name none: GGUF_DTYPE by default."""
    if spec.dtype == "auto":
        return GGUF_DTYPE if spec.source.endswith(GGUF) else "auto"
    return getattr(torch, spec.dtype)


def _quantization(spec: ModelSpec) -> Any:
    """Return transformers' quantisation config for bitsandbytes; matrix products use the model's dtype."""
    if spec.quantize is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantize {spec.quantize} needs bitsandbytes, which is not installed; run: pip install "
            "'traitline[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    if spec.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = _dtype(spec) if spec.dtype != "auto" else getattr(read_config(spec), "dtype", None)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@contextmanager
def _one_line_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn any exception of a loader into a ModelError of one line with a remedy."""
    try:
        yield
    except ModelError:
        raise
    except Exception as failure:  # loaders raise whatever their file formats raise
        text = " ".join(str(failure).split())
        known = next((remedy for part, remedy in _REMEDIES.items() if part in text), None)
        remedy, reason = (known, "") if known is not None else ("check the model's files", f" ({text[:160]})")
        raise ModelError(f"model {spec.name}: can't be loaded from {spec.source}{reason}: {remedy}") from failure


# part of a loader's message -> cause and remedy
_REMEDIES = {
    "trust_remote_code": "it runs code from its repository; read that code, then give --trust-remote-code",
    "trust remote code": "it runs code from its repository; read that code, then give --trust-remote-code",
    "gated repo": "it is gated; accept its licence on the hub and log in",
    "401 Client": "it is private or gated; log in to the hub",
    "GGUF checkpoint": "a GGUF file needs the package gguf; run: pip install 'traitline[exchange]'",
    "Unrecognized configuration class": "it is not a causal language model; a decoder-only text model is needed",
    "couldn't connect": "it is not in the local cache and the hub can't be reached; fetch it first, or give a folder",
    "offline mode": "it is not in the local cache and offline mode is on; download it first, or give a folder",
    "not the path to a directory": "no such model on the hub, nor in the local cache; check the name",
    "is not a local folder": "no such model on the hub, nor in the local cache; check the name",
    "offload_folder": "it fits on no device; give --dtype bfloat16, --quantize 4bit or a smaller model",
    "dispatched on the CPU": "it does not fit on the GPUs, where quantised weights must be; use a smaller model",
    "None of the available devices": "bitsandbytes does not support this machine's devices; leave --quantize out",
    "out of memory": "the device has too little memory; use a smaller model, --dtype bfloat16 or --device cpu",
    "no file named": "it has no weights in safetensors; fetch them, or convert the pickled ones",
    "deserializing header": "its weights are truncated or damaged; fetch them again",
    "incomplete metadata": "its weights are truncated or damaged; fetch them again",
}


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, stop_ids: Iterable[int] | None = None
) -> LanguageModel:
    """Make a `LanguageModel` of a transformers model in memory, after checking that the engine can run it.

    `stop_ids` replaces the ids that end a response. Raises ModelError for an encoder-decoder, a model without
    a language-model head, or one that does not decode through a cache as it does without.
    """
    config = model.config.get_text_config()
    _refuse_unsupported(model, config)
    layers = find_layers(model)
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    # tokens added past the embedding (Gemma 3's <image_soft_token>) are refused in prompts only, by the scheduler
    n_basic = getattr(tokenizer, "vocab_size", 0) if tokenizer is not None else 0
    if n_basic > max(vocab_size, int(embeddings.weight.shape[0])):
        raise ModelError(
            f"{_name(model)}: the tokenizer has {n_basic} tokens and the model {vocab_size}; "
            "give the model's own tokenizer"
        )
    stops = frozenset(stop_ids) if stop_ids is not None else _stop_ids(model, tokenizer)
    lm = LanguageModel(
        model=model.eval(),
        tokenizer=tokenizer,
        layers=layers,
        hidden_size=int(config.hidden_size),
        vocab_size=vocab_size,
        stop_ids=stops,
        pad_id=_pad_id(config, tokenizer, stops, int(embeddings.weight.shape[0])),
        max_positions=max_positions(config),
        inputs=_input_names(model),
    )
    use_onednn(lm.model)
    return check_decoding(lm, _name(model))


def _input_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the arguments that a model's forward takes, of those that the engine may give."""
    parameters = inspect.signature(model.forward).parameters
    names = set(parameters)
    if "cache_params" not in names and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names.add("position_ids")  # passed on to the decoder
    return frozenset(names)


def find_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the decoder blocks in order: the shallowest ModuleList of the decoder with one entry per hidden layer.

    Raises ModelError where there is none, or more than one at that depth.
    """
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    named = [(name, m) for name, m in decoder_of(model).named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name.count("."), module) for name, module in named if len(module) == n_layers]
    lists = [module for depth, module in found if depth == min(depth for depth, _ in found)]
    if len(lists) != 1:
        raise ModelError(
            f"{_name(model)}: {len(lists)} module lists of {n_layers} decoder layers found, 1 expected; "
            "this architecture is not supported yet"
        )
    return tuple(lists[0])


def _refuse_unsupported(model: PreTrainedModel, config: Any) -> None:
    reasons = {
        "an encoder-decoder; a decoder-only (causal) model is needed": getattr(config, "is_encoder_decoder", False),
        "without a language-model head; load it as a causal language model": model.get_output_embeddings() is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"{_name(model)} is {reason}")


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Return every id that ends a response: those of the generation config, the config and the tokenizer."""
    holders = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    stop_ids: set[int] = set()
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        stop_ids.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(stop_ids)


def _pad_id(config: Any, tokenizer: PreTrainedTokenizerBase | None, stops: frozenset[int], n_embeddings: int) -> int:
    """Return the id to pad with. Any id works: padding is marked by the attention mask, never by the id."""
    for holder in (tokenizer, config):
        pad_id = getattr(holder, "pad_token_id", None)
        if isinstance(pad_id, int) and 0 <= pad_id < n_embeddings:
            return pad_id
    return min((stop for stop in stops if stop < n_embeddings), default=0)


def max_positions(config: Any) -> int | None:
    """Return the longest sequence that a config supports; None for no limit.

    It is shorter than the config's limit where a longer row would change the numbers of the other rows of its batch.
    """
    limits = [getattr(config, field, None) for field in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits = [next((limit for limit in [*limits, getattr(config, "seq_length", None)] if isinstance(limit, int)), None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past the original context the whole batch gets other rotary tables
        field = "original_max_position_embeddings"
        limits.append(rope.get(field) or getattr(config, field, None))
    if getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None):
        limits.append(int(config.floor_scale) * 3 // 4)  # Llama 4 scales by cache columns, which outnumber the tokens
    return min((limit for limit in limits if limit), default=None)


def _name(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
