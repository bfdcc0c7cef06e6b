"""Sampling: the distributions of transformers' warpers, drawn from uniforms of each example. B rows, V vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from extraction.config.settings import SAMPLING, GenerationSettings
from extraction.core.errors import ActivationError, ConfigError
from extraction.engine.sampler import PerRow, Sample, sample_from, uniforms

ARRANGEMENTS = [
    Sample(0.3),
    Sample(1.7),
    Sample(1.0, top_k=1),
    Sample(1.0, top_k=12),
    Sample(1.0, top_k=1000),
    Sample(1.0, top_p=0.5),
    Sample(1.0, top_p=1e-9),
    Sample(1.0, top_p=0.999999),
    Sample(0.6, top_k=20, top_p=0.8),
    Sample(2.5, top_k=40, top_p=0.3),
    Sample(1.0, min_p=0.1),
    Sample(1.0, min_p=1.0),
    Sample(0.7, top_k=30, top_p=0.9, min_p=0.05),
]


def logits(rows: int = 32, vocabulary: int = 97, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Random logits [B, V]."""
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def grid(n: int) -> Tensor:
    """Uniforms at the middles of n equal steps."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def oracle(strategy: Sample, logits_BV: Tensor) -> Tensor:
    """Probabilities [B, V] after transformers' warpers, in its order."""
    no_ids = torch.empty(len(logits_BV), 0, dtype=torch.long)
    scores_BV = TemperatureLogitsWarper(strategy.temperature)(no_ids, logits_BV)
    if strategy.top_k:
        scores_BV = TopKLogitsWarper(strategy.top_k)(no_ids, scores_BV)
    if strategy.top_p < 1:
        scores_BV = TopPLogitsWarper(strategy.top_p)(no_ids, scores_BV)
    if strategy.min_p:
        scores_BV = MinPLogitsWarper(strategy.min_p)(no_ids, scores_BV)
    return scores_BV.double().softmax(-1)


@pytest.mark.parametrize("strategy", ARRANGEMENTS, ids=str)
def test_probabilities_are_those_of_the_warpers_in_their_order(strategy: Sample) -> None:
    for scale in (0.1, 3.0, 30.0):
        logits_BV = logits(scale=scale)
        warped_BV = strategy.warp(logits_BV).double().softmax(-1)
        wanted_BV = oracle(strategy, logits_BV)
        assert torch.equal(warped_BV == 0, wanted_BV == 0)
        torch.testing.assert_close(warped_BV, wanted_BV, atol=1e-6, rtol=1e-5)


SAMPLES = st.builds(
    Sample,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]) | st.floats(0.0, 1.0),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=5), st.integers(0, 2**31), st.sampled_from([0.3, 3.0, 12.0]))
def test_every_row_keeps_the_tokens_that_the_warpers_keep(samples: list[Sample], seed: int, scale: float) -> None:
    """Alone as in a batch of rows with other settings."""
    logits_BV = logits(rows=len(samples), scale=scale, seed=seed)
    together_BV = PerRow(samples, logits_BV.device).warp(logits_BV)
    for i, sample in enumerate(samples):
        # in Sample's own precision, for the same roundings: the shift by the maximum changes the last bits
        shifted_1V = logits_BV[i : i + 1] - logits_BV[i].amax()
        wanted_V = oracle(sample, shifted_1V)[0]
        for warped_V in (sample.warp(logits_BV[i : i + 1])[0], together_BV[i]):
            assert torch.equal(warped_V == -math.inf, wanted_V == 0), sample
            torch.testing.assert_close(warped_V.double().softmax(-1), wanted_V, atol=1e-6, rtol=1e-4)


def test_min_p_before_the_temperature_is_another_distribution() -> None:
    """The negative control of min-p: in another order other tokens are kept, and without it more."""
    strategy, no_ids = Sample(2.5, min_p=0.2), torch.empty(32, 0, dtype=torch.long)
    kept_BV = strategy.warp(logits()) > -math.inf
    swapped_BV = TemperatureLogitsWarper(2.5)(no_ids, MinPLogitsWarper(0.2)(no_ids, logits())) > -math.inf
    assert not torch.equal(kept_BV, swapped_BV)
    assert 32 <= int(kept_BV.sum()) < kept_BV.numel()
    each_BV = PerRow([strategy, Sample(2.5)], torch.device("cpu")).warp(logits(rows=2)) > -math.inf
    assert torch.equal(each_BV[0], (strategy.warp(logits(rows=2)) > -math.inf)[0])
    assert not each_BV[0].all()
    assert each_BV[1].all()


def test_a_sample_of_settings_has_each_of_their_sampling_fields() -> None:
    """A field that the settings lack, or that is None, has its default."""

    class Partial:
        temperature = 0.5
        top_p = None

    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25}
    assert values.keys() == set(SAMPLING)
    assert Sample.of(GenerationSettings(**values)) == Sample(**values)
    assert Sample.of(Partial()) == Sample(0.5)
    assert Sample.of(object()) == Sample(1.0)


def test_request_bodies_have_the_sampling_fields_of_the_settings() -> None:
    """Each with its own default and the same bounds; None has the default of the settings."""
    from extraction.serving.schemas import ChatCompletions, Completions, Generate, GenerateBatch, GenerateLdaBatch

    for body in (Generate, GenerateBatch, GenerateLdaBatch, Completions, ChatCompletions):
        assert set(SAMPLING) <= set(body.model_fields)
    assert Sample.of(Generate(prompt="x", min_p=0.2)) == Sample(0.8, top_p=0.95, min_p=0.2)
    assert Sample.of(Completions(model="m", prompt="x", min_p=0.1)) == Sample(1.0, min_p=0.1)
    with pytest.raises(ValueError, match="min_p"):
        Generate(prompt="x", min_p=1.5)


def test_another_order_is_another_distribution() -> None:
    """The control: top-p before the temperature keeps other tokens."""
    strategy, no_ids = Sample(2.5, top_p=0.8), torch.empty(32, 0, dtype=torch.long)
    swapped_BV = TemperatureLogitsWarper(2.5)(no_ids, TopPLogitsWarper(0.8)(no_ids, logits()))
    assert not torch.equal(strategy.warp(logits()) == -math.inf, swapped_BV == -math.inf)


@pytest.mark.parametrize("strategy", ARRANGEMENTS, ids=str)
def test_equal_steps_of_the_uniform_draw_tokens_in_proportion(strategy: Sample) -> None:
    """Inverse CDF: over n equal steps, a token of probability p comes n p times, give or take one."""
    n, row_1V = 20_000, logits(rows=1)
    token_B = strategy(row_1V.expand(n, -1), grid(n))
    counts_V = torch.bincount(token_B, minlength=97).double()
    wanted_V = oracle(strategy, row_1V)[0] * n
    assert (counts_V[wanted_V == 0] == 0).all()
    assert (counts_V - wanted_V).abs().max() <= 1.1
    assert (counts_V - wanted_V.flip(0)).abs().max() > 100, "the test can't tell distributions apart"


def test_temperature_zero_is_argmax_and_needs_no_uniform() -> None:
    logits_BV = logits()
    assert torch.equal(Sample()(logits_BV), logits_BV.argmax(-1))
    assert torch.equal(Sample(0.0, top_k=3, top_p=0.2)(logits_BV, grid(32)), logits_BV.argmax(-1))
    assert not Sample().draws
    assert Sample(0.1).draws


@pytest.mark.parametrize("strategy", [Sample(1e-30), Sample(1e-45), Sample(1.0, top_k=1), Sample(5.0, top_p=1e-30)])
def test_a_setting_that_leaves_one_token_gives_argmax(strategy: Sample) -> None:
    for scale in (1e-3, 3.0, 1e4):
        logits_BV = logits(scale=scale)
        for uniform in (0.0, 0.5, 1 - 2**-53):
            token_B = strategy(logits_BV, torch.full((32,), uniform, dtype=torch.float64))
            assert torch.equal(token_B, logits_BV.argmax(-1))


def test_the_highest_temperature_makes_near_logits_even() -> None:
    near_BV = logits(rows=1, scale=0.01)
    counts_V = torch.bincount(Sample(100.0)(near_BV.expand(9700, -1), grid(9700)), minlength=97)
    assert counts_V.min() >= 99
    assert counts_V.max() <= 101


def test_the_token_that_crosses_top_p_is_kept() -> None:
    probabilities_1V = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert int((Sample(1.0, top_p=top_p).warp(probabilities_1V.log()) > -math.inf).sum()) == kept


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    for strategy in ARRANGEMENTS:
        together_B = strategy(logits(), grid(32))
        for i in range(32):
            assert strategy(logits()[i : i + 1], grid(32)[i : i + 1]) == together_B[i]


def test_tokens_without_probability_are_never_drawn() -> None:
    """Not even at the ends of the uniform's range, nor where the cumulative sum stands still."""
    scores_1V = torch.full((1, 97), -math.inf)
    scores_1V[0, [3, 40, 41, 90]] = torch.tensor([0.0, 1.0, -1.0, -80.0])
    uniforms_B = torch.cat([torch.tensor([0.0, 2.0**-53, 1 - 2**-53], dtype=torch.float64), grid(997)])
    drawn = set(sample_from(scores_1V.expand(1000, -1).softmax(-1), uniforms_B).tolist())
    assert {3, 40, 41} <= drawn <= {3, 40, 41, 90}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_in_float32(dtype: torch.dtype) -> None:
    half_BV = logits().to(dtype)
    for strategy in ARRANGEMENTS:
        assert torch.equal(strategy(half_BV, grid(32)), strategy(half_BV.float(), grid(32)))


@pytest.mark.parametrize("strategy", [Sample(), Sample(1.0), Sample(0.7, 5, 0.9)], ids=str)
def test_not_a_number_is_refused(strategy: Sample) -> None:
    logits_BV = logits(rows=4)
    logits_BV[2, 50] = math.nan
    with pytest.raises(ActivationError, match="row 2"):
        strategy(logits_BV, grid(4))


@pytest.mark.parametrize("strategy", [Sample(), Sample(1.0), Sample(0.7, 5, 0.9)], ids=str)
def test_a_row_without_any_token_is_refused(strategy: Sample) -> None:
    logits_BV = logits(rows=4)
    logits_BV[1] = -math.inf
    with pytest.raises(ActivationError, match="row 1"):
        strategy(logits_BV, grid(4))


@pytest.mark.parametrize("strategy", ARRANGEMENTS, ids=str)
def test_banned_tokens_stay_banned(strategy: Sample) -> None:
    logits_BV = logits()
    logits_BV[:, ::2] = -math.inf
    assert (strategy(logits_BV, grid(32)) % 2 == 1).all()
    assert (Sample()(logits_BV) % 2 == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"temperature": 101.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_the_value(options: dict[str, float]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=f"{name} {value}"):
        Sample(**options)  # type: ignore[arg-type]


def test_uniforms_are_a_function_of_seed_id_and_step() -> None:
    assert np.array_equal(uniforms("a", 0, 5), uniforms("a", 0, 500)[:5])
    streams = {uniforms(key, seed, 8).tobytes() for key in ("a", "b", "ab", "", "é", "\ud800") for seed in range(-3, 9)}
    assert len(streams) == 6 * 12
    many = np.concatenate([uniforms(f"e{i}", 7, 100) for i in range(1000)])
    assert 0 <= many.min() <= many.max() < 1
    # 10 equal bins: each holds a tenth, within six standard deviations
    assert np.abs(np.histogram(many, 10, (0, 1))[0] - 1e4).max() < 6 * math.sqrt(1e5 * 0.1 * 0.9)
    # successive steps, and the same step of neighbouring examples, don't go together
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(many[:-100], many[100:])[0, 1]) < 0.02


def test_uniforms_never_change_between_versions() -> None:
    """A run that is resumed years later must draw what it would have drawn."""
    golden = [0.43556802468346834, 0.7041805867477337, 0.9996049219335524]
    assert uniforms("pos-i00-q000-r00", 42, 3).tolist() == golden
