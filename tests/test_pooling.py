"""Poolings: laws, half precision, masked tokens, and names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from extraction.core.errors import ConfigError
from extraction.core.pooling import POOLINGS, parse_pooling, pool_first, pool_last, pool_mean


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[5, 9, 4] and a mask of live stretches: left-padded, right-padded, in the middle, one token, all."""
    hidden = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(5, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate([(3, 9), (0, 4), (2, 7), (5, 6), (0, 9)]):
        mask[row, start:stop] = True
    return hidden, mask


def test_each_row_pools_as_if_alone():
    hidden, mask = ragged()
    for row in range(5):
        alone = hidden[row][mask[row]]
        torch.testing.assert_close(pool_mean(hidden, mask)[row], alone.mean(0))
        torch.testing.assert_close(pool_last(hidden, mask)[row], alone[-1], rtol=0, atol=0)
        for n in (1, 2, 5, 100):
            torch.testing.assert_close(pool_first(hidden, mask, n)[row], alone[:n].mean(0))


def test_first_of_all_tokens_is_the_mean():
    hidden, mask = ragged()
    assert torch.equal(pool_first(hidden, mask, 9), pool_mean(hidden, mask))


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf")])
def test_masked_tokens_may_hold_anything(poison: float):
    hidden, mask = ragged()
    poisoned = hidden.masked_fill(~mask.unsqueeze(-1), poison)
    for pool in (pool_mean, pool_last, lambda h, m: pool_first(h, m, 2)):
        assert torch.equal(pool(poisoned, mask), pool(hidden, mask))
    assert not torch.equal(pool_mean(poisoned, torch.ones_like(mask)), pool_mean(hidden, torch.ones_like(mask)))


@pytest.mark.parametrize(("dtype", "sticks_at"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, sticks_at: int):
    ones = torch.ones(1, 5000, 2, dtype=dtype)
    running = torch.zeros((), dtype=dtype)
    for one in ones[0, :, 0]:
        running = running + one
    assert running.item() == sticks_at  # what a running sum in the input's own precision does
    pooled = pool_mean(ones, torch.ones(1, 5000))
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(1, 2))


def test_large_half_precision_sums_neither_overflow_nor_round():
    hidden = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(1)).mul(3000).half()
    mask = torch.ones(2, 300)
    torch.testing.assert_close(pool_mean(hidden, mask).double(), hidden.double().mean(1), rtol=1e-5, atol=1e-3)


def test_float64_stays_float64():
    hidden, mask = ragged()
    exact = hidden.double()
    for pooled in (pool_mean(exact, mask), pool_last(exact, mask), pool_first(exact, mask, 2)):
        assert pooled.dtype == torch.float64
    assert pool_last(hidden.bfloat16(), mask).dtype == torch.float32


def test_masks_of_any_dtype_are_equal():
    hidden, mask = ragged()
    assert torch.equal(pool_mean(hidden, mask.long()), pool_mean(hidden, mask))
    assert torch.equal(pool_last(hidden, mask.float()), pool_last(hidden, mask))


def test_inputs_are_not_changed():
    hidden, mask = ragged()
    before, mask_before = hidden.clone(), mask.clone()
    pool_mean(hidden, mask), pool_last(hidden, mask), pool_first(hidden, mask, 2)
    assert torch.equal(hidden, before)
    assert torch.equal(mask, mask_before)


def test_a_row_with_no_live_token_is_refused_and_named():
    hidden, mask = ragged()
    mask[[1, 3]] = False
    for pool in (pool_mean, pool_last, lambda h, m: pool_first(h, m, 2)):
        with pytest.raises(ValueError, match=r"\[1, 3\]"):
            pool(hidden, mask)


def test_wrong_shapes_and_counts_are_refused():
    hidden, mask = ragged()
    with pytest.raises(ValueError, match=r"\(5, 8\)"):
        pool_mean(hidden, mask[:, 1:])
    with pytest.raises(ValueError, match="0"):
        pool_first(hidden, mask, 0)


@pytest.mark.parametrize("name", [name for name, kind in POOLINGS.items() if not kind.takes_count])
def test_plain_names_parse_to_themselves(name: str):
    assert str(parse_pooling(name)) == name
    assert parse_pooling(name).part in ("prompt", "response")


def test_a_count_is_kept():
    pooling = parse_pooling("response_first:5")
    assert (pooling.name, pooling.count, str(pooling), pooling.part) == (
        "response_first",
        5,
        "response_first:5",
        "response",
    )
    hidden, mask = ragged()
    assert torch.equal(pooling(hidden, mask), pool_first(hidden, mask, 5))
    assert torch.equal(parse_pooling("prompt_last")(hidden, mask), pool_last(hidden, mask))
    assert len({pooling, parse_pooling("response_first:5"), parse_pooling("response_first:6")}) == 2


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("respons_mean", "'response_mean'"),
        ("mean_response", "response_mean"),
        ("response_frist:5", "'response_first'"),
        ("Response_Mean", "response_mean"),
        ("zzz", "response_first:N"),
        ("", "response_mean"),
        ("response_first", "'response_first:5'"),
        ("response_first:", "'response_first:5'"),
        ("response_first:0", "999999"),
        ("response_first:-1", "999999"),
        ("response_first:1.5", "999999"),
        ("response_first:05", "999999"),
        ("response_first:٣", "999999"),
        ("response_first:5:6", "999999"),
        ("response_first:5\n", "999999"),
        ("response_first:" + "9" * 5000, "999999"),
        ("response_mean:5", "'response_mean'"),
        ("all:", "'all'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(text: str, hint: str):
    with pytest.raises(ConfigError) as refusal:
        parse_pooling(text)
    assert hint in str(refusal.value)
    assert repr(text) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_keeps_every_token():
    hidden, mask = ragged()
    with pytest.raises(ValueError, match="all"):
        parse_pooling("all")(hidden, mask)


def test_parsing_a_pooling_needs_no_torch():
    check = "import sys; from extraction.core.pooling import parse_pooling; parse_pooling('all')"
    check += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
