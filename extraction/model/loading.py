"""Load a model and a tokenizer, and find what the engine needs to know of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extraction.core.errors import ModelError
from extraction.model.devices import placing, runs_on
from extraction.model.kv_cache import CacheWindow, SlotKVCache
from extraction.model.lora import LoraAdapter, attach_lora, find_lora, merge_lora, share_weights
from extraction.model.onednn_linear import use_onednn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from extraction.config.experiments import ModelSpec

MAIN_MEMORY = "main memory"
ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal model: its decoder blocks in order, and the ids that matter.

    `max_positions` is the longest sequence that the model knows (None: no limit of its own).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layers: tuple[nn.Module, ...]
    hidden_size: int
    vocab_size: int
    stop_ids: frozenset[int]
    pad_id: int
    max_positions: int | None
    keeps_last_logits: bool

    @property
    def n_layers(self) -> int:
        """How many decoder blocks."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        embeddings: Any = self.model.get_input_embeddings()
        return runs_on(embeddings, embeddings.weight)

    @property
    def spread(self) -> dict[str, int]:
        """Decoder blocks by device, in order, of a model that is spread over several; empty for one that is not."""
        placed = {str(place) for place in getattr(self.model, "hf_device_map", {}).values()}
        return dict(Counter(map(_place_of, self.layers))) if len(placed) > 1 else {}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states, and of the weights that are not quantised."""
        return self.model.dtype

    @property
    def is_exact(self) -> bool:
        """Whether the same sum in another order is nearly the same: float32 or float64, weights not quantised.

        Products of 8 bits look at all rows of a batch (Dettmers et al. 2022, arXiv 2208.07339).
        """
        return self.dtype in (torch.float32, torch.float64) and not getattr(self.model, "is_quantized", False)

    def last_logits(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """One forward pass; the logits of the last position alone: [B, V]."""
        return self.logits(input_ids_BT, 1, **inputs)[:, -1]

    def logits(self, input_ids_BT: Tensor, n_last: int, **inputs: Any) -> Tensor:
        """One forward pass; the logits of the last `n_last` positions: [B, n_last, V]. Pads without a mask go right."""
        if self.keeps_last_logits:
            inputs["logits_to_keep"] = self._last_positions(input_ids_BT, n_last)
        logits_BTV: Tensor = self.model(input_ids=input_ids_BT, **inputs).logits
        return logits_BTV[:, -n_last:]

    def _last_positions(self, input_ids_BT: Tensor, n_last: int) -> int | Tensor:
        # Layers that share keys and values (Gemma-4) cut the prompt itself when told a number, not when told an index.
        if getattr(self.model.config.get_text_config(), "num_kv_shared_layers", 0):
            width = input_ids_BT.shape[1]
            return torch.arange(width - n_last, width, device=input_ids_BT.device)
        return n_last

    def hidden_states(self, input_ids_BT: Tensor) -> None:
        """One pass through the decoder without the head, for its hooks alone; no mask, so pads must be on the right."""
        self.model.base_model(input_ids=input_ids_BT, use_cache=False)


def load(spec: ModelSpec) -> LanguageModel:
    """Load a model and its tokenizer from a folder or the local cache or the hub, weights complete or not at all.

    An adapter is merged into the model that its config names, as fast as a whole model; it stays beside quantised
    weights. Raises ModelError, in one line that never shows a token, where anything is missing, gated, truncated or
    foreign.
    """
    adapter = adapter_of(spec)
    model = _read_weights(spec if adapter is None else base_of(spec, adapter))
    tokenizer = read_tokenizer(spec)
    with _explaining(spec):
        if adapter is None:
            return wrap(model, tokenizer)
        if spec.quantize is not None:  # rounded weights plus an adapter would be rounded again
            return wrap(attach_lora(model, adapter), tokenizer)
        return wrap(merge_lora(model, adapter), tokenizer)


def load_over(base: LanguageModel, spec: ModelSpec) -> LanguageModel:
    """An adapter over a model that is loaded: both on one copy of the weights, and neither feels the other's hooks.

    For an adapter that leaves its base alone. Raises ModelError as `load` does.
    """
    adapter = adapter_of(spec)
    assert adapter is not None
    assert adapter.leaves_base_alone
    tokenizer = read_tokenizer(spec)
    with _explaining(spec):
        return wrap(attach_lora(share_weights(base.model), adapter), tokenizer)


def _read_weights(spec: ModelSpec) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision}
    with _explaining(spec):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.source,
            dtype=_dtype(spec),
            **placing(spec.device),
            quantization_config=_quantization(spec),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **common,
        )
    model, info = loaded
    broken = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if broken:
        raise ModelError(f"{spec.name}: {len(broken)} weights are missing or misshapen ({broken[0]}); fetch it again")
    return model  # type: ignore[no-any-return]


def adapter_of(spec: ModelSpec) -> LoraAdapter | None:
    """The adapter that a model is, over the one that it names; None for a whole model."""
    with _explaining(spec):
        return find_lora(spec.source, spec.revision)


def base_of(spec: ModelSpec, adapter: LoraAdapter) -> ModelSpec:
    """The model under an adapter. Raises ModelError where that is an adapter too."""
    base = replace(spec, source=adapter.base, revision=adapter.base_revision)
    with _explaining(spec):
        if find_lora(base.source, base.revision) is not None:
            raise ModelError(f"model {spec.name}: its base {base.source} is an adapter too; merge that into its base")
    return base


def read_config(spec: ModelSpec) -> Any:
    """The text config of a model (an adapter's: of its base), without its weights. Raises ModelError as `load` does."""
    from transformers import AutoConfig

    adapter = adapter_of(spec)
    base = spec if adapter is None else base_of(spec, adapter)
    with _explaining(base):
        config = AutoConfig.from_pretrained(
            base.source, trust_remote_code=base.trust_remote_code, revision=base.revision
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {spec.name} is an encoder-decoder; a decoder-only (causal) model is needed")
    return config.get_text_config()


def read_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (an adapter's own if it brings one, else its base's). Raises ModelError as `load`."""
    from transformers import AutoTokenizer

    adapter = adapter_of(spec)
    holder = spec if adapter is None or adapter.has_tokenizer else base_of(spec, adapter)
    with _explaining(holder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            holder.source, trust_remote_code=holder.trust_remote_code, revision=holder.revision
        )
    ids = tokenizer("Words, words; 0123456789.", add_special_tokens=False)["input_ids"]
    if set(ids) <= set(tokenizer.all_special_ids):  # some versions make an empty one where the files are absent
        raise ModelError(f"model {spec.name}: its tokenizer knows no words; fetch the tokenizer's files again")
    return tokenizer


def _dtype(spec: ModelSpec) -> Any:
    return "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)


def _quantization(spec: ModelSpec) -> Any:
    """What transformers is to quantise by, for bitsandbytes; products are worked out in the model's dtype."""
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


def _place_of(block: nn.Module) -> str:
    """Where a decoder block's weights are: on a device, or, to be fetched for every pass, in main memory."""
    weights = list(block.parameters())
    fetched = any(weight.device == torch.device("meta") for weight in weights)
    return MAIN_MEMORY if fetched else str(weights[0].device)


@contextmanager
def _explaining(spec: ModelSpec) -> Iterator[None]:
    """Turn what a loader raises, whatever it is, into one line with a remedy."""
    try:
        yield
    except ModelError:
        raise
    except Exception as failure:  # loaders raise what their file formats raise
        text = " ".join(str(failure).split())
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in text), "check the model's files")
        reason = "" if any(sign in text for sign in _REMEDIES) else f" ({text[:160]})"
        raise ModelError(f"model {spec.name}: can't be loaded from {spec.source}{reason}: {remedy}") from failure


_REMEDIES = {
    "trust_remote_code": "it needs code of its own; read that code, then give --trust-remote-code",
    "trust remote code": "it needs code of its own; read that code, then give --trust-remote-code",
    "gated repo": "it is gated; accept its licence on the hub and log in",
    "401 Client": "it is private or gated; log in to the hub",
    "Unrecognized configuration class": "it is not a causal language model; a decoder-only text model is needed",
    "couldn't connect": "it is not in the local cache and the hub can't be reached; fetch it first, or give a folder",
    "offline mode": "it is not in the local cache and offline mode is on; download it first, or give a folder",
    "not the path to a directory": "no such model on the hub, nor in the local cache; check the name",
    "is not a local folder": "no such model on the hub, nor in the local cache; check the name",
    "offload_folder": "it fits on no device; use --dtype bfloat16, --quantize 4bit or a smaller model",
    "dispatched on the CPU": "it does not fit on the GPUs, where quantised weights must be; use a smaller model",
    "None of the available devices": "bitsandbytes can't work on this machine's devices; leave --quantize out",
    "out of memory": "the device has too little memory; use a smaller model, --dtype bfloat16 or --device cpu",
    "no file named": "it has no weights in safetensors; fetch them, or convert the pickled ones",
    "deserializing header": "its weights are truncated or damaged; fetch them again",
    "incomplete metadata": "its weights are truncated or damaged; fetch them again",
}


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, stop_ids: Iterable[int] | None = None
) -> LanguageModel:
    """Look a model over. Raises ModelError where the engine can't run it: encoder-decoder, recurrent, no LM head."""
    config = model.config.get_text_config()
    _refuse_unsupported(model, config)
    layers = find_layers(model)
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    if tokenizer is not None and len(tokenizer) > max(vocab_size, int(embeddings.weight.shape[0])):
        raise ModelError(
            f"{_name(model)}: the tokenizer knows {len(tokenizer)} tokens and the model {vocab_size}: "
            "they don't belong together; give the model's own tokenizer"
        )
    stops = frozenset(stop_ids) if stop_ids is not None else _stop_ids(model, tokenizer)
    lm = LanguageModel(
        model=model.eval(),
        tokenizer=tokenizer,
        layers=layers,
        hidden_size=int(config.hidden_size),
        vocab_size=vocab_size,
        stop_ids=stops,
        pad_id=_pad_id(config, tokenizer, stops),
        max_positions=max_positions(config),
        keeps_last_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
    )
    use_onednn(lm.model)
    _prove_cached_decoding(lm)
    return lm


@torch.inference_mode()
def _prove_cached_decoding(lm: LanguageModel) -> None:
    """Three tokens at once, then two and one through the cache: a causal model gives the same last logits."""
    ids_BT = torch.arange(3, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    cache = SlotKVCache(lm.n_layers, CacheWindow(slots=1, columns=3))
    try:
        with cache.window.entering(torch.zeros(1, dtype=torch.long, device=lm.device), cursor=2):
            lm.last_logits(ids_BT[:, :2], past_key_values=cache, use_cache=True)
        cached_V = lm.last_logits(ids_BT[:, 2:], past_key_values=cache, use_cache=True)[0].float()
        whole_V = lm.last_logits(ids_BT, use_cache=False)[0].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # an architecture may object in any way
        raise ModelError(
            f"{_name(lm.model)} can't decode with a key-value cache of slots ({type(failure).__name__}: "
            f"{' '.join(str(failure).split())[:120]}); use an attention-only causal model"
        ) from failure
    finite_V = cached_V.isfinite() & whole_V.isfinite()  # what is not finite is named when a job meets it
    scale = float(whole_V[finite_V].abs().max()) if finite_V.any() else 0.0
    tolerance = 1e-3 if lm.is_exact else 0.1
    if ((cached_V - whole_V)[finite_V].abs() > tolerance * scale).any():
        raise ModelError(
            f"{_name(lm.model)} is not a causal model with a key-value cache: token by token it gives other logits "
            "than all at once; use a decoder-only model"
        )


def find_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The decoder blocks in order: the shallowest ModuleList of the decoder with one entry per hidden layer."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    named = [(name, m) for name, m in (decoder or model).named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name.count("."), module) for name, module in named if len(module) == n_layers]
    shallowest = [module for depth, module in found if depth == min(depth for depth, _ in found)]
    if len(shallowest) != 1:
        raise ModelError(
            f"{_name(model)}: {len(shallowest)} module lists of {n_layers} decoder layers found, 1 expected; "
            "this architecture is not supported yet"
        )
    return tuple(shallowest[0])


def _refuse_unsupported(model: PreTrainedModel, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    reasons = {
        "an encoder-decoder; a decoder-only (causal) model is needed": getattr(config, "is_encoder_decoder", False),
        "recurrent: its state has no columns to keep slots in; use an attention-only model": getattr(
            model, "_is_stateful", False
        )
        or bool(kinds - ATTENTION_KINDS),
        "without a language-model head; load it as a causal language model": model.get_output_embeddings() is None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(f"{_name(model)} is {reason}")


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every id that ends a response: the generation config's, the config's and the tokenizer's."""
    holders = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    found: set[int] = set()
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def _pad_id(config: Any, tokenizer: PreTrainedTokenizerBase | None, stops: frozenset[int]) -> int:
    """Any id will do: padding is known by the mask, never by the id."""
    for holder in (tokenizer, config):
        pad_id = getattr(holder, "pad_token_id", None)
        if isinstance(pad_id, int) and pad_id >= 0:
            return pad_id
    return min(stops, default=0)


def max_positions(config: Any) -> int | None:
    """The longest sequence; None: no limit. Shorter than the config's where a long row would change its neighbours."""
    limits = [getattr(config, field, None) for field in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits = [next((limit for limit in [*limits, getattr(config, "seq_length", None)] if isinstance(limit, int)), None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # the whole batch gets other rotary tables past the original context
        field = "original_max_position_embeddings"
        limits.append(rope.get(field) or getattr(config, field, None))
    if getattr(config, "attn_temperature_tuning", None) and getattr(config, "floor_scale", None):
        limits.append(int(config.floor_scale) * 3 // 4)  # Llama 4 scales by columns, which a window has more of
    return min((limit for limit in limits if limit), default=None)


def _name(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
