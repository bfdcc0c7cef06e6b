"""Amplification, after + alpha * (after - before): the formula, and two models decoded by hand, one prompt at a time.

References: tests/two_models.py. Shapes: B rows, V vocabulary, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from extraction.core.errors import ConfigError, ModelError, TraitlineError
from extraction.engine.batch import ContinuousBatch
from extraction.engine.logit_diff import Amplify, amplify_logits
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits
from extraction.engine.steering import Steering
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Request
from tests.tiny import (
    FAMILIES,
    HIDDEN,
    prompts,
    reference_greedy,
    shared_model,
    tiny_model,
    tiny_tokenizer,
    until_stop,
)
from tests.two_models import (
    ALL_LAYERS,
    GREEDY,
    POOLINGS,
    amplified_response,
    chi_square_p,
    fed_at_random,
    plain_amplified,
    run,
    tokens_of,
    warped,
    worst,
)

# transformers 5.4 warns of its own BioGPT
pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
EVERY = pytest.mark.parametrize("name", FAMILIES)
SOME = pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
INFINITY = float("inf")

# --- the formula -----------------------------------------------------------------------------------------------------

LOGITS = st.integers(-960, 960).map(lambda n: n / 16)  # no two so near that rounding decides what is plausible
ALPHAS = st.floats(-3, 30, allow_subnormal=False)


@st.composite
def pairs(draw: Any) -> tuple[list[list[float]], list[list[float]], list[float], float]:
    """Logits of two models [B, V], an alpha for each row, a plausibility that no token sits right upon."""
    n_rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def rows(element: Any) -> list[list[float]]:
        return [draw(st.lists(element, min_size=vocab, max_size=vocab)) for _ in range(n_rows)]

    after, before = rows(LOGITS), rows(LOGITS)
    return after, before, [draw(ALPHAS) for _ in range(n_rows)], draw(st.sampled_from([0.0, 0.1003, 0.5007, 1.0]))


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_the_formula_is_what_it_says_one_number_at_a_time(arguments: Any) -> None:
    after, before, alphas, plausibility = arguments
    got_BV = amplify_logits(
        *(torch.tensor(each, dtype=torch.float64) for each in (after, before, alphas)), plausibility
    )
    for row in range(len(after)):
        wanted = plain_amplified(after[row], before[row], alphas[row], plausibility)
        assert got_BV[row].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(pairs(), st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_either_models_logits_changes_no_probability(arguments: Any, a: float, b: float) -> None:
    """Logits have no zero of their own."""
    after_BV, before_BV, alpha_B = (torch.tensor(each, dtype=torch.float64) for each in arguments[:3])
    plain_BV = amplify_logits(after_BV, before_BV, alpha_B).softmax(-1)
    shifted_BV = amplify_logits(after_BV + a, before_BV + b, alpha_B).softmax(-1)
    assert torch.allclose(plain_BV, shifted_BV, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_alpha_minus_one_is_the_model_before_and_rows_are_their_own(arguments: Any) -> None:
    after_BV, before_BV, alpha_B = (torch.tensor(each, dtype=torch.float64) for each in arguments[:3])
    assert torch.allclose(amplify_logits(after_BV, before_BV, torch.full_like(alpha_B, -1.0)), before_BV, atol=1e-12)
    whole_BV = amplify_logits(after_BV, before_BV, alpha_B)
    for row in range(len(alpha_B)):
        one = slice(row, row + 1)
        assert torch.equal(whole_BV[one], amplify_logits(after_BV[one], before_BV[one], alpha_B[one]))


def random_logits(*, seed: int, dtype: torch.dtype = torch.float32, scale: float = 5.0) -> Tensor:
    """[B, V] of some spread."""
    return (scale * torch.randn(6, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alpha_0_is_the_model_after_bit_for_bit(dtype: torch.dtype) -> None:
    after_BV, before_BV = random_logits(seed=0, dtype=dtype), random_logits(seed=1, dtype=dtype, scale=80)
    after_BV[0, 3], before_BV[1, 3], after_BV[2, 4], before_BV[2, 4] = (-INFINITY,) * 4
    wide_BV = after_BV.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(amplify_logits(after_BV, before_BV, torch.zeros(6)), wide_BV)
    mixed_BV = amplify_logits(after_BV, before_BV, torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 0.0]))
    assert torch.equal(mixed_BV[[0, 1, 2, 5]], wide_BV[[0, 1, 2, 5]])
    assert not torch.equal(mixed_BV[3:5], wide_BV[3:5])


@pytest.mark.parametrize("alpha", [-1e6, -1.0, 0.3, 1.0, 77.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_against_itself_is_unchanged_for_every_alpha(alpha: float, dtype: torch.dtype) -> None:
    after_BV = random_logits(seed=0, dtype=dtype, scale=300)
    after_BV[1, 3] = -INFINITY
    wide_BV = after_BV.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(amplify_logits(after_BV, after_BV.clone(), torch.full((6,), alpha)), wide_BV)


@HALVES
def test_half_precision_is_widened_before_anything_is_subtracted(dtype: torch.dtype) -> None:
    after_BV, before_BV = random_logits(seed=0, dtype=dtype, scale=30), random_logits(seed=1, dtype=dtype, scale=30)
    alpha_B = torch.linspace(0.1, 3.3, 6)
    got_BV = amplify_logits(after_BV, before_BV, alpha_B)
    assert got_BV.dtype == torch.float32
    wanted_BV = after_BV.float() + alpha_B[:, None] * (after_BV.float() - before_BV.float())
    assert torch.equal(got_BV, wanted_BV)
    halved_BV = (after_BV + alpha_B[:, None].to(dtype) * (after_BV - before_BV)).float()
    assert not torch.equal(got_BV, halved_BV), "the test can't tell half precision"


@HALVES
def test_what_overflows_in_half_precision_does_not(dtype: torch.dtype) -> None:
    """1000 + 100 * 2000 is past float16's 65504."""
    after_BV, before_BV = torch.tensor([[1000.0, 0.0]], dtype=dtype), torch.tensor([[-1000.0, 0.0]], dtype=dtype)
    assert amplify_logits(after_BV, before_BV, torch.tensor([100.0])).tolist() == [[201000.0, 0.0]]


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.0, 1e6])
def test_minus_infinity_never_makes_nan_and_what_after_rules_out_stays_out(alpha: float) -> None:
    some = torch.tensor([1.0, 2.0, -INFINITY, -INFINITY, 0.5])
    other = torch.tensor([3.0, -INFINITY, 1.0, -INFINITY, -0.5])
    got_V = amplify_logits(some[None], other[None], torch.tensor([alpha]))[0]
    assert not got_V.isnan().any()
    assert (got_V == -INFINITY).tolist()[2:4] == [True, True]
    assert got_V[[0, 4]].tolist() == pytest.approx([1 + alpha * -2.0, 0.5 + alpha * 1.0])
    if alpha > 0:
        assert int(got_V.argmax()) == 1, "what only `before` rules out is what `after` learnt"
    for sample in (Sample(), Sample(1.0), Sample(0.5, top_k=2), Sample(1.0, top_p=0.9)):
        token = int(sample(got_V[None], torch.tensor([0.5]))[0])
        assert token not in (2, 3)


def test_a_row_of_large_gaps_and_a_large_alpha_can_still_be_drawn_from() -> None:
    after_BV, before_BV = random_logits(seed=0, scale=3e3), random_logits(seed=1, scale=3e3)
    got_BV = amplify_logits(after_BV, before_BV, torch.full((6,), 1e6))
    assert got_BV.isfinite().all()
    assert len(Sample(1.0)(got_BV, torch.full((6,), 0.5))) == 6


def test_plausibility_is_li_and_others_equation_2() -> None:
    """Kept: tokens of at least that share of the likeliest token's probability, by the model after alone."""
    chances_1V = torch.tensor([[0.5, 0.26, 0.24, 0.0]], dtype=torch.float64)
    before_1V = torch.tensor([[0.1, 0.1, 0.7, 0.1]], dtype=torch.float64)
    arguments = chances_1V.log(), before_1V.log(), torch.ones(1, dtype=torch.float64)
    for plausibility, kept in ((0.0, 3), (1e-9, 3), (0.4799, 3), (0.4801, 2), (0.5201, 1), (1.0, 1)):
        got_V = amplify_logits(*arguments, plausibility)[0]
        assert int(got_V.isfinite().sum()) == kept, plausibility
        assert got_V[:kept].tolist() == pytest.approx((arguments[0] * 2 - arguments[1])[0, :kept].tolist()), (
            "those that stay keep their scores"
        )
    ties_1V = torch.tensor([[2.0, 2.0, 1.0]])
    assert amplify_logits(ties_1V, torch.zeros(1, 3), torch.ones(1), 1.0).isfinite().tolist() == [[True, True, False]]


def test_the_formula_changes_none_of_its_arguments() -> None:
    arguments = random_logits(seed=0), random_logits(seed=1), torch.ones(6)
    before = [each.clone() for each in arguments]
    amplify_logits(*arguments, 0.1)
    assert all(torch.equal(each, was) for each, was in zip(arguments, before, strict=True))


@pytest.mark.parametrize("alpha", [INFINITY, -INFINITY, float("nan")])
def test_an_alpha_that_is_no_number_is_refused_for_the_run_and_for_a_request(alpha: float) -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    with pytest.raises(ConfigError, match="alpha") as caught:
        Amplify(lm, alpha=alpha)
    assert str(alpha) in str(caught.value)
    requests = [Request("fine", (3, 4), 2), Request("odd", (3, 4), 2, alpha=alpha)]
    with pytest.raises(ConfigError, match="alpha"):
        run(lm, requests, 2, strategy=Amplify(lm))


@pytest.mark.parametrize("plausibility", [-0.1, 1.1, float("nan")])
def test_a_plausibility_out_of_range_is_refused(plausibility: float) -> None:
    with pytest.raises(ConfigError, match="plausibility") as caught:
        Amplify(wrap(shared_model("llama")), plausibility=plausibility)
    assert str(plausibility) in str(caught.value)


# --- through the engine ----------------------------------------------------------------------------------------------

BUDGETS = (7, 9, 1, 5, 9, 2, 8)
OWN_ALPHAS = (None, 0.0, 3.0, -0.5, 1.5)
RUN_ALPHA = 0.8


@cache
def before_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Another model of the same architecture and vocabulary."""
    return tiny_model(name, dtype=dtype, seed=1)


@cache
def requests_of(name: str, n: int, seed: int = 0) -> tuple[Request, ...]:
    """Make requests of dissimilar prompts with budgets of 1 to 9 tokens; some have their own alpha."""
    return tuple(
        Request(f"e{i}", prompt, BUDGETS[i % len(BUDGETS)], alpha=OWN_ALPHAS[i % len(OWN_ALPHAS)])
        for i, prompt in enumerate(prompts(n, seed=seed))
    )


def alpha_of(request: Request) -> float:
    """Its own, or the run's."""
    return RUN_ALPHA if request.alpha is None else request.alpha


@cache
def by_hand(
    name: str, n: int, dtype: torch.dtype = torch.float32, sample: Sample = GREEDY, plausibility: float = 0.0
) -> dict[str, tuple[int, ...]]:
    """Two transformers models, one prompt at a time."""
    models = shared_model(name, dtype), before_model(name, dtype)
    return {r.id: amplified_response(*models, r, alpha_of(r), sample, plausibility) for r in requests_of(name, n)}


@cache
def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, LanguageModel]:
    """The two models, wrapped, without stop tokens."""
    return wrap(shared_model(name, dtype), stop_ids=()), wrap(before_model(name, dtype), stop_ids=())


@EVERY
def test_greedy_equals_two_models_by_hand_and_activations_are_those_of_the_model_after(name: str) -> None:
    requests, wanted = requests_of(name, 6), by_hand(name, 6)
    after, before = pair(name)
    strategy = Amplify(before, alpha=RUN_ALPHA)
    for batch_size, capture in ((1, None), (4, Capture(ALL_LAYERS, poolings=POOLINGS)), (6, None)):
        done = run(after, requests, batch_size, strategy=strategy, capture=capture)
        assert tokens_of(done) == wanted, batch_size
        assert {c.finish_reason for c in done.values()} == {"length"}
        if capture is not None:
            assert all(len(c.activations) == len(POOLINGS) for c in done.values())
            assert worst(name, requests, done, torch.float32) < 1e-5


@SOME
def test_the_reference_can_fail(name: str) -> None:
    """Alphas, models and prompts lead to other words: a mix-up of any would show."""
    plain = {r.id: reference_greedy(shared_model(name), r.token_ids, r.max_new_tokens) for r in requests_of(name, 9)}
    wanted = by_hand(name, 9)
    zero = [r.id for r in requests_of(name, 9) if r.alpha == 0]
    assert [wanted[key] for key in zero] == [plain[key] for key in zero]
    assert sum(wanted[key] != plain[key] for key in wanted if key not in zero) >= 4
    assert len(set(wanted.values())) >= 7


@SOME
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_rows_keep_their_alphas_in_any_batch_and_order(name: str, batch_size: int) -> None:
    wanted, requests = by_hand(name, 9), list(requests_of(name, 9))
    after, before = pair(name)
    strategy = Amplify(before, alpha=RUN_ALPHA)
    for order, capture in ((requests, None), (requests[::-1], Capture((1,))), (requests[4:] + requests[:4], None)):
        assert tokens_of(run(after, order, batch_size, strategy=strategy, capture=capture)) == wanted


@SOME
def test_sampled_tokens_equal_two_models_by_hand_with_the_same_random_numbers(name: str) -> None:
    sample = Sample(0.9, top_k=30, top_p=0.95)
    wanted = by_hand(name, 7, sample=sample)
    after, before = pair(name)
    for batch_size in (1, 3, 7):
        strategy = Amplify(before, sample, alpha=RUN_ALPHA)
        assert tokens_of(run(after, requests_of(name, 7), batch_size, strategy=strategy)) == wanted


def test_every_request_has_its_own_temperature_top_k_and_top_p() -> None:
    own = (Sample(), Sample(0.8, top_p=0.9), None, Sample(1.4, top_k=20))
    requests = [replace(r, sample=own[i % 4], seed=5) for i, r in enumerate(requests_of("llama", 9))]
    after, before = pair("llama")
    wanted = {
        r.id: amplified_response(after.model, before.model, r, alpha_of(r), r.sample or Sample(1.0)) for r in requests
    }
    for batch_size in (1, 4, 9):
        strategy = Amplify(before, Sample(1.0), alpha=RUN_ALPHA)
        assert tokens_of(run(after, requests, batch_size, strategy=strategy)) == wanted


@pytest.mark.parametrize("plausibility", [0.1, 0.6, 1.0])
def test_plausibility_equals_two_models_by_hand(plausibility: float) -> None:
    requests = [replace(r, alpha=4.0) for r in requests_of("llama", 7)]
    after, before = pair("llama")
    models = after.model, before.model
    wanted = {r.id: amplified_response(*models, r, 4.0, Sample(1.0), plausibility) for r in requests}
    bare = {r.id: amplified_response(*models, r, 4.0, Sample(1.0)) for r in requests}
    done = run(after, requests, 3, strategy=Amplify(before, Sample(1.0), plausibility=plausibility))
    assert tokens_of(done) == wanted
    assert wanted != bare


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_alibi"])
def test_in_float64_the_law_holds_to_rounding(name: str) -> None:
    after, before = pair(name, torch.float64)
    capture = Capture(ALL_LAYERS, poolings=POOLINGS)
    done = run(after, requests_of(name, 6), 4, strategy=Amplify(before, alpha=RUN_ALPHA), capture=capture)
    assert tokens_of(done) == by_hand(name, 6, torch.float64)
    assert worst(name, requests_of(name, 6), done, torch.float64) < 1e-10


@HALVES
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_in_half_precision_it_runs_and_alpha_0_is_plain(name: str, dtype: torch.dtype) -> None:
    after, before = pair(name, dtype)
    requests = [replace(r, alpha=0.0, seed=1) for r in requests_of(name, 6)]
    for sample in (Sample(), Sample(1.0)):
        plain = run(after, requests, 6, strategy=sample)
        assert tokens_of(run(after, requests, 6, strategy=Amplify(before, sample))) == tokens_of(plain)
    done = run(after, requests_of(name, 6), 3, strategy=Amplify(before, alpha=2.0), capture=Capture(ALL_LAYERS))
    assert {c.finish_reason for c in done.values()} == {"length"}


@SOME
@pytest.mark.parametrize("sample", [Sample(), Sample(0.8, top_p=0.9)], ids=["greedy", "sampled"])
def test_alpha_0_and_a_model_against_itself_are_the_model_alone(name: str, sample: Sample) -> None:
    after, before = pair(name)
    requests = [replace(r, alpha=None, seed=3) for r in requests_of(name, 9)]
    plain = tokens_of(run(after, requests, 4, strategy=sample))
    assert tokens_of(run(after, requests, 4, strategy=Amplify(before, sample, alpha=0.0))) == plain
    twin = wrap(tiny_model(name), stop_ids=())
    for other in (after, twin):
        assert tokens_of(run(after, requests, 4, strategy=Amplify(other, sample, alpha=50.0))) == plain
    assert tokens_of(run(after, requests, 4, strategy=Amplify(before, sample, alpha=1.0))) != plain


def test_many_requests_roll_the_window_again_and_again() -> None:
    requests = [
        replace(r, id=f"r{i}", max_new_tokens=3 + 5 * (i % 5)) for i, r in enumerate(requests_of("gpt2", 24, seed=3))
    ]
    after, before = pair("gpt2")
    wanted = {r.id: amplified_response(after.model, before.model, r, alpha_of(r)) for r in requests}
    for batch_size in (2, 7):
        done = run(after, requests, batch_size, strategy=Amplify(before, alpha=RUN_ALPHA), capture=Capture((1,)))
        assert tokens_of(done) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_that_come_and_go_leave_the_others_as_they_are(name: str) -> None:
    """Requests arrive and are dropped at any step, longer ones than those that run too: both caches follow."""
    after, before = pair(name)
    wanted = by_hand(name, 9)
    n_dropped = 0
    for seed in range(8):
        rng = random.Random(seed)
        limits = BatchLimits(slots=rng.randint(1, 5), longest=40, budget=9)
        batch = ContinuousBatch(after, limits, strategy=Amplify(before, alpha=RUN_ALPHA))
        done, dropped = fed_at_random(batch, rng.sample(requests_of(name, 9), 9), rng)
        assert done == {key: said for key, said in wanted.items() if key not in dropped}, seed
        n_dropped += len(dropped)
    assert n_dropped > 2


def test_before_may_be_of_another_architecture() -> None:
    after, before = pair("llama")[0], pair("gpt2")[1]
    wanted = {r.id: amplified_response(after.model, before.model, r, alpha_of(r)) for r in requests_of("llama", 7)}
    assert tokens_of(run(after, requests_of("llama", 7), 3, strategy=Amplify(before, alpha=RUN_ALPHA))) == wanted


def test_stop_tokens_are_those_of_the_model_after_and_may_be_ignored() -> None:
    after, before = pair("llama")
    wanted = by_hand("llama", 7)
    stops = (wanted["e0"][2], wanted["e1"][0])
    lm = wrap(after.model, stop_ids=stops)
    requests = [
        *requests_of("llama", 7),
        *(replace(r, id=f"on-{r.id}", ignore_eos=True) for r in requests_of("llama", 7)),
    ]
    stopping = wrap(before.model, stop_ids=[t for t in range(97) if t not in stops])
    done = run(lm, requests, 3, strategy=Amplify(stopping, alpha=RUN_ALPHA), capture=Capture(ALL_LAYERS))
    for key, said in wanted.items():
        kept = until_stop(said, stops)
        assert (done[key].token_ids, done[f"on-{key}"].token_ids) == (kept, said)
        assert done[key].finish_reason == ("stop" if len(kept) < len(said) else "length")
    assert done["e1"].activations == {}
    assert worst("llama", requests, done, torch.float32) < 1e-5


def test_stop_strings_end_a_response_at_the_token_that_completes_them() -> None:
    after, before = pair("llama")
    tokenizer, wanted = tiny_tokenizer(), by_hand("llama", 7)
    stop = tokenizer.decode(list(wanted["e0"][2:4]))
    lm = wrap(after.model, tokenizer, stop_ids=())
    done = run(lm, requests_of("llama", 7), 3, strategy=Amplify(before, alpha=RUN_ALPHA), stop_strings=(stop,))
    for key, said in wanted.items():
        ends = [n for n in range(1, len(said) + 1) if stop in tokenizer.decode(list(said[:n]))]
        assert done[key].token_ids == said[: ends[0] if ends else len(said)]
    assert done["e0"].finish_reason == "stop_string"


def test_steering_changes_the_model_after_alone() -> None:
    """The difference is of the steered model to `before` as it is."""
    after, before = pair("llama")
    shift_D = 6 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    requests = [
        replace(r, steering=Steering(add={1: shift_D}) if i % 2 else None)
        for i, r in enumerate(requests_of("llama", 6))
    ]
    done = run(after, requests, 4, strategy=Amplify(before, alpha=RUN_ALPHA))
    wanted = by_hand("llama", 6)
    for i, r in enumerate(requests):
        if not i % 2:
            assert done[r.id].token_ids == wanted[r.id]
            continue
        with shifted(after.model, shift_D):
            assert done[r.id].token_ids == amplified_response(after.model, before.model, r, alpha_of(r))
    assert tokens_of(done) != wanted


@contextmanager
def shifted(model: Any, shift_D: Tensor) -> Iterator[None]:
    """The second block's output, moved everywhere."""

    def move(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + shift_D, *output[1:]) if isinstance(output, tuple) else output + shift_D

    handle = model.model.layers[1].register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def test_a_first_token_is_drawn_from_the_amplified_distribution() -> None:
    after, before = pair("gpt2")
    prompt = requests_of("gpt2", 1)[0].token_ids
    requests = [Request(f"e{i}", prompt, 1, alpha=1.2) for i in range(4096)]
    strategy = Amplify(before, Sample(1.1, top_k=20))
    counts: dict[Any, int] = {}
    for completion in run(after, requests, 256, strategy=strategy).values():
        counts[completion.token_ids, "length"] = counts.get((completion.token_ids, "length"), 0) + 1
    with torch.no_grad():
        rows = [m.model(torch.tensor([list(prompt)])).logits[0, -1].double().tolist() for m in (after, before)]
    for alpha, right in ((1.2, True), (0.9, False)):
        scores_V = torch.tensor(plain_amplified(*rows, alpha, 0.0))
        chances = {((t,), "length"): p for t, p in enumerate(warped(scores_V, strategy.sample).softmax(-1).tolist())}
        assert (chi_square_p(counts, chances) > 1e-6) == right


def test_prompt_and_budget_may_fill_both_models_contexts() -> None:
    after, before = pair("gpt2")
    requests = [
        Request(f"r{i}", tuple(3 + (7 * i + 5 * t) % 90 for t in range(length)), n, alpha=1.0)
        for i, (length, n) in enumerate(((120, 8), (2, 20), (127, 1), (100, 28)))
    ]
    wanted = {r.id: amplified_response(after.model, before.model, r, 1.0) for r in requests}
    done = run(after, requests, 3, strategy=Amplify(before), capture=Capture((0,)))
    assert tokens_of(done) == wanted


# --- negative controls -----------------------------------------------------------------------------------------------


@SOME
def test_swapped_models_and_a_neighbours_alpha_are_noticed(name: str) -> None:
    after, before = pair(name)
    wanted = by_hand(name, 7)
    assert tokens_of(run(before, requests_of(name, 7), 3, strategy=Amplify(after, alpha=RUN_ALPHA))) != wanted
    requests = requests_of(name, 7)
    rolled = [replace(r, alpha=alpha_of(other)) for r, other in zip(requests, requests[1:] + requests[:1], strict=True)]
    assert tokens_of(run(after, rolled, 3, strategy=Amplify(before, alpha=RUN_ALPHA))) != wanted


@contextmanager
def forgetful(lm: LanguageModel, first: int) -> Iterator[list[int]]:
    """A model that is shown blank prompts in every prefill but the `first` ones, as if its cache were not refilled."""
    widths: list[int] = []

    def blank(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids_BT = kwargs["input_ids"]
        if ids_BT.shape[1] > 1:
            widths.append(ids_BT.shape[1])
            if len(widths) > first:
                kwargs = kwargs | {"input_ids": torch.full_like(ids_BT, 5)}
        return args, kwargs

    handle = lm.model.register_forward_pre_hook(blank, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


@SOME
def test_a_cache_of_before_that_is_not_refilled_is_noticed(name: str) -> None:
    """With as many slots as requests there is one prefill and nothing to notice; with fewer there is."""
    (after, before), wanted = pair(name), by_hand(name, 9)
    strategy = Amplify(before, alpha=RUN_ALPHA)
    run(after, requests_of(name, 1), 1, strategy=strategy)  # what is proven once a model has prompts of its own
    with forgetful(before, first=1) as widths:
        assert tokens_of(run(after, requests_of(name, 9), 9, strategy=strategy)) == wanted
        assert len(widths) == 1
        widths.clear()
        assert tokens_of(run(after, requests_of(name, 9), 3, strategy=strategy)) != wanted
        assert len(widths) > 1


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused() -> None:
    other = wrap(tiny_model("gpt2", vocab_size=50), stop_ids=())
    with pytest.raises(ModelError, match="50") as caught:
        run(pair("llama")[0], requests_of("llama", 2), 2, strategy=Amplify(other))
    assert "97" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_only_before_cannot_hold_is_refused_by_name() -> None:
    short = wrap(tiny_model("gpt2", max_position_embeddings=16), stop_ids=())
    requests = [Request("long", tuple(range(3, 23)), 4), Request("short", (3, 4), 4)]
    with pytest.raises(TraitlineError, match="long") as caught:
        run(pair("llama")[0], requests, 2, strategy=Amplify(short))
    assert "16" in str(caught.value)
    assert "\n" not in str(caught.value)
