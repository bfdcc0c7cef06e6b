"""Grouped decode attention: equal numbers, equal tokens, and only for models checked to be equal."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from extraction.engine import batch
from extraction.engine.generate import generate
from extraction.model import gqa_decode
from extraction.model.attention_weights import watch_attention
from extraction.model.gqa_decode import gqa_attention, gqa_decoding
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Request
from tests.tiny import deviation, prompts, reference_greedy, shared_model, tiny_model

B, H, G, S, C = 3, 6, 2, 11, 8
CAPPED = ["gemma2", "vaultgemma"]


def implementation(lm: LanguageModel) -> str:
    return str(lm.model.get_decoder().config._attn_implementation)


def drawn(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw queries, keys, values, and a mask [B, 1, T, S]: padding on the left, causal on the right."""
    generator = torch.Generator().manual_seed(width)
    query, key, value = (torch.randn(B, n, s, C, generator=generator) for n, s in ((H, width), (G, S), (G, S)))
    column_S = torch.arange(S)
    mask_B1TS = (column_S >= torch.tensor([0, 3, 5])[:, None, None, None]) & (
        column_S <= S - width + torch.arange(width)[:, None]
    )
    return query, key, value, mask_B1TS


def repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """Compute attention with a copy of the key head for every query head."""
    key, value = (states.repeat_interleave(H // G, dim=1) for states in (key, value))
    score = query @ key.transpose(2, 3) * C**-0.5
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    return score.masked_fill(~mask, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_it_equals_attention_with_copied_heads(width: int, softcap: float | None, kind: str) -> None:
    query, key, value, mask = drawn(width)
    mask_or_bias = mask if kind == "boolean" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    found = gqa_attention(query, key, value, mask_or_bias, scaling=C**-0.5, softcap=softcap)
    assert deviation(found, repeated(query, key, value, mask, softcap)) < 1e-6
    others = query.view(B, H // G, G, width, C).transpose(1, 2).reshape(query.shape)  # heads assigned to groups in turn
    assert deviation(found, repeated(others, key, value, mask, softcap)) > 1e-2
    assert deviation(found, repeated(query, key, value, mask.flip(0), softcap)) > 1e-2


@pytest.mark.parametrize("name", CAPPED)
def test_the_engines_tokens_equal_the_models(name: str) -> None:
    lm = wrap(shared_model(name))
    requests = [Request(str(i), ids, 14) for i, ids in enumerate(prompts(9))]
    expected = {request.id: reference_greedy(lm.model, request.token_ids, 14, lm.stop_ids) for request in requests}
    with gqa_decoding(lm):
        assert implementation(lm) == gqa_decode.ATTENTION_NAMES["eager"]
    assert {c.id: c.token_ids for c in generate(lm, requests, batch_size=4)} == expected


def test_decode_steps_use_it_and_prefills_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the model's own function runs in every step; with it, only in prefills."""
    from transformers.models.gemma2 import modeling_gemma2

    lm, seen = wrap(tiny_model("gemma2")), []
    own = modeling_gemma2.eager_attention_forward

    def counted(module: torch.nn.Module, query: Tensor, *args: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
        seen.append(query.shape[2])
        return own(module, query, *args, **settings)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", counted)
    requests = [Request("a", tuple(range(3, 90)), 6)]
    with gqa_decoding(lm):
        pass  # the check runs here
    seen.clear()
    list(generate(lm, requests, batch_size=1))
    assert set(seen) == {87}
    monkeypatch.setattr(batch, "gqa_decoding", lambda _: nullcontext())
    seen.clear()
    list(generate(lm, requests, batch_size=1))
    assert set(seen) == {87, 1}


@pytest.mark.parametrize("name", ["gpt_oss", "bloom"])
def test_attention_of_another_form_is_not_replaced(name: str) -> None:
    """gpt_oss has sinks; BLOOM computes attention outside transformers' interface."""
    lm = wrap(shared_model(name))
    before = implementation(lm)
    with gqa_decoding(lm):
        assert implementation(lm) == before


def test_the_former_implementation_is_restored_after_an_error() -> None:
    lm = wrap(shared_model("gemma2"))
    before = implementation(lm)
    within = gqa_decoding(lm)
    within.__enter__()
    assert implementation(lm) != before
    assert within.__exit__(KeyError, KeyError(), None) is False
    assert implementation(lm) == before


def test_observed_attention_is_not_replaced() -> None:
    lm = wrap(shared_model("gemma2"))
    with watch_attention(lm, (0,), lambda *_: None):
        observed = implementation(lm)
        with gqa_decoding(lm):
            assert implementation(lm) == observed
