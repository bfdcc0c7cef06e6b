"""Speculative decoding: responses are the target's alone, greedy ones token by token, sampled ones in distribution.

The law of the distribution is tested over all short responses of a toy vocabulary, through the engine. Five wrong
ways to verify a proposal must each fail that test. References: tests/two_models.py.

Shapes: B rows, K proposed tokens, T = K + 1 positions, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from extraction.activations.pooled import PooledCapture
from extraction.core.errors import ConfigError, ModelError, TraitlineError
from extraction.engine import speculation
from extraction.engine.batch import ContinuousBatch
from extraction.engine.sampler import Sample, uniforms
from extraction.engine.sequence import BatchLimits
from extraction.engine.speculation import Proposal, Speculate, Verification, verify_proposal
from extraction.engine.steering import Steering
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import (
    FAMILIES,
    HIDDEN,
    deviation,
    pooled,
    prompts,
    reference_greedy,
    reference_hidden,
    shared_model,
    tiny_model,
    tiny_tokenizer,
    until_stop,
)
from tests.two_models import (
    ALL_LAYERS,
    POOLINGS,
    chi_square_p,
    contradicting,
    fed_at_random,
    noisy_model,
    outcome_chances,
    plain_settle,
    run,
    tokens_of,
    worst,
)

# transformers 5.4 warns of its own BioGPT
pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
# also ALiBi and windows that a model computes from columns: rejected proposals leave holes in those
EVERY = pytest.mark.parametrize("name", [*FAMILIES, "mpt", "gpt_neo", "llama4_chunked"])


def paired(names: Sequence[str], kinds: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrise over half of all pairs of a model and a kind of draft: each model with every other kind."""
    pairs = [(name, kind) for i, name in enumerate(names) for j, kind in enumerate(kinds) if (i + j) % 2 == 0]
    return pytest.mark.parametrize(("name", "kind"), pairs)


SOME_NAMES = ("llama", "gpt2", "bloom", "gemma2", "mixtral")
SOME = pytest.mark.parametrize("name", SOME_NAMES)


# --- verification: against one row at a time -------------------------------------------------------------------------


def verified_tokens(verdict: Verification) -> list[list[int]]:
    """Return each row's new tokens."""
    return [row[:count] for row, count in zip(verdict.token_BT.tolist(), verdict.count_B.tolist(), strict=True)]


def sixteenths(draw: Any, vocab: int) -> list[float]:
    """Draw a distribution in sixteenths, so that ratios tie exactly; zeros are common."""
    cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=vocab - 1, max_size=vocab - 1)))
    return [(b - a) / 16 for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]


@st.composite
def rounds(draw: Any) -> tuple[Tensor, Proposal, Tensor, Tensor]:
    """Draw arguments of `verify_proposal`. Acceptance may tie, which must reject; a draw never ties."""
    n_rows, depth, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    certain = draw(st.booleans())
    target = [[sixteenths(draw, vocab) for _ in range(depth + 1)] for _ in range(n_rows)]
    drafted = [[sixteenths(draw, vocab) for _ in range(depth)] for _ in range(n_rows)]
    tokens = [
        # a draft proposes only tokens that are possible under it
        [draw(st.sampled_from([t for t in range(vocab) if certain or q[t] > 0])) for q in drafted[b]]
        for b in range(n_rows)
    ]
    depths = [draw(st.integers(0, depth)) for _ in range(n_rows)]
    accept = [[draw(st.integers(0, 15)) / 16 for _ in range(depth)] for _ in range(n_rows)]
    draws = [[(2 * draw(st.integers(0, 511)) + 1) / 1024 for _ in range(depth + 1)] for _ in range(n_rows)]
    chances_BKV = None if certain else torch.tensor(drafted, dtype=torch.float64)
    proposal = Proposal(torch.tensor(tokens), torch.tensor(depths), chances_BKV)
    return (
        torch.tensor(target, dtype=torch.float64),
        proposal,
        torch.tensor(accept, dtype=torch.float64),
        torch.tensor(draws, dtype=torch.float64),
    )


def reference(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> list[list[int]]:
    """Verify every row by itself."""
    drafted = [None] * len(chances_BTV) if proposal.chances_BKV is None else proposal.chances_BKV.tolist()
    rows = zip(
        chances_BTV.tolist(),
        proposal.token_BK.tolist(),
        proposal.depth_B.tolist(),
        drafted,
        accept_BK.tolist(),
        draw_BT.tolist(),
        strict=True,
    )
    return [plain_settle(p, tokens[:depth], q, accept, draws) for p, tokens, depth, q, accept, draws in rows]


@given(rounds())
def test_verification_equals_one_row_at_a_time_and_changes_no_argument(
    arguments: tuple[Tensor, Proposal, Tensor, Tensor],
) -> None:
    chances_BTV, proposal, accept_BK, draw_BT = arguments
    tensors = [chances_BTV, proposal.token_BK, proposal.depth_B, accept_BK, draw_BT]
    tensors += [] if proposal.chances_BKV is None else [proposal.chances_BKV]
    before = [tensor.clone() for tensor in tensors]
    verdict = verify_proposal(*arguments)
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    assert verified_tokens(verdict) == reference(*arguments)
    assert verdict.token_BT.shape == draw_BT.shape


@given(rounds(), st.randoms(use_true_random=False))
def test_a_row_is_verified_the_same_among_other_rows(
    arguments: tuple[Tensor, Proposal, Tensor, Tensor], random: Any
) -> None:
    chances_BTV, proposal, accept_BK, draw_BT = arguments
    order = random.sample(range(len(chances_BTV)), len(chances_BTV))
    moved = Proposal(
        proposal.token_BK[order],
        proposal.depth_B[order],
        None if proposal.chances_BKV is None else proposal.chances_BKV[order],
    )
    expected = verified_tokens(verify_proposal(*arguments))
    moved_rows = verify_proposal(chances_BTV[order], moved, accept_BK[order], draw_BT[order])
    assert verified_tokens(moved_rows) == [expected[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_neither_accepted_nor_drawn(dtype: torch.dtype) -> None:
    """A uniform of 0 passes `u <= p/q` at p = 0, and falls on the first token of a distribution that starts with 0."""
    target_BTV = torch.tensor([[[0.0, 0.25, 0.75]] * 2], dtype=dtype)
    certain = Proposal(torch.tensor([[0]]), torch.tensor([1]), None)
    drafted = replace(certain, chances_BKV=torch.tensor([[[0.5, 0.5, 0.0]]], dtype=dtype))
    zeros_BK, zeros_BT = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    assert verified_tokens(verify_proposal(target_BTV, certain, zeros_BK, zeros_BT)) == [[1]]
    drawn = verified_tokens(verify_proposal(target_BTV, drafted, zeros_BK, zeros_BT))
    assert drawn == [[2]], "token 1 has no residual: 0.25 - 0.5 < 0"


def test_a_draft_that_is_the_target_is_always_accepted_and_a_bonus_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    target_BTV = torch.rand(64, 5, 7, generator=generator, dtype=torch.float64).softmax(-1)
    token_BK = torch.randint(7, (64, 4), generator=generator)
    proposal = Proposal(token_BK, torch.full((64,), 4), target_BTV[:, :4])
    accept_BK = torch.full((64, 4), 1 - 2.0**-53, dtype=torch.float64)
    draw_BT = torch.rand(64, 5, generator=generator, dtype=torch.float64)
    verdict = verify_proposal(target_BTV, proposal, accept_BK, draw_BT)
    assert verdict.count_B.tolist() == [5] * 64
    assert torch.equal(verdict.token_BT[:, :4], token_BK)


def test_one_hot_targets_are_verified_as_greedily() -> None:
    target_BTV = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0], [1, 2, 0], [1, 2, 0]]), 3).double()
    proposal = Proposal(torch.tensor([[1, 2], [1, 0], [0, 2]]), torch.tensor([2, 2, 2]), None)
    half_BT = torch.full((3, 3), 0.5, dtype=torch.float64)
    assert verified_tokens(verify_proposal(target_BTV, proposal, half_BT[:, :2], half_BT)) == [[1, 2, 0], [1, 2], [1]]


def test_values_past_a_rows_depth_have_no_effect() -> None:
    generator = torch.Generator().manual_seed(1)
    target_BTV = torch.rand(9, 5, 6, generator=generator, dtype=torch.float64).softmax(-1)
    drafted_BKV = torch.rand(9, 4, 6, generator=generator, dtype=torch.float64).softmax(-1)
    accept_BK = torch.rand(9, 4, generator=generator, dtype=torch.float64) / 2
    draw_BT = torch.rand(9, 5, generator=generator, dtype=torch.float64)
    token_BK = torch.randint(6, (9, 4), generator=generator)
    depth_B = torch.arange(9) % 5
    expected = verified_tokens(
        verify_proposal(target_BTV, Proposal(token_BK, depth_B, drafted_BKV), accept_BK, draw_BT)
    )
    past_BK = torch.arange(4) >= depth_B[:, None]
    target_BTV[:, 1:][past_BK] = 1 / 6
    drafted_BKV[past_BK] = 0.0
    proposal = Proposal(token_BK.masked_fill(past_BK, 0), depth_B, drafted_BKV)
    verdict = verify_proposal(target_BTV, proposal, accept_BK.masked_fill(past_BK, 0.0), draw_BT)
    assert verified_tokens(verdict) == expected
    assert {len(row) for row in expected} > {1, 2}


# --- the distribution, through the engine ----------------------------------------------------------------------------

TOYS = 4  # tokens of the toy vocabulary; the last one ends a response
N_TOKENS = 4
N_RESPONSES = 2500
TOY_PROMPTS = ((0, 1, 2, 1, 0, 1, 2, 1), (1, 1))  # one that repeats itself, so that look-ups find something
SAMPLES = {
    "plain": Sample(1.0),
    "cooler": Sample(0.7),
    "top_k": Sample(1.0, top_k=3),
    "top_p": Sample(1.2, top_p=0.8),
}


@cache
def toy(name: str = "llama", seed: int = 0, stops: tuple[int, ...] = (TOYS - 1,)) -> LanguageModel:
    """Build a random transformer of one layer and four tokens."""
    return wrap(tiny_model(name, seed=seed, vocab_size=TOYS, num_hidden_layers=1), stop_ids=stops)


@cache
def toy_chances(prompt: tuple[int, ...], sample: Sample) -> dict[Any, float]:
    """Return the probability of every response of the target alone."""
    return outcome_chances(toy(), prompt, N_TOKENS, sample)


def toy_requests(samples: Sequence[Sample | None], n: int = N_RESPONSES) -> list[Request]:
    """Make requests of the two prompts in turn, with these samples in turn."""
    return [
        Request(f"e{i}", TOY_PROMPTS[i % 2], N_TOKENS, seed=3, sample=samples[i // 2 % len(samples)]) for i in range(n)
    ]


def toy_p(strategy: Any, samples: Sequence[Sample | None] = (None,), n: int = N_RESPONSES) -> float:
    """Return the least p-value over prompts and samples, through the engine in batches of 512 slots."""
    requests = toy_requests(samples, n)
    done = run(toy(), requests, 512, strategy=strategy)
    counts: dict[Any, Counter[Any]] = {}
    for request in requests:
        outcome = done[request.id].token_ids, done[request.id].finish_reason
        counts.setdefault((request.token_ids, request.sample or strategy.sample), Counter())[outcome] += 1
    return min(chi_square_p(found, toy_chances(*key)) for key, found in counts.items())


@cache
def toy_draft() -> LanguageModel:
    """Build a draft of another architecture and other weights."""
    return toy("gpt2", seed=4)


DRAFTS: dict[str, Callable[[], LanguageModel | None]] = {"model": toy_draft, "lookup": lambda: None}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_responses_follow_the_target_alone(sample: str, draft: str) -> None:
    assert toy_p(Speculate(DRAFTS[draft](), SAMPLES[sample], depth=3)) > 1e-6


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 6, "adaptive": False}, {"ngram": 1, "adaptive": False}])
@pytest.mark.parametrize("draft", DRAFTS)
def test_no_option_changes_the_distribution(draft: str, options: dict[str, Any]) -> None:
    assert toy_p(Speculate(DRAFTS[draft](), Sample(1.0), **options)) > 1e-6


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_request_follows_its_own_temperature_top_k_and_top_p(draft: str) -> None:
    own = (Sample(1.0), Sample(0.5), Sample(1.3, top_k=2))
    assert toy_p(Speculate(DRAFTS[draft](), Sample(1.0), depth=3), own, 2 * N_RESPONSES) > 1e-6


def test_the_chi_square_test_detects_the_draft_and_another_temperature() -> None:
    """Negative controls besides verification: the draft's own responses, and a temperature that is near."""
    counts = Counter[Any]()
    requests = [replace(r, token_ids=TOY_PROMPTS[0]) for r in toy_requests((None,))]
    for completion in run(toy_draft(), requests, 512, strategy=Sample(1.0)).values():
        counts[completion.token_ids, completion.finish_reason] += 1
    assert chi_square_p(counts, toy_chances(TOY_PROMPTS[0], Sample(1.0))) < 1e-6
    counts.clear()
    for completion in run(toy(), requests, 512, strategy=Sample(1.0)).values():
        counts[completion.token_ids, completion.finish_reason] += 1
    assert chi_square_p(counts, toy_chances(TOY_PROMPTS[0], Sample(1.0))) > 1e-6
    assert chi_square_p(counts, toy_chances(TOY_PROMPTS[0], Sample(0.7))) < 1e-6


# --- five wrong ways to verify ---------------------------------------------------------------------------------------


def no_residual(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Draw from p after a rejection, not from what p has over q."""
    verdict = verify_proposal(chances_BTV, proposal, accept_BK, draw_BT)
    rows_B, last_B = torch.arange(len(draw_BT)), verdict.count_B - 1
    cdf_BV = chances_BTV[rows_B, last_B].double().cumsum(-1)
    drawn_B1 = torch.searchsorted(cdf_BV, draw_BT[rows_B, last_B].double().unsqueeze(1) * cdf_BV[:, -1:], right=True)
    token_BT = verdict.token_BT.clone()
    token_BT[rows_B, last_B] = drawn_B1[:, 0].clamp(max=cdf_BV.shape[1] - 1)
    return Verification(token_BT, verdict.count_B)


def greedy_acceptance(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Accept exactly the target's likeliest token."""
    favourite_BK = chances_BTV[:, :-1].argmax(-1) == proposal.token_BK
    certainly_BK = torch.where(favourite_BK, 0.0, 1 - 2.0**-20).to(accept_BK.dtype)
    sure_BTV = chances_BTV.clone()
    best_BKT = proposal.token_BK.unsqueeze(-1)
    sure_BTV[:, :-1].scatter_(2, best_BKT, torch.where(favourite_BK, 1.0, 0.0).to(sure_BTV.dtype).unsqueeze(-1))
    return verify_proposal(sure_BTV, proposal, certainly_BK, draw_BT)


def off_by_one(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Test every token against the target's probabilities at the next position."""
    return verify_proposal(chances_BTV[:, [*range(1, chances_BTV.shape[1]), -1]], proposal, accept_BK, draw_BT)


def least_of_the_batch(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Cut every row to the fewest tokens of the batch, and draw the last token anew."""
    verdict = verify_proposal(chances_BTV, proposal, accept_BK, draw_BT)
    least = int(verdict.count_B.min()) - 1
    cdf_BV = chances_BTV[:, least].double().cumsum(-1)
    drawn_B1 = torch.searchsorted(cdf_BV, draw_BT[:, least, None].double() * cdf_BV[:, -1:], right=True)
    longer_B = verdict.count_B - 1 > least
    token_BT = verdict.token_BT.clone()
    redrawn_B = drawn_B1[:, 0].clamp(max=cdf_BV.shape[1] - 1)
    token_BT[:, least] = torch.where(longer_B, redrawn_B, token_BT[:, least])
    return Verification(token_BT, torch.full_like(verdict.count_B, least + 1))


def swapped_rows(chances_BTV: Tensor, proposal: Proposal, accept_BK: Tensor, draw_BT: Tensor) -> Verification:
    """Verify each row with its neighbour's probabilities."""
    return verify_proposal(chances_BTV.roll(1, 0), proposal, accept_BK, draw_BT)


MUTANTS = (no_residual, greedy_acceptance, off_by_one, least_of_the_batch, swapped_rows)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_way_to_verify_is_caught(mutant: Any, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = Counter[str]()

    def planted(*arguments: Any) -> Verification:
        called["verify"] += 1
        return mutant(*arguments)

    monkeypatch.setattr(speculation, "verify_proposal", planted)
    # the fewest tokens of a large batch are none: cutting shows where rows are few
    n, slots = (3000, 32) if mutant is least_of_the_batch else (N_RESPONSES, 512)
    requests = toy_requests((None,), n)
    done = run(toy(), requests, slots, strategy=Speculate(DRAFTS[draft](), Sample(1.0), depth=3, adaptive=False))
    found = {prompt: Counter[Any]() for prompt in TOY_PROMPTS}
    for request in requests:
        found[request.token_ids][done[request.id].token_ids, done[request.id].finish_reason] += 1
    assert called["verify"] > 3, "the engine verifies elsewhere"
    assert min(chi_square_p(counts, toy_chances(prompt, Sample(1.0))) for prompt, counts in found.items()) < 1e-6


def test_random_numbers_that_are_used_twice_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals, acceptance tests and draws need independent random streams."""
    monkeypatch.setattr("extraction.engine.row_state.uniforms", lambda key, seed, n, _stream="": uniforms(key, seed, n))
    assert toy_p(Speculate(toy_draft(), Sample(1.0), depth=3)) < 1e-6


# --- greedy speculation is greedy ------------------------------------------------------------------------------------


def everywhere(position_BT: Tensor) -> Tensor:
    return torch.ones_like(position_BT, dtype=torch.bool)


def now_and_then(position_BT: Tensor) -> Tensor:
    return position_BT % 3 == 0


@contextmanager
def drafts(name: str, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Iterator[LanguageModel | None]:
    """Build a draft that is never, sometimes, often or always right, of another architecture, or none (look-up)."""
    if kind == "lookup":
        yield None
    elif kind == "stranger":
        yield wrap(tiny_model("gpt2" if name != "gpt2" else "llama", seed=8), stop_ids=())
    elif kind == "noisy":
        yield wrap(noisy_model(name, dtype=dtype, **changes), stop_ids=())
    else:
        lm = wrap(tiny_model(name, dtype=dtype, **changes), stop_ids=())
        wrong = {"never": everywhere, "patchy": now_and_then}.get(kind)
        with contradicting(lm.model, wrong) if wrong else nullcontext():
            yield lm


KINDS = ("never", "patchy", "noisy", "always", "stranger", "lookup")
BUDGETS = (11, 1, 2, 13, 6, 3, 9)


@cache
def requests_of(name: str, n: int, seed: int = 0) -> tuple[Request, ...]:
    """Make requests of dissimilar prompts with budgets of 1 to 13 tokens."""
    return tuple(Request(f"e{i}", prompt, BUDGETS[i % len(BUDGETS)]) for i, prompt in enumerate(prompts(n, seed=seed)))


@cache
def answers(name: str, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, tuple[int, ...]]:
    """Return transformers' response to each request alone, to its whole budget."""
    model = shared_model(name, dtype)
    return {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests_of(name, n, seed)}


@EVERY
def test_greedy_tokens_and_activations_equal_those_of_the_model_alone(name: str) -> None:
    requests, wanted = requests_of(name, 5), answers(name, 5)
    lm = wrap(shared_model(name), stop_ids=())
    for kind, batch_size in (("patchy", 3), ("noisy", 2), ("lookup", 5)):
        with drafts(name, kind) as draft:
            capture = Capture(ALL_LAYERS, poolings=POOLINGS) if kind == "patchy" else None
            strategy = Speculate(draft, depth=3, adaptive=kind == "noisy", ngram=2)
            done = run(lm, requests, batch_size, strategy=strategy, capture=capture)
        assert tokens_of(done) == wanted, kind
        assert {c.finish_reason for c in done.values()} == {"length"}
        if capture is not None:
            assert all(len(c.activations) == len(POOLINGS) for c in done.values())
            assert worst(name, requests, done, torch.float32) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_attending_to_rejected_columns_or_committing_their_activations_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: rejected columns stay in the mask; activations of rejected tokens are committed."""
    requests, wanted = requests_of(name, 5), answers(name, 5)
    lm, capture = wrap(shared_model(name), stop_ids=()), Capture(ALL_LAYERS)

    def fill(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not kwargs["use_cache"]:  # the engine's check for models that need contiguous keys
            return args, kwargs
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].cummax(1).values}

    with drafts(name, "patchy") as draft:
        strategy = Speculate(draft, adaptive=False)
        handle = lm.model.register_forward_pre_hook(fill, with_kwargs=True)
        try:
            holes_seen = tokens_of(run(lm, requests, 3, strategy=strategy))
        finally:
            handle.remove()
        commit = PooledCapture.commit_tokens
        monkeypatch.setattr(
            PooledCapture,
            "commit_tokens",
            lambda self, age_B, read: commit(self, age_B, read and [max(read)] * len(read)),
        )
        done = run(lm, requests, 3, strategy=strategy, capture=capture)
    assert holes_seen != wanted
    assert tokens_of(done) == wanted
    assert worst(name, requests, done, torch.float32) > 1e-2


@paired(SOME_NAMES, KINDS)
def test_greedy_tokens_do_not_depend_on_the_draft(name: str, kind: str) -> None:
    """Every model and every kind of draft runs in each of the four batch sizes, if not in every pair."""
    requests, wanted = requests_of(name, 9), answers(name, 9)
    lm = wrap(shared_model(name), stop_ids=())
    settings = ((1, 4, None), (5, 7, None), (2, 1, Capture((0, 2))), (9, 4, Capture((1,))))
    half = (SOME_NAMES.index(name) + KINDS.index(kind)) // 2 % 2
    with drafts(name, kind) as draft:
        for batch_size, depth, capture in settings[half::2]:
            done = run(lm, requests, batch_size, strategy=Speculate(draft, depth=depth), capture=capture)
            assert tokens_of(done) == wanted, (batch_size, depth)


@pytest.mark.parametrize(("first", "name"), [(1, "llama"), (2, "gpt2"), (3, "mistral")])
def test_greedy_tokens_do_not_depend_on_batches_of_1_to_17(first: int, name: str) -> None:
    """Each batch size runs with one of the models."""
    requests, wanted = requests_of(name, 19, seed=4), answers(name, 19, seed=4)
    lm = wrap(shared_model(name), stop_ids=())
    with drafts(name, "patchy") as draft:
        for batch_size in range(first, 18, 3):
            assert tokens_of(run(lm, requests, batch_size, strategy=Speculate(draft))) == wanted, batch_size


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_alibi", "qwen3"])
def test_in_float64_speculation_holds_to_rounding(name: str) -> None:
    requests, wanted = requests_of(name, 6), answers(name, 6, dtype=torch.float64)
    lm = wrap(shared_model(name, torch.float64), stop_ids=())
    capture = Capture(ALL_LAYERS, poolings=POOLINGS)
    for kind in ("noisy", "patchy"):
        with drafts(name, kind, torch.float64) as draft:
            done = run(lm, requests, 4, strategy=Speculate(draft), capture=capture)
        assert tokens_of(done) == wanted
        assert worst(name, requests, done, torch.float64) < 1e-10


@paired(("mistral", "gemma2", "gpt_neo", "starcoder2", "olmo3"), ("never", "patchy", "noisy"))
def test_windows_shorter_than_the_prompts_count_the_same_columns(name: str, kind: str) -> None:
    """Rejected columns must not count in a sliding window: long prompts and responses, uneven acceptance."""
    requests = [Request(f"w{i}", prompt, 20) for i, prompt in enumerate(prompts(4, seed=6, longest=40))]
    model = shared_model(name)
    wanted = {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}
    with drafts(name, kind) as draft:
        strategy = Speculate(draft, depth=5, adaptive=False)
        done = run(wrap(model, stop_ids=()), requests, 3, strategy=strategy, capture=Capture((2,)))
    assert tokens_of(done) == wanted
    assert worst_of(model, requests, done, (2,)) < 1e-5


def worst_of(model: Any, requests: Sequence[Request], done: dict[str, Completion], layers: tuple[int, ...]) -> float:
    """Return the largest deviation of the response means at some layers."""
    deviations = []
    for r in requests:
        hidden_LTD = reference_hidden(model, r.token_ids + done[r.id].token_ids)
        mean_LD = pooled(hidden_LTD, len(r.token_ids), "response_mean")[list(layers)]
        deviations.append(deviation(done[r.id].activations["residual.response_mean"], mean_LD))
    return max(deviations)


@SOME
def test_many_requests_roll_the_window_again_and_again(name: str) -> None:
    model = shared_model(name)
    requests = [Request(f"r{i}", prompt, 3 + 5 * (i % 5)) for i, prompt in enumerate(prompts(14, seed=4))]
    wanted = {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}
    lm = wrap(model, stop_ids=())
    with drafts(name, "patchy") as draft:
        for batch_size, seen in ((2, None), (7, Capture((1,)))):
            done = run(lm, requests, batch_size, strategy=Speculate(draft), capture=seen)
            assert tokens_of(done) == wanted
    assert worst_of(model, requests, done, (1,)) < 1e-5


@paired(SOME_NAMES, ("never", "patchy", "always", "lookup"))
def test_no_draft_reaches_beyond_the_models_last_position(name: str, kind: str) -> None:
    """Prompt and budget fill the context to its last position, beside rows that end early and one that starts late."""
    positions = {"max_position_embeddings": 64}
    model = tiny_model(name, **positions)
    lengths = ((36, 28), (56, 8), (2, 62), (63, 1), (5, 3), (30, 34))
    requests = [
        Request(f"r{i}", tuple(3 + (7 * i + 5 * t) % 90 for t in range(length)), n)
        for i, (length, n) in enumerate(lengths)
    ]
    assert max(len(r.token_ids) + r.max_new_tokens for r in requests) == 64
    with drafts(name, kind, **positions) as draft:
        done = run(wrap(model, stop_ids=()), requests, 4, strategy=Speculate(draft, depth=6), capture=Capture((0,)))
    for r in requests:
        assert done[r.id].token_ids == reference_greedy(model, r.token_ids, r.max_new_tokens)


def test_a_draft_with_too_few_positions_is_refused() -> None:
    model, short = shared_model("llama"), wrap(tiny_model("gpt2", max_position_embeddings=32), stop_ids=())
    requests = [Request(f"e{i}", prompt, 30) for i, prompt in enumerate(prompts(3))]
    with pytest.raises(TraitlineError, match="32") as caught:
        run(wrap(model, stop_ids=()), requests, 2, strategy=Speculate(short))
    assert "\n" not in str(caught.value)


# --- how responses end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_inside_an_accepted_draft_ends_the_response_there(kind: str) -> None:
    model, rows = shared_model("llama"), prompts(6, seed=2)
    unstopped = [reference_greedy(model, row, 12) for row in rows]
    stops = (unstopped[0][0], unstopped[1][3], unstopped[2][11])  # at once, in the middle, as the very last token
    requests = [Request(f"e{i}", row, 12) for i, row in enumerate(rows)]
    requests.append(Request("cut", rows[1], 3))  # its budget ends just before the stop token
    requests += [Request(f"on{i}", row, 12, ignore_eos=True) for i, row in enumerate(rows[:3])]
    capture = Capture(ALL_LAYERS, poolings=POOLINGS)
    with drafts("llama", kind) as draft:
        done = run(wrap(model, stop_ids=stops), requests, 3, strategy=Speculate(draft, depth=5), capture=capture)
    assert (done["cut"].token_ids, done["cut"].finish_reason) == (unstopped[1][:3], "length")
    for i, response in enumerate(unstopped):
        kept = until_stop(response, stops)
        assert done[f"e{i}"].token_ids == kept
        assert done[f"e{i}"].finish_reason == ("stop" if len(kept) < 12 else "length")
    assert (done["e0"].token_ids, done["e0"].activations) == ((), {})
    assert [done[f"on{i}"].token_ids for i in range(3)] == unstopped[:3]
    assert worst("llama", requests, done, torch.float32) < 1e-5


@pytest.mark.parametrize(("kind", "own"), [(kind, i % 2 == 0) for i, kind in enumerate(KINDS)] + [("patchy", True)])
def test_stop_strings_end_a_response_at_the_token_that_completes_them(kind: str, own: bool) -> None:
    """`own`: the requests have the stop string, not the run."""
    model, tokenizer = shared_model("llama"), tiny_tokenizer()
    rows = prompts(6, seed=5)
    unstopped = [reference_greedy(model, row, 12) for row in rows]
    stop = tokenizer.decode(list(unstopped[0][4:6]))
    lm = wrap(model, tokenizer, stop_ids=())
    requests = [Request(f"e{i}", r, 12, stop_strings=(stop,) if own else ()) for i, r in enumerate(rows)]
    with drafts("llama", kind) as draft:
        options: dict[str, Any] = {"strategy": Speculate(draft, depth=5), "capture": Capture(ALL_LAYERS)}
        done = run(lm, requests, 2, stop_strings=() if own else (stop,), **options)
    for i, response in enumerate(unstopped):
        ends = [n for n in range(1, 13) if stop in tokenizer.decode(list(response[:n]))]
        assert done[f"e{i}"].token_ids == response[: ends[0] if ends else 12]
        assert done[f"e{i}"].finish_reason == ("stop_string" if ends else "length")
    assert done["e0"].finish_reason == "stop_string"
    assert worst("llama", requests, done, torch.float32) < 1e-5


@pytest.mark.parametrize("kind", ["always", "lookup", "never"])
def test_responses_of_one_and_two_tokens_have_their_length(kind: str) -> None:
    model = shared_model("gpt2")
    requests = [Request(f"e{i}", prompt, 1 + i % 2) for i, prompt in enumerate(prompts(9))]
    with drafts("gpt2", kind) as draft:
        for capture in (None, Capture((1,), poolings=POOLINGS)):
            done = run(wrap(model, stop_ids=()), requests, 4, strategy=Speculate(draft, depth=5), capture=capture)
            assert tokens_of(done) == {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}


def test_progress_counts_every_token_once() -> None:
    counts: list[int] = []
    with drafts("llama", "patchy") as draft:
        lm = wrap(shared_model("llama"), stop_ids=())
        done = run(lm, requests_of("llama", 9), 3, strategy=Speculate(draft), on_progress=counts.append)
    assert sum(counts) == sum(len(c.token_ids) for c in done.values())


# --- a row's tokens do not depend on other rows ----------------------------------------------------------------------


@SOME
@pytest.mark.parametrize("kind", ["noisy", "lookup"])
def test_sampled_tokens_do_not_depend_on_neighbours_order_batch_or_capture(name: str, kind: str) -> None:
    own = (None, Sample(0.7, top_p=0.9), Sample(0.0), Sample(1.2, top_k=9))
    requests = [
        replace(r, seed=11, sample=own[i % 4], max_new_tokens=8) for i, r in enumerate(requests_of(name, 9, seed=1))
    ]
    lm = wrap(shared_model(name), stop_ids=())
    with drafts(name, kind) as draft:
        strategy = Speculate(draft, Sample(0.9), ngram=2)
        wanted = {r.id: run(lm, [r], 1, strategy=strategy)[r.id].token_ids for r in requests}
        for batch_size, order in ((3, requests[::-1]), (7, requests[4:] + requests[:4])):
            assert tokens_of(run(lm, order, batch_size, strategy=strategy)) == wanted, batch_size
        done = run(lm, requests, 4, strategy=strategy, capture=Capture(ALL_LAYERS, poolings=POOLINGS))
    assert tokens_of(done) == wanted
    assert len(set(wanted.values())) == len(wanted)
    assert worst(name, requests, done, torch.float32) < 1e-5


def test_a_rows_depth_and_acceptance_do_not_depend_on_other_rows() -> None:
    """Depth adapts by the row's own history: a neighbour whose drafts fail does not change it."""
    requests = [replace(r, seed=2, max_new_tokens=12) for r in requests_of("llama", 8)]
    lm = wrap(shared_model("llama"), stop_ids=())
    with drafts("llama", "noisy") as draft:
        strategy = Speculate(draft, Sample(0.8))
        alone = {r.id: run(lm, [r], 1, strategy=strategy)[r.id] for r in requests}
        done = run(lm, requests, 5, strategy=strategy)
    assert {key: c.speculation for key, c in done.items()} == {key: c.speculation for key, c in alone.items()}


def test_another_seed_or_id_gives_other_tokens() -> None:
    prompt = prompts(1)[0]
    requests = [Request(key, prompt, 12, seed) for key, seed in (("a", 0), ("b", 0), ("c", 1))]
    lm = wrap(shared_model("llama"), stop_ids=())
    with drafts("llama", "noisy") as draft:
        strategy = Speculate(draft, Sample(1.0))
        first = tokens_of(run(lm, requests, 2, strategy=strategy))
        again = tokens_of(run(lm, requests, 2, strategy=strategy))
        named = run(lm, [replace(requests[1], id="z", draws="a")], 1, strategy=strategy)
    assert first == again
    assert len(set(first.values())) == 3
    assert named["z"].token_ids == first["a"]


def test_steered_rows_are_steered_while_they_are_speculated() -> None:
    generator = torch.Generator().manual_seed(0)
    steerings = [None, *(Steering(add={1: scale * torch.randn(HIDDEN, generator=generator)}) for scale in (4.0, 20.0))]
    requests = [
        replace(r, steering=steerings[i % 3], max_new_tokens=10) for i, r in enumerate(requests_of("llama", 9, seed=1))
    ]
    lm = wrap(shared_model("llama"), stop_ids=())
    capture = Capture(ALL_LAYERS)
    wanted = run(lm, requests, 4, capture=capture)
    bare = run(lm, [replace(r, steering=None) for r in requests], 4)
    assert tokens_of(wanted) != tokens_of(bare)
    for kind in ("patchy", "lookup"):
        with drafts("llama", kind) as draft:
            done = run(lm, requests, 4, strategy=Speculate(draft), capture=capture)
        assert tokens_of(done) == tokens_of(wanted)
        pairs = [(done[key].activations, each.activations) for key, each in wanted.items()]
        assert max(deviation(a["residual.response_mean"], b["residual.response_mean"]) for a, b in pairs) < 1e-5


# --- requests that come and go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "mistral"])
def test_requests_added_and_cancelled_at_any_step_change_no_other_row(name: str) -> None:
    """Requests also arrive that are longer than those that run."""
    lm, strategy, requests = mixed_requests(name)
    alone = {r.id: run(lm, [r], 1, strategy=strategy)[r.id].token_ids for r in requests}
    n_dropped = 0
    for seed in range(6):
        rng = random.Random(seed)
        batch = ContinuousBatch(lm, BatchLimits(slots=rng.randint(1, 5), longest=40, budget=13), strategy=strategy)
        done, dropped = fed_at_random(batch, rng.sample(requests, len(requests)), rng)
        assert set(done) == {r.id for r in requests} - dropped, seed
        assert done == {key: alone[key] for key in done}, seed
        n_dropped += len(dropped)
    assert n_dropped > 2


@cache
def mixed_requests(name: str) -> tuple[LanguageModel, Speculate, list[Request]]:
    """Return a model, a draft that is often right, and requests of which every other one is sampled."""
    own = (None, Sample(0.8))
    requests = [replace(r, seed=5, sample=own[i % 2]) for i, r in enumerate(requests_of(name, 9, seed=2))]
    return wrap(shared_model(name), stop_ids=()), Speculate(wrap(noisy_model(name), stop_ids=())), requests


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_draft_that_is_the_target_is_always_right() -> None:
    requests = [replace(r, max_new_tokens=20) for r in requests_of("llama", 5)]
    lm = wrap(shared_model("llama"), stop_ids=())
    done = run(lm, requests, 3, strategy=Speculate(lm, depth=4, adaptive=False))
    for completion in done.values():
        figures = completion.speculation
        assert figures is not None
        assert figures.acceptance_rate == 1.0
        assert figures.proposed == figures.accepted > 0
        assert 4 <= figures.target_steps <= 5  # 20 tokens in steps of 5, whether or not the first counts by itself
        assert 4.0 <= figures.tokens_per_step <= 5.0


def test_a_draft_that_is_never_right_costs_steps_alone() -> None:
    requests = [replace(r, max_new_tokens=20) for r in requests_of("llama", 5)]
    lm = wrap(shared_model("llama"), stop_ids=())
    with drafts("llama", "never") as draft:
        done = {key: run(lm, requests, 3, strategy=Speculate(draft, adaptive=key)) for key in (True, False)}
    for completions in done.values():
        for completion in completions.values():
            figures = completion.speculation
            assert figures is not None
            assert (figures.accepted, figures.acceptance_rate) == (0, 0.0)
            assert 19 <= figures.target_steps <= 20
            assert figures.tokens_per_step == pytest.approx(1.0, abs=0.06)
    proposed = {key: sum(c.speculation.proposed for c in each.values() if c.speculation) for key, each in done.items()}
    assert proposed[True] < proposed[False], "a draft that fails must propose less"


def test_accepted_tokens_and_steps_account_for_every_token() -> None:
    requests = [replace(r, max_new_tokens=20) for r in requests_of("llama", 9)]
    lm = wrap(shared_model("llama"), stop_ids=())
    for kind in KINDS:
        with drafts("llama", kind) as draft:
            for completion in run(lm, requests, 4, strategy=Speculate(draft)).values():
                figures, length = completion.speculation, len(completion.token_ids)
                assert figures is not None
                assert 0 <= figures.accepted <= figures.proposed <= 4 * figures.target_steps
                assert length - 1 <= figures.accepted + figures.target_steps <= length + 1, kind


def test_repeated_text_is_generated_faster_without_a_draft() -> None:
    """With blocks of tiny weights and a tied head, a model repeats a short cycle of tokens."""
    model = tiny_model("llama")
    for parameter in model.model.layers.parameters():
        parameter.data.mul_(0.05)
    lm = wrap(model, stop_ids=())
    requests = [Request(f"e{i}", prompt, 40) for i, prompt in enumerate(prompts(5, seed=9))]
    done = run(lm, requests, 4, strategy=Speculate(None, depth=4, ngram=3))
    for request in requests:
        figures = done[request.id].speculation
        assert done[request.id].token_ids == reference_greedy(model, request.token_ids, 40)
        assert len(set(done[request.id].token_ids)) <= 20
        assert figures is not None
        assert figures.tokens_per_step > 2


def test_plain_decoding_reports_no_speculation() -> None:
    done = run(wrap(shared_model("llama"), stop_ids=()), requests_of("llama", 2), 2)
    assert {c.speculation for c in done.values()} == {None}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused() -> None:
    other = wrap(tiny_model("gpt2", vocab_size=50), stop_ids=())
    with pytest.raises(ModelError, match="50") as caught:
        run(wrap(shared_model("llama")), requests_of("llama", 2), 2, strategy=Speculate(other))
    assert "97" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": -1}, {"ngram": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        Speculate(**options)
    assert str(*options.values()) in str(caught.value)
    assert "\n" not in str(caught.value)
