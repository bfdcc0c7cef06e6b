"""Attention of a decode step without copies: the queries that share a key head are its query tokens.

A model's eager attention repeats keys and values for every query head, at every step, over the whole cache: with
Gemma-2's 8 query heads on 4 key heads that is most of a step on a processor. Here the heads of a group take the place
of query tokens, so keys and values are read once, as they lie in the cache. A pass of many tokens (a prefill) is left
to the model's own function. Where every query head has a key head of its own, a step may go by listed columns instead
(`ragged.py`). A short proof decides whether a model's attention is one of this form.

Shapes: B rows, H heads, G key heads, R = H / G queries a key head, T new tokens, S columns, C head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from extraction.model import onednn_linear
from extraction.model.attention_weights import eager_of, implementations
from extraction.model.kv_cache import CacheWindow, SlotKVCache
from extraction.model.sparse_decode import is_supported, live_columns, silence_sparse_warnings, sparse_attention

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

NAMES = {"eager": "traitline-grouped-eager", "sdpa": "traitline-grouped"}
MOST_QUERIES = 32  # R T: beyond, copying pays
_proven: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def gqa_attention(
    query_BHTC: Tensor,
    key_BGSC: Tensor,
    value_BGSC: Tensor,
    mask_B1TS: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Softmax of (q . k) times the scaling, soft-capped if asked, over the columns that the mask leaves: [B, H, T, C].

    The mask is boolean, or added to the scores; it must not differ between heads.
    """
    n_rows, n_heads, width, _ = query_BHTC.shape
    n_groups = key_BGSC.shape[1]
    packed = (n_rows, n_groups, n_heads // n_groups * width, -1)
    query_BGQC = query_BHTC.reshape(packed)
    if mask_B1TS is not None and width > 1:
        mask_B1TS = mask_B1TS.repeat(1, 1, n_heads // n_groups, 1)
    if softcap is None:
        found = scaled_dot_product_attention(query_BGQC, key_BGSC, value_BGSC, attn_mask=mask_B1TS, scale=scaling)
    else:
        score = torch.matmul(query_BGQC, key_BGSC.transpose(2, 3)) * scaling
        score = torch.tanh(score / softcap) * softcap
        if mask_B1TS is not None:
            score = score.masked_fill(~mask_B1TS, -torch.inf) if mask_B1TS.dtype == torch.bool else score + mask_B1TS
        found = torch.matmul(score.softmax(-1, dtype=torch.float32).to(query_BHTC.dtype), value_BGSC)
    return found.reshape(n_rows, n_heads, width, -1)


@contextmanager
def gqa_decoding(lm: LanguageModel) -> Iterator[None]:
    """Decode steps on grouped attention while the block lasts, where the model's own would copy, and is of this form.

    Where something else watches the model's attention, it stays as it is. The former implementation comes back.
    """
    decoder: Any = lm.model.get_decoder() if hasattr(lm.model, "get_decoder") else lm.model
    before = implementations(decoder.config)
    name = NAMES.get(str(before[""]))
    if name is None or not _pays(lm, str(before[""])) or not _is_of_this_form(lm, decoder, name, before):
        yield
        return
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _pays(lm: LanguageModel, implementation: str) -> bool:
    """Whether the model's own attention repeats keys and values for a step of one token, or begins too often.

    The model's own can be another one than it is made with.
    """
    from transformers.integrations import sdpa_attention

    modules: list[Any] = [module for module in lm.layers[0].modules() if eager_of(module) is not None]
    groups = [int(getattr(module, "num_key_value_groups", 1)) for module in modules]
    if max(groups, default=1) > 1:
        return implementation != "sdpa" or not hasattr(sdpa_attention, "pack_gqa")
    return (
        implementation == "sdpa"
        and lm.device.type == "cpu"
        and lm.dtype == torch.float32
        and onednn_linear.is_worthwhile()
    )


def _is_of_this_form(lm: LanguageModel, decoder: Any, name: str, before: dict[str, Any]) -> bool:
    """Proven once a model: the same logits of a text decoded token by token, within rounding."""
    if lm.model not in _proven:
        _register()
        silence_sparse_warnings()
        wanted_TV = decode_probe(lm)
        decoder.set_attn_implementation(name)
        try:
            found_TV = decode_probe(lm)
        except Exception:  # an architecture may object in any way
            found_TV = torch.full_like(wanted_TV, torch.nan)
        finally:
            decoder.set_attn_implementation(before)
        error = (found_TV - wanted_TV).abs().max() / wanted_TV.abs().max()
        _proven[lm.model] = bool(error <= (1e-5 if lm.is_exact else 2e-2))
    return _proven[lm.model]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for kind, mask in (("eager", eager_mask), ("sdpa", sdpa_mask)):
        AttentionInterface.register(NAMES[kind], _ATTEND[kind])
        AttentionMaskInterface.register(NAMES[kind], mask)


def _attend_as(
    own: Callable[[nn.Module], Callable[..., Any]],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it: a step is grouped, a prefill is left to the model's own."""
        n_queries = query.shape[1] // key.shape[1] * query.shape[2]
        if n_queries > MOST_QUERIES or (attention_mask is None and query.shape[2] > 1):
            found: tuple[Tensor, Tensor | None] = own(module)(module, query, key, value, attention_mask, **settings)
            return found
        scaling, softcap = settings.get("scaling"), settings.get("softcap")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is None and attention_mask is not None and is_supported(query, key, value, attention_mask):
            columns = live_columns(attention_mask, key)
            return sparse_attention(query, key, value, columns, scaling=scaling).transpose(1, 2), None
        added = gqa_attention(query, key, value, attention_mask, scaling=scaling, softcap=softcap)
        return added.transpose(1, 2).contiguous(), None

    return attend


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    eager = eager_of(module)
    assert eager is not None
    return eager


def _own_sdpa(module: nn.Module) -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    forward: Callable[..., Any] = sdpa_attention_forward
    return forward


_ATTEND = {"eager": _attend_as(_own_eager), "sdpa": _attend_as(_own_sdpa)}


class ProbeText:
    """Two rows of eight tokens, one of them mostly padded, and a cache of slots to decode them through: for proofs."""

    n_prompt, n_tokens = 4, 8

    def __init__(self, lm: LanguageModel, columns: int = n_tokens) -> None:
        self.lm = lm
        self.ids_BT = torch.arange(1, self.n_tokens + 1, device=lm.device).remainder(lm.vocab_size).repeat(2, 1)
        self.mask_BT = torch.ones_like(self.ids_BT, dtype=torch.bool)
        self.mask_BT[1, : self.n_prompt - 1] = False
        self.position_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        self.cache = SlotKVCache(lm.n_layers, CacheWindow(slots=2, columns=columns))

    def read(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor) -> Tensor:
        """One pass through the cache: the last column's logits [B, V]."""
        inputs = {"attention_mask": mask_BS, "position_ids": position_BT}
        return self.lm.last_logits(ids_BT, past_key_values=self.cache, use_cache=True, **inputs)

    def prefill(self) -> Tensor:
        """The prompt: its last logits [B, V]."""
        prompt = slice(0, self.n_prompt)
        with self.cache.window.entering(torch.arange(2, device=self.lm.device), cursor=self.n_prompt):
            return self.read(self.ids_BT[:, prompt], self.mask_BT[:, prompt], self.position_BT[:, prompt])

    def step(self, t: int) -> Tensor:
        """Token t: its logits [B, V]."""
        logits_BV = self.read(self.ids_BT[:, t : t + 1], self.mask_BT[:, : t + 1], self.position_BT[:, t : t + 1])
        self.cache.window.cursor += 1
        return logits_BV


@torch.inference_mode()
def decode_probe(lm: LanguageModel) -> Tensor:
    """Logits in float64 of a short text: a prefill, then token by token, through the cache."""
    text = ProbeText(lm)
    return torch.cat([text.prefill(), *map(text.step, range(text.n_prompt, text.n_tokens))]).double()
