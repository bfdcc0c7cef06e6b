"""A loaded causal language model: the transformers model, its tokenizer and what the engine needs to run it.

Shapes: B rows, T tokens, S columns, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from extraction.core.errors import PromptError
from extraction.core.text import show
from extraction.model.devices import compute_device

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


MAIN_MEMORY = "main memory"


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal model, its tokenizer, its decoder blocks in order and its stop and padding ids.

    `max_positions` is the longest sequence that the model supports (None: no limit). `inputs` names the arguments of
    the model's forward. `state_bytes`: bytes of a row's convolution and recurrent states, 0 if it has attention only.
    `pads_prompts` is False if prompts that are read together must be equally long. `notes`: one-line remarks to show
    when the model is loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layers: tuple[nn.Module, ...]
    hidden_size: int
    vocab_size: int
    stop_ids: frozenset[int]
    pad_id: int
    max_positions: int | None
    inputs: frozenset[str]
    state_bytes: int = 0
    pads_prompts: bool = True
    notes: tuple[str, ...] = ()

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device that token ids are sent to."""
        embeddings: Any = self.model.get_input_embeddings()
        return compute_device(embeddings, embeddings.weight)

    @property
    def spread(self) -> dict[str, int]:
        """Number of decoder blocks on each device, in order; empty for a model that is on a single device."""
        devices = {str(device) for device in getattr(self.model, "hf_device_map", {}).values()}
        return dict(Counter(map(_device_of_block, self.layers))) if len(devices) > 1 else {}

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model can read."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def check_ids(self, example_id: str, token_ids: Sequence[int]) -> None:
        """Raise PromptError for a token past the embedding: some tokenizers have more tokens than their model."""
        unknown = next((token_id for token_id in token_ids if token_id >= self.n_embeddings), None)
        if unknown is not None:
            text = "" if self.tokenizer is None else f" ({show(self.tokenizer.decode([unknown]))})"
            raise PromptError(
                f"{example_id}: the model has no embedding of token {unknown}{text}, its last is "
                f"{self.n_embeddings - 1}; leave that token out"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states and of the weights that are not quantised."""
        return self.model.dtype

    @property
    def is_exact(self) -> bool:
        """True if rounding is small, and a row does not depend on its batch: float32 or float64, not quantised.

        8-bit matrix products depend on all rows of a batch (Dettmers et al. 2022, arXiv 2208.07339).
        """
        return self.dtype in (torch.float32, torch.float64) and not getattr(self.model, "is_quantized", False)

    def last_logits(self, input_ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Run one forward pass and return the logits of the last position: [B, V]."""
        return self.logits(input_ids_BT, 1, **inputs)[:, -1]

    def cached_logits(
        self, input_ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, cache: Cache, n_last: int = 1
    ) -> Tensor:
        """Run one forward pass through a cache and return the logits of the last `n_last` positions: [B, n_last, V].

        `mask_BS` covers the columns that attention reads, the new ones included.
        """
        inputs: dict[str, Any] = {"attention_mask": mask_BS, "position_ids": position_BT, "use_cache": True}
        if (
            "cache_params" in self.inputs
        ):  # a model without attention has no older columns; one new column is no padding
            width = input_ids_BT.shape[1]
            inputs |= {"attention_mask": mask_BS[:, -width:] if width > 1 else None, "cache_params": cache}
        else:
            inputs["past_key_values"] = cache
        return self.logits(input_ids_BT, n_last, **inputs)

    def logits(self, input_ids_BT: Tensor, n_last: int, **inputs: Any) -> Tensor:
        """Run one forward pass and return the logits of the last `n_last` positions: [B, n_last, V].

        Without an attention mask, padding must be on the right.
        """
        if "logits_to_keep" in self.inputs:
            inputs["logits_to_keep"] = self._last_positions(input_ids_BT, n_last)
        if "position_ids" not in self.inputs:
            inputs.pop("position_ids", None)
        logits_BTV: Tensor = self.model(input_ids=input_ids_BT, **inputs).logits
        return logits_BTV[:, -n_last:]

    def _last_positions(self, input_ids_BT: Tensor, n_last: int) -> int | Tensor:
        # With shared keys and values (Gemma-4), transformers truncates the prompt for a number, not for an index.
        if getattr(self.model.config.get_text_config(), "num_kv_shared_layers", 0):
            width = input_ids_BT.shape[1]
            return torch.arange(width - n_last, width, device=input_ids_BT.device)
        return n_last

    def hidden_states(self, input_ids_BT: Tensor) -> None:
        """Run the decoder without the head, for its hooks. There is no attention mask: padding must be on the right."""
        self.model.base_model(input_ids=input_ids_BT, use_cache=False)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that holds the decoder blocks; of a multimodal model, the text side."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    base: Any = model.base_model
    found: PreTrainedModel = decoder if hasattr(decoder, "config") else base  # ModernBERT's `decoder` is its head
    return found


def _device_of_block(block: nn.Module) -> str:
    """Return the device of a decoder block's weights; MAIN_MEMORY if they are copied to a device for every pass."""
    weights = list(block.parameters())
    is_offloaded = any(weight.device == torch.device("meta") for weight in weights)
    return MAIN_MEMORY if is_offloaded else str(weights[0].device)
