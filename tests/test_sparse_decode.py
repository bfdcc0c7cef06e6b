"""Sparse decode attention: equal numbers, few columns read, and only for models checked to be equal.

Shapes: B rows, G heads, S columns of a step, W columns of the cache, C head dimension.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from extraction.engine.generate import generate
from extraction.model import gqa_decode, onednn_linear, sparse_decode
from extraction.model.gqa_decode import gqa_decoding
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.model.sparse_decode import LiveColumns, is_row_major, is_supported, live_columns, sparse_attention
from extraction.utils_batch import Capture, Request
from tests.tiny import deviation, prompts, reference_greedy, tiny_model

B, G, S, W, C = 3, 2, 11, 40, 8
ONE_EACH = {"num_key_value_heads": 4}  # as many key heads as query heads
MODELS = {"llama": ONE_EACH, "olmo3": ONE_EACH, "phi": {}, "gpt2": {}, "opt": {}, "gpt_neox": {}}


def _works() -> bool:
    query, key, value, mask = drawn()
    sparse_decode.silence_sparse_warnings()
    try:
        sparse_attention(query, key, value, LiveColumns.of(mask, key), scaling=1.0)
    except RuntimeError:
        return False
    return True


def drawn(start: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a step: queries; keys and values as columns of larger caches; a mask [B, 1, 1, S] with gaps."""
    generator = torch.Generator().manual_seed(start)
    query_BG1C = torch.randn(B, G, 1, C, generator=generator)
    key, value = (torch.randn(B, G, W, C, generator=generator)[:, :, start : start + S] for _ in range(2))
    mask = torch.rand(B, 1, 1, S, generator=generator) > 0.4
    mask[..., -1] = True
    mask[1, ..., :-1] = False
    return query_BG1C, key, value, mask


needs_op = pytest.mark.skipif(not _works(), reason="this torch has no sampled_addmm on CPUs")


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use it as on an AMD CPU, and forget the checks of models made here."""
    monkeypatch.setattr(onednn_linear, "is_worthwhile", lambda: True)
    gqa_decode._is_equal.clear()
    yield
    gqa_decode._is_equal.clear()


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    score = query.double() @ key.double().transpose(2, 3) * scaling
    return score.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double()


def implementation(lm: LanguageModel) -> str:
    return str(lm.model.get_decoder().config._attn_implementation)


@needs_op
@pytest.mark.parametrize("start", [0, 7, W - S])
def test_it_equals_dense_attention(start: int) -> None:
    query, key, value, mask = drawn(start)
    expected = plain(query, key, value, mask, 0.3)
    with torch.inference_mode():
        columns = LiveColumns.of(mask, key)
        for _ in range(2):  # the buffer of scores is reused
            assert deviation(sparse_attention(query, key, value, columns, scaling=0.3), expected) < 1e-6
        assert deviation(sparse_attention(query, key, value, columns, scaling=0.4), expected) > 1e-2
        others = LiveColumns.of(mask.roll(1, 0), key)
        assert deviation(sparse_attention(query, key, value, others, scaling=0.3), expected) > 1e-2
        assert deviation(sparse_attention(query, value, key, columns, scaling=0.3), expected) > 1e-2


@needs_op
def test_large_scores_do_not_overflow_and_masked_columns_do_not_count() -> None:
    query, key, value, mask = drawn()
    query = query * 1e3
    hidden = ~mask.expand(B, G, 1, S)[:, :, 0]
    key[hidden], value[hidden] = torch.nan, torch.nan
    with torch.inference_mode():
        found = sparse_attention(query, key, value, LiveColumns.of(mask, key), scaling=1.0)
    zeroed = (states.masked_fill(hidden.unsqueeze(-1), 0.0) for states in (key, value))
    assert deviation(found, plain(query, *zeroed, mask, 1.0)) < 1e-5


def test_live_columns_are_cached_as_long_as_their_mask() -> None:
    _, key, value, mask = drawn()
    other = mask.clone()
    found = live_columns(mask, key)
    assert live_columns(mask, value) is found
    assert live_columns(other, key) is not found
    narrow = torch.randn(B, G, S, C)
    assert live_columns(mask, narrow).n_keys != found.n_keys  # another layout of keys
    n_listed = len(sparse_decode._cached)
    del mask, other, found
    gc.collect()
    assert len(sparse_decode._cached) == n_listed - 2


def test_unsupported_steps_are_refused() -> None:
    query, key, value, mask = drawn()
    with torch.inference_mode():
        assert is_supported(query, key, value, mask)
        assert is_supported(query, key.contiguous(), value.contiguous(), mask)
        assert not is_supported(query, key.contiguous(), value, mask)  # values in another layout than keys
        assert not is_supported(query, key, value.contiguous(), mask)
        assert not is_supported(query.repeat(1, 1, 2, 1), key, value, mask)  # two tokens
        assert not is_supported(query.repeat(1, 2, 1, 1), key, value, mask)  # heads that share keys
        assert not is_supported(query, key, value[..., :4], mask)
        assert not is_supported(query, key, value, None)
        assert not is_supported(query, key, value, torch.zeros(mask.shape))  # added to scores: may be ALiBi
        assert not is_supported(query, key, value, mask.repeat(1, G, 1, 1))
    assert not is_supported(query, key, value, mask)  # gradients are enabled


def test_only_adjacent_columns_of_one_cache_are_row_major() -> None:
    cache = torch.randn(B, G, W, C)
    assert is_row_major(cache[:, :, 3:9])
    assert not is_row_major(cache.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 3:9])
    assert not is_row_major(cache[:, :, 3:20:2])
    assert not is_row_major(cache[..., :4])
    assert not is_row_major(cache[:, :1, 3:9].expand(B, G, 6, C))
    assert not is_row_major(cache.double()[:, :, 3:9])
    assert not is_row_major(cache.bfloat16()[:, :, 3:9])


@needs_op
@pytest.mark.usefixtures("worthwhile")
@pytest.mark.parametrize("name", MODELS)
def test_the_engines_tokens_equal_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny_model(name, **MODELS[name]))
    n_calls, own = [0], gqa_decode.sparse_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, columns: LiveColumns, *, scaling: float) -> Tensor:
        n_calls[0] += 1
        return own(query, key, value, columns, scaling=scaling)

    monkeypatch.setattr(gqa_decode, "sparse_attention", counted)
    requests = [Request(str(i), ids, 4 + 3 * (i % 5)) for i, ids in enumerate(prompts(11))]
    expected = {r.id: reference_greedy(lm.model, r.token_ids, r.max_new_tokens, lm.stop_ids) for r in requests}
    with gqa_decoding(lm):
        assert implementation(lm) == gqa_decode.ATTENTION_NAMES["sdpa"]
    n_calls[0] = 0
    found = {c.id: c for c in generate(lm, requests, batch_size=4, capture=Capture(tuple(range(lm.n_layers))))}
    assert {key: c.token_ids for key, c in found.items()} == expected
    assert n_calls[0] > 8 * lm.n_layers
    monkeypatch.setattr(gqa_decode, "_is_faster", lambda *_: False)
    for c in generate(lm, requests, batch_size=4, capture=Capture(tuple(range(lm.n_layers)))):
        key = "residual.response_mean"
        assert deviation(found[c.id].activations[key], c.activations[key]) < 1e-5


@needs_op
@pytest.mark.usefixtures("worthwhile")
def test_only_the_rows_own_columns_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running row reads its own tokens; an idle row the columns since it ended."""
    lm = wrap(tiny_model("llama", **ONE_EACH), stop_ids=())
    budgets = (30, 2, 2, 30, 12, 4)
    requests = [Request(str(i), ids, n) for i, (ids, n) in enumerate(zip(prompts(6), budgets, strict=True))]
    with gqa_decoding(lm):
        pass  # the check runs here
    listed, own = [], LiveColumns.of

    def counted(mask: Tensor, key: Tensor) -> LiveColumns:
        listed.append((mask.shape[0], int(mask.sum()), mask.numel()))
        return own(mask, key)

    monkeypatch.setattr(LiveColumns, "of", staticmethod(counted))
    list(generate(lm, requests, batch_size=6))
    # one list a step; tokens that were read, the newest with those before it
    needed = sum(sum(len(r.token_ids) + t for t in range(1, r.max_new_tokens)) for r in requests)
    read, dense = sum(n for _, n, _ in listed), sum(n for *_, n in listed)
    idle = sum(n for n, *_ in listed) * max(budgets)
    assert len(listed) == max(budgets) - 1
    assert needed <= read < needed + idle
    assert read < 0.8 * dense


@needs_op
@pytest.mark.usefixtures("worthwhile")
def test_with_unequal_logits_the_models_own_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = gqa_decode.sparse_attention
    monkeypatch.setattr(gqa_decode, "sparse_attention", lambda *args, **settings: own(*args, **settings) * 1.01)
    lm = wrap(tiny_model("llama", **ONE_EACH))
    before = implementation(lm)
    with gqa_decoding(lm):
        assert implementation(lm) == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_cpus_and_dtypes_keep_the_models_own_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "is_worthwhile", lambda: False)
    lm = wrap(tiny_model(name, **MODELS[name]))
    before = implementation(lm)
    with gqa_decoding(lm):
        assert implementation(lm) == before
    monkeypatch.setattr(onednn_linear, "is_worthwhile", lambda: True)
    doubled = wrap(tiny_model(name, dtype=torch.float64, **MODELS[name]))
    with gqa_decoding(doubled):
        assert implementation(doubled) == before


@needs_op
@pytest.mark.parametrize("first", ["sparse_decode.silence_sparse_warnings()", "pass"])
def test_torchs_warning_about_sparse_tensors_is_silenced(first: str) -> None:
    script = f"""
import torch
from extraction.model import sparse_decode
{first}
states = torch.zeros(2, 2, 3, 4)
with torch.inference_mode():
    columns = sparse_decode.LiveColumns.of(torch.ones(2, 1, 1, 3, dtype=torch.bool), states)
    sparse_decode.sparse_attention(states[:, :, :1], states, states, columns, scaling=1.0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (first != "pass"), done.stderr
