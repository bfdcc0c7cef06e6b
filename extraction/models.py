"""Load a model and a tokenizer, and find what the engine needs to know of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extraction.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return, union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, hence of the hidden states."""
        return self.model.dtype

    def last_logits(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """One forward pass; the logits of the last position alone: [B, V]."""
        if self.keeps_last_logits:
            inputs["logits_to_keep"] = 1
        return self.model(input_ids=input_ids_BT, **inputs).logits[:, -1]  # type: ignore[no-any-return]


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, stop_ids: Iterable[int] | None = None
) -> LanguageModel:
    """Look a model over. Raises ModelError where the engine can't run it: encoder-decoder, recurrent state, no LM head."""
    config = model.config.get_text_config()
    _refuse_unsupported(model, config)
    layers = find_layers(model)
    embeddings = model.get_input_embeddings()
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    if tokenizer is not None and len(tokenizer) > max(vocab_size, embeddings.weight.shape[0]):
        raise ModelError(
            f"{_name(model)}: the tokenizer knows {len(tokenizer)} tokens and the model {vocab_size}: "
            "they don't belong together; give the model's own tokenizer"
        )
    stops = frozenset(stop_ids) if stop_ids is not None else _stop_ids(model, tokenizer)
    return LanguageModel(
        model=model.eval(),
        tokenizer=tokenizer,
        layers=layers,
        hidden_size=int(config.hidden_size),
        vocab_size=vocab_size,
        stop_ids=stops,
        pad_id=_pad_id(config, tokenizer, stops),
        max_positions=_max_positions(config),
        keeps_last_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
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
        if isinstance(getattr(holder, "pad_token_id", None), int) and holder.pad_token_id >= 0:
            return int(holder.pad_token_id)
    return min(stops, default=0)


def _max_positions(config: Any) -> int | None:
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, field, None), int):
            return int(getattr(config, field))
    return None


def _name(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
