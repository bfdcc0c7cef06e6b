"""Pooling: laws, and what half precision and dead tokens must not do to it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from extraction.activations.pooling import POOLINGS, parse_pooling, pool_first, pool_last, pool_mean
from extraction.core.errors import ConfigError


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
def test_dead_tokens_may_hold_anything(poison: float):
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


def test_integer_and_boolean_masks_are_one():
    hidden, mask = ragged()
    assert torch.equal(pool_mean(hidden, mask.long()), pool_mean(hidden, mask))
    assert torch.equal(pool_last(hidden, mask.float()), pool_last(hidden, mask))


def test_inputs_are_left_alone():
    hidden, mask = ragged()
    before, mask_before = hidden.clone(), mask.clone()
    pool_mean(hidden, mask), pool_last(hidden, mask), pool_first(hidden, mask, 2)
    assert torch.equal(hidden, before)
    assert torch.equal(mask, mask_before)


def test_a_row_with_no_live_token_is_refused_and_named():
    hidden, mask = ragged()
    mask[[1, 3]] = False
    for pool in (pool_mean, pool_last, lambda h, m: pool_first(h, m, 2)):
        with pytest.raises(ValueError, match=r"rows \[1, 3\] have no live token"):
            pool(hidden, mask)


def test_shapes_and_counts_that_make_no_sense_are_refused():
    hidden, mask = ragged()
    with pytest.raises(ValueError, match="mask of shape"):
        pool_mean(hidden, mask[:, 1:])
    with pytest.raises(ValueError, match="at least 1"):
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
    ("text", "says"),
    [
        ("respons_mean", "did you mean 'response_mean'"),
        ("mean_response", "known: response_mean"),
        ("response_frist:5", "did you mean 'response_first'"),
        ("Response_Mean", "response_mean"),
        ("zzz", "known: response_mean, response_first:N"),
        ("", "known"),
        ("response_first", "as in 'response_first:5'"),
        ("response_first:", "as in 'response_first:5'"),
        ("response_first:0", "from 1"),
        ("response_first:-1", "from 1"),
        ("response_first:1.5", "from 1"),
        ("response_first:05", "from 1"),
        ("response_first:٣", "from 1"),
        ("response_first:5:6", "from 1"),
        ("response_first:5\n", "from 1"),
        ("response_first:" + "9" * 5000, "from 1"),
        ("response_mean:5", "takes no count; write 'response_mean'"),
        ("all:", "takes no count"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(text: str, says: str):
    with pytest.raises(ConfigError) as refusal:
        parse_pooling(text)
    assert says in str(refusal.value)
    assert repr(text) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_all_keeps_every_token():
    hidden, mask = ragged()
    with pytest.raises(ValueError, match="keeps every token"):
        parse_pooling("all")(hidden, mask)


def test_reading_a_pooling_needs_no_torch():
    check = "import sys, extraction.activations.pooling as room; room.parse_pooling('all'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
