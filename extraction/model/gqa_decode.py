"""Grouped-query attention (GQA) of a decode step without copying keys and values.

A model's eager attention repeats keys and values for every query head, at every step, over the whole cache: with
Gemma-2's 8 query heads on 4 key heads that is most of a step on a CPU. Here the query heads of a group take the place
of query tokens, so keys and values are read once, in place. A pass of many tokens (a prefill) is left to the model's
own function. Where every query head has a key head of its own, a step on a CPU may use `sparse_decode` instead.
A model is switched over only if a short text gives the same logits with either attention.

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
from extraction.model.attention_weights import attention_implementations, eager_attention_of
from extraction.model.decode_probe import decode_probe
from extraction.model.language_model import decoder_of
from extraction.model.sparse_decode import is_supported, live_columns, silence_sparse_warnings, sparse_attention

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

ATTENTION_NAMES = {"eager": "traitline-grouped-eager", "sdpa": "traitline-grouped"}
MAX_QUERIES = 32  # R T: beyond, copying is faster
_is_equal: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # model -> result of `_gives_equal_logits`


def gqa_attention(
    query_BHTC: Tensor,
    key_BGSC: Tensor,
    value_BGSC: Tensor,
    mask_B1TS: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Compute softmax(scaling * q k^T) v over the columns that the mask leaves: [B, H, T, C].

    Args:
        mask_B1TS: boolean (True: attend) or added to the scores; the same for all heads.
        softcap: if given, scores s become softcap * tanh(s / softcap) before the mask (Gemma-2).
    """
    n_rows, n_heads, width, _ = query_BHTC.shape
    n_groups = key_BGSC.shape[1]
    packed = (n_rows, n_groups, n_heads // n_groups * width, -1)
    query_BGQC = query_BHTC.reshape(packed)
    if mask_B1TS is not None and width > 1:
        mask_B1TS = mask_B1TS.repeat(1, 1, n_heads // n_groups, 1)
    if softcap is None:
        out = scaled_dot_product_attention(query_BGQC, key_BGSC, value_BGSC, attn_mask=mask_B1TS, scale=scaling)
    else:
        score = torch.matmul(query_BGQC, key_BGSC.transpose(2, 3)) * scaling
        score = torch.tanh(score / softcap) * softcap
        if mask_B1TS is not None:
            score = score.masked_fill(~mask_B1TS, -torch.inf) if mask_B1TS.dtype == torch.bool else score + mask_B1TS
        out = torch.matmul(score.softmax(-1, dtype=torch.float32).to(query_BHTC.dtype), value_BGSC)
    return out.reshape(n_rows, n_heads, width, -1)


@contextmanager
def gqa_decoding(lm: LanguageModel) -> Iterator[None]:
    """Run decode steps on grouped attention while the block lasts, if that is faster and gives equal logits.

    A model whose attention is replaced already (`watch_attention`) is left as it is. The former implementation is
    restored at the end.
    """
    decoder: Any = decoder_of(lm.model)
    before = attention_implementations(decoder.config)
    name = ATTENTION_NAMES.get(str(before[""]))
    if name is None or not _is_faster(lm, str(before[""])) or not _gives_equal_logits(lm, decoder, name, before):
        yield
        return
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _is_faster(lm: LanguageModel, implementation: str) -> bool:
    """Return True if a model's own attention copies keys and values, or launches one product per row and head.

    `implementation` is the attention that the model runs with now.
    """
    from transformers.integrations import sdpa_attention

    by_layer = ([m for m in layer.modules() if eager_attention_of(m) is not None] for layer in lm.layers)
    modules: list[Any] = next(filter(None, by_layer), [])  # of the first layer that has attention
    groups = [int(getattr(module, "num_key_value_groups", 1)) for module in modules]
    if max(groups, default=1) > 1:
        return implementation != "sdpa" or not hasattr(sdpa_attention, "pack_gqa")
    return (
        implementation == "sdpa"
        and lm.device.type == "cpu"
        and lm.dtype == torch.float32
        and onednn_linear.is_worthwhile()
    )


def _gives_equal_logits(lm: LanguageModel, decoder: Any, name: str, before: dict[str, Any]) -> bool:
    """Compare a short text's logits with the model's own attention and with ours; cached per model."""
    if lm.model not in _is_equal:
        _register()
        silence_sparse_warnings()
        own_TV = decode_probe(lm)
        decoder.set_attn_implementation(name)
        try:
            ours_TV = decode_probe(lm)
        except Exception:  # an architecture may raise anything
            ours_TV = torch.full_like(own_TV, torch.nan)
        finally:
            decoder.set_attn_implementation(before)
        error = (ours_TV - own_TV).abs().max() / own_TV.abs().max()
        _is_equal[lm.model] = bool(error <= (1e-5 if lm.is_exact else 2e-2))
    return _is_equal[lm.model]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for kind, mask in (("eager", eager_mask), ("sdpa", sdpa_mask)):
        AttentionInterface.register(ATTENTION_NAMES[kind], _ATTENTION_FUNCTIONS[kind])
        AttentionMaskInterface.register(ATTENTION_NAMES[kind], mask)


def _grouped_or_own(
    own_attention: Callable[[nn.Module], Callable[..., Any]],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention function as transformers calls it: a decode step is grouped, a prefill uses the model's own."""
        n_queries = query.shape[1] // key.shape[1] * query.shape[2]
        if n_queries > MAX_QUERIES or (attention_mask is None and query.shape[2] > 1):
            own = own_attention(module)
            out: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **settings)
            return out
        scaling, softcap = settings.get("scaling"), settings.get("softcap")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is None and attention_mask is not None and is_supported(query, key, value, attention_mask):
            columns = live_columns(attention_mask, key)
            return sparse_attention(query, key, value, columns, scaling=scaling).transpose(1, 2), None
        out_BHTC = gqa_attention(query, key, value, attention_mask, scaling=scaling, softcap=softcap)
        return out_BHTC.transpose(1, 2).contiguous(), None

    return attend


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    eager = eager_attention_of(module)
    assert eager is not None
    return eager


def _own_sdpa(module: nn.Module) -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    forward: Callable[..., Any] = sdpa_attention_forward
    return forward


_ATTENTION_FUNCTIONS = {"eager": _grouped_or_own(_own_eager), "sdpa": _grouped_or_own(_own_sdpa)}
