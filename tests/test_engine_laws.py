"""The engine's laws, each with a negative control. Models and references are in tests/tiny.py.

Every case has more requests than slots, budgets of 1 to 20 tokens and stop tokens that do occur, so that slots are
refilled, the window rolls and the batch shrinks; the law of tokens and activations asserts that they do.

Shapes: L layers, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.core.errors import ModelError, PromptError, TraitlineError
from extraction.engine.generate import generate, teacher_force
from extraction.engine.sampler import Sample, uniforms
from extraction.model import onednn_linear
from extraction.model.kv_cache import SlotCache
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import (
    ARCHITECTURES,
    EVERY_ARCHITECTURE,
    FAMILIES,
    LAYERS,
    QUICK,
    REFUSED,
    blocks,
    deviation,
    pooled,
    prompts,
    reference_greedy,
    reference_hidden,
    reference_site,
    refused_model,
    shared_model,
    taps,
    tiny_model,
    tiny_tokenizer,
    until_stop,
)

# transformers 5.4 warns of its own BioGPT
pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
ALL_LAYERS = tuple(range(LAYERS))
POOLINGS = ("response_mean", "prompt_mean", "prompt_last", "response_first:2", "response_last", "all")
BUDGETS = (10, 13, 1, 6, 13, 3, 8, 5, 13)
EVERY = pytest.mark.parametrize(
    "name",
    [
        name if name in ARCHITECTURES or name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in EVERY_ARCHITECTURE
    ],
)
SOME = pytest.mark.parametrize("name", FAMILIES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Gated delta nets, lightning attention and Zaya sum in chunks. Nemotron-H and Zamba2 clamp time steps in a scan only,
# as their load says.
CHUNKED = (
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_vl"),
    *("kimi_linear", "bailing_hybrid", "olmo_hybrid", "minimax", "zaya"),
)
COARSER = dict.fromkeys(CHUNKED, 1e-4) | {"nemotron_h": 0.03, "zamba2": 0.1}
# Others compute attention in float32 whatever the weights are (GPT-J), or mask with what float32 can't hold (Bloom).
IN_FLOAT64 = ("llama", "mistral", "gemma3", "qwen3", "olmo2", "gpt2", "opt", "gpt_neox", "falcon_alibi")


@contextmanager
def onednn_for_any_size() -> Iterator[None]:
    """Use oneDNN for the linear layers of tiny models too, where it is used at all; it takes five times as long."""
    small, onednn_linear.MIN_MULTIPLICATIONS = onednn_linear.MIN_MULTIPLICATIONS, 0
    try:
        yield
    finally:
        onednn_linear.MIN_MULTIPLICATIONS = small


@dataclass(frozen=True)
class Case:
    """Requests of one architecture, and transformers' response to each, to its whole budget.

    `lm` has two stop tokens that occur in the responses; `endless` is the same model without any. An id may have a
    smaller budget (`e3/4`): its response is the beginning of the full one.
    """

    lm: LanguageModel
    endless: LanguageModel
    requests: tuple[Request, ...]
    responses: dict[str, tuple[int, ...]]
    hidden_LTD: dict[str, Tensor]

    def expected(
        self, completions: dict[str, Completion], lm: LanguageModel | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the tokens that these completions should have."""
        parts = {key: key.partition("/") for key in completions}
        whole = {key: self.responses[name][: int(n) if n else None] for key, (name, _, n) in parts.items()}
        return {key: until_stop(response, (lm or self.lm).stop_ids) for key, response in whole.items()}

    def pooled(self, completion: Completion, pooling: str) -> Tensor:
        """Pool the reference's activations of one completion."""
        name = completion.id.partition("/")[0]
        n_prompt = len(next(r.token_ids for r in self.requests if r.id == name))
        return pooled(self.hidden_LTD[name][:, : n_prompt + len(completion.token_ids)], n_prompt, pooling)

    def orders(self) -> list[tuple[int, LanguageModel, list[Request]]]:
        """Return batch sizes, models and requests.

        Alone; many in a few slots, so that the window rolls; shuffled; reversed.
        """
        cuts = {(r, min(n, r.max_new_tokens)) for r in self.requests for n in (r.max_new_tokens, 11, 9, 7)}
        many = [replace(r, id=f"{r.id}/{n}", max_new_tokens=n) for r, n in sorted(cuts, key=str)]
        shuffled = random.Random(1).sample(self.requests, len(self.requests))
        return [
            (1, self.lm, list(self.requests)),
            (3, self.endless, many),
            (4, self.lm, shuffled),
            (5, self.lm, list(self.requests[::-1])),
        ]


@cache
def case_of(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Build nine requests and two stop tokens that occur in mid-response."""
    model = shared_model(name, dtype)
    requests = tuple(
        Request(f"e{i}", prompt, n) for i, (prompt, n) in enumerate(zip(prompts(len(BUDGETS)), BUDGETS, strict=True))
    )
    responses = {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}
    hidden = {r.id: reference_hidden(model, r.token_ids + responses[r.id]) for r in requests}
    stops = _two_stops(list(responses.values()))
    return Case(wrap(model, stop_ids=stops), wrap(model, stop_ids=()), requests, responses, hidden)


def _two_stops(responses: Sequence[tuple[int, ...]]) -> frozenset[int]:
    """Return the two tokens that end most responses late, and few at once."""
    gain: Counter[int] = Counter()
    for response in responses:
        for token in set(response):
            gain[token] += 1 if response.index(token) >= 2 else -2
    return frozenset(token for token, _ in gain.most_common(2))


def run(
    lm: LanguageModel, requests: Sequence[Request], batch_size: int, capture: Capture | None = None, **options: Any
) -> dict[str, Completion]:
    """Run all requests; return their completions by id."""
    done = list(generate(lm, requests, batch_size=batch_size, capture=capture, **options))
    assert sorted(c.id for c in done) == sorted(r.id for r in requests)
    return {c.id: c for c in done}


def tokens_of(completions: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    """Return the tokens by id."""
    return {key: completion.token_ids for key, completion in completions.items()}


def worst(case: Case, completions: dict[str, Completion], *, shift: int = 0) -> float:
    """Return the largest deviation from the reference; `shift` misnumbers the layers on purpose."""
    return max(
        deviation(kept.roll(shift, -2), case.pooled(completion, name.removeprefix("residual.")))
        for completion in completions.values()
        for name, kept in completion.activations.items()
    )


def tolerance(name: str) -> float:
    """Return how far an architecture's activations may be from transformers' own pass, in float32."""
    return COARSER.get(name, TOLERANCE[torch.float32])


# --- laws 1 and 2: alone == in any batch == model.generate, captured == transformers' hidden states -------------------


@EVERY
def test_tokens_and_activations_equal_transformers_in_any_batch_and_order(name: str) -> None:
    """Also: the window rolls, the batch shrinks, and prompts are prefilled beside running rows."""
    case, late = case_of(name), 0
    with counted_repacks() as repacks:
        for batch_size, lm, requests in case.orders():
            with onednn_for_any_size() if batch_size > 3 else nullcontext(), pass_widths(lm) as widths:
                done = run(lm, requests, batch_size, Capture(ALL_LAYERS))
            assert tokens_of(done) == case.expected(done, lm), f"batch size {batch_size}"
            assert worst(case, done) < tolerance(name), f"batch size {batch_size}"
            late += sum(width > 1 for width in widths[3:])
    assert late > 0, "no prefill after the first steps"
    assert set(repacks) == {"roll", "shrink"}


@contextmanager
def counted_repacks() -> Iterator[Counter[str]]:
    """Count how often a cache moves its columns (`roll`) and selects rows (`shrink`)."""
    counts: Counter[str] = Counter()
    repack = SlotCache.select_rows

    def counting(self: SlotCache, rows: Tensor | None, *args: Any) -> None:
        counts["roll" if rows is None else "shrink"] += 1
        repack(self, rows, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotCache, "select_rows", counting)
        yield counts


@contextmanager
def pass_widths(lm: LanguageModel) -> Iterator[list[int]]:
    """Collect the number of columns of every forward pass."""
    widths: list[int] = []

    def note(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        widths.append((kwargs.get("input_ids") if "input_ids" in kwargs else args[0]).shape[1])

    handle = lm.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


@EVERY
def test_every_pooling_equals_the_pooled_hidden_states(name: str) -> None:
    case = case_of(name)
    with onednn_for_any_size():
        done = run(case.lm, case.requests, 4, Capture(ALL_LAYERS, poolings=POOLINGS))
    assert tokens_of(done) == case.expected(done)
    for completion in done.values():
        wanted = {f"residual.{pooling}" for pooling in POOLINGS} if completion.token_ids else set()
        assert set(completion.activations) == wanted
    assert worst(case, done) < tolerance(name)


@EVERY
def test_teacher_forced_equals_the_hidden_states(name: str) -> None:
    case = case_of(name)
    sequences = [(r.id, r.token_ids, case.responses[r.id]) for r in case.requests]
    capture = Capture(ALL_LAYERS, poolings=POOLINGS)
    for batch_size in (1, 4):
        with onednn_for_any_size():
            done = {c.id: c for c in teacher_force(case.lm, sequences, capture=capture, batch_size=batch_size)}
        assert tokens_of(done) == case.responses
        assert all(set(c.activations) == {f"residual.{pooling}" for pooling in POOLINGS} for c in done.values())
        assert worst(case, done) < tolerance(name)


@SOME
def test_capturing_changes_no_token(name: str) -> None:
    case = case_of(name)
    batch_size, lm, requests = case.orders()[2]
    done = run(lm, requests, batch_size)
    assert tokens_of(done) == case.expected(done, lm)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_in_float64_the_laws_hold_to_rounding(name: str) -> None:
    case = case_of(name, torch.float64)
    for batch_size in (1, 4):
        done = run(case.lm, case.requests, batch_size, Capture(ALL_LAYERS, poolings=POOLINGS))
        assert tokens_of(done) == case.expected(done)
        assert worst(case, done) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mpt", "gemma2", "gpt_oss", "mixtral"])
def test_in_half_precision_padding_makes_no_nan_and_means_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Attention over padding alone may be NaN; a sum kept in half precision would stop growing."""
    lm = wrap(shared_model(name, dtype), stop_ids=())
    requests = [Request(f"e{i}", prompt, 30) for i, prompt in enumerate(prompts(4))]
    for completion in run(lm, requests, 3, Capture(ALL_LAYERS, poolings=POOLINGS)).values():
        assert len(completion.token_ids) == 30
        kept = completion.activations
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
        assert deviation(kept["residual.response_mean"], kept["residual.all"].double().mean(0)) < 1e-6


@SOME
def test_a_subset_of_layers_keeps_its_numbers(name: str) -> None:
    case = case_of(name)
    for layers in ((1,), (0, 2), (2,)):
        done = run(case.lm, case.requests, 3, Capture(layers))
        assert tokens_of(done) == case.expected(done)
        for completion in done.values():
            for kept in completion.activations.values():
                wanted = case.pooled(completion, "response_mean")[list(layers)]
                assert deviation(kept, wanted) < TOLERANCE[torch.float32]


@SOME
def test_the_references_agree_with_each_other_and_can_fail(name: str) -> None:
    """Hidden states are the blocks' outputs; examples, layers and tokens are far enough apart for a mix-up to show."""
    case = case_of(name)
    ids = case.requests[0].token_ids
    with taps(blocks(case.lm.model)) as seen, torch.no_grad():
        case.lm.model(torch.tensor([list(ids)]))
    hidden_LTD = reference_hidden(case.lm.model, ids)
    assert deviation(torch.stack([h.reshape(len(ids), -1) for h in seen]), hidden_LTD) < 1e-5
    responses = [r for r in case.responses.values() if len(r) > 1]
    assert len(set(responses)) >= 5, "too many equal responses to catch a mix-up"
    assert len({token for response in responses for token in response}) >= 4
    completions = [Completion(key, response, "stop") for key, response in case.responses.items() if len(response) > 1]
    means = [case.pooled(completion, "response_mean") for completion in completions]
    assert min(deviation(a, b) for i, a in enumerate(means) for b in means[:i]) > 1e-2
    assert min(deviation(mean.roll(1, 0), mean) for mean in means) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_many_requests_roll_the_window_again_and_again(name: str) -> None:
    model = shared_model(name)
    requests = [Request(f"r{i}", prompt, 3 + 5 * (i % 5)) for i, prompt in enumerate(prompts(14, seed=4))]
    wanted = {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}
    lm = wrap(model, stop_ids=())
    for batch_size in (2, 7):
        done = run(lm, requests, batch_size, Capture((1,)))
        assert tokens_of(done) == wanted
        assert {c.finish_reason for c in done.values()} == {"length"}


@SOME
def test_idle_rows_never_pass_the_models_positions(name: str) -> None:
    """A short response to a long prompt leaves its slot idle beside long ones, up to the model's last position."""
    model = tiny_model(name, max_position_embeddings=48)
    lengths = ((36, 4), (2, 46), (3, 45), (4, 44))
    requests = [
        Request(f"r{i}", tuple(3 + (7 * i + 5 * t) % 90 for t in range(length)), n)
        for i, (length, n) in enumerate(lengths)
    ]
    done = run(wrap(model, stop_ids=()), requests, 4, Capture((0, 2)))
    for r in requests[:2]:
        assert done[r.id].token_ids == reference_greedy(model, r.token_ids, r.max_new_tokens)


def test_rotary_tables_that_depend_on_the_longest_row() -> None:
    """Phi-3's longrope swaps factors for a whole batch once one row is long: refused, or the tokens are right."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    limit = {"original_max_position_embeddings": 16}
    model = tiny_model("phi3", rope_parameters=rope | limit | {"factor": 8.0}, **limit)
    lm, rows = wrap(model, stop_ids=()), [(7, 8, 9), (10, 11, 12, 13), tuple(range(20, 40))]
    wanted = {f"e{i}": reference_greedy(model, row, 8) for i, row in enumerate(rows)}
    requests = [Request(f"e{i}", row, 8) for i, row in enumerate(rows)]
    assert tokens_of(run(lm, requests[:2], 2)) == {key: wanted[key] for key in ("e0", "e1")}
    with contextlib.suppress(PromptError):
        assert tokens_of(run(lm, requests, 3)) == wanted


@SOME
def test_slots_left_empty_beside_a_late_short_prompt_do_no_harm(name: str) -> None:
    """All slots end at once and one prompt is left: its three neighbours hold no token that can be attended to."""
    model = shared_model(name)
    rows = [tuple(range(3 + i, 27 + i)) for i in range(4)] + [(5,)]
    requests = [Request(f"e{i}", row, 2 if i < 4 else 12) for i, row in enumerate(rows)]
    wanted = {r.id: reference_greedy(model, r.token_ids, r.max_new_tokens) for r in requests}
    for capture in (None, Capture((0,))):
        assert tokens_of(run(wrap(model, stop_ids=()), requests, 4, capture)) == wanted
    for dtype in (torch.bfloat16, torch.float16):
        run(wrap(shared_model(name, dtype), stop_ids=()), requests, 4, Capture((0,)))


# --- law 5: padding and idle rows change nothing ----------------------------------------------------------------------


@contextmanager
def changed_inputs(lm: LanguageModel, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Change the arguments of the model's forward passes."""

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, change(dict(kwargs))

    handle = lm.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def poisoned(lm: LanguageModel, layers: Sequence[int], where: Callable[[dict[str, Any]], Tensor]) -> Iterator[None]:
    """Add 1e6 to the outputs of some blocks wherever `where(forward's inputs)` [B, T] holds."""
    inputs: dict[str, Any] = {}

    def remember(kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs.update(kwargs)
        return kwargs

    def after(_module: Any, _args: Any, output: Any) -> Any:
        bare = output[0] if isinstance(output, tuple) else output
        dirty = bare + 1e6 * where(inputs)[:, -bare.shape[1] :].to(bare).unsqueeze(-1)
        return (dirty, *output[1:]) if isinstance(output, tuple) else dirty

    handles = [blocks(lm.model)[layer].register_forward_hook(after) for layer in layers]
    try:
        with changed_inputs(lm, remember):
            yield
    finally:
        for handle in handles:
            handle.remove()


def at_padding(inputs: dict[str, Any]) -> Tensor:
    """Return the columns of this pass that hold no token."""
    width = inputs["input_ids"].shape[1]
    return ~inputs["attention_mask"][:, -width:].bool()


def at_first_token(inputs: dict[str, Any]) -> Tensor:
    """Return where a prompt begins, and the padding before it."""
    return inputs["position_ids"] == 0


@SOME
def test_poisoned_padding_changes_nothing(name: str) -> None:
    """Add 1e6 to every block's output at padding, which nothing attends to and no pooling counts."""
    case = case_of(name)
    with poisoned(case.lm, ALL_LAYERS, at_padding):
        done = run(case.lm, case.requests, 5, Capture(ALL_LAYERS, poolings=POOLINGS))
    assert tokens_of(done) == case.expected(done)
    assert worst(case, done) < TOLERANCE[torch.float32]


@SOME
def test_a_poisoned_first_token_leaves_response_means_alone(name: str) -> None:
    """The last block's output at token 0 affects its own logits and the prompt's pooling alone."""
    case = case_of(name)
    requests = [r for r in case.requests if len(r.token_ids) > 1]  # else token 0 decides the first response token
    capture = Capture(ALL_LAYERS, poolings=("response_mean", "prompt_mean"))
    clean = run(case.lm, requests, 3, capture)
    with poisoned(case.lm, ALL_LAYERS[-1:], at_first_token):
        dirty = run(case.lm, requests, 3, capture)
    assert tokens_of(dirty) == tokens_of(clean)
    for key, completion in clean.items():
        if completion.token_ids:
            pair = completion.activations, dirty[key].activations
            assert deviation(*(kept["residual.response_mean"] for kept in pair)) < 1e-6
            assert deviation(*(kept["residual.prompt_mean"] for kept in pair)) > 0.9, "nothing was poisoned"


# --- law 6: negative controls -----------------------------------------------------------------------------------------


def without(*fields: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Remove some arguments of the forward pass."""
    return lambda kwargs: {key: value for key, value in kwargs.items() if key not in fields}


def positions_from_columns(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Number the positions from 0 in every pass."""
    wrong = torch.arange(kwargs["input_ids"].shape[1]).expand_as(kwargs["input_ids"])
    return kwargs | {"position_ids": wrong}


@SOME
def test_without_the_mask_the_laws_fail(name: str) -> None:
    case = case_of(name)
    with changed_inputs(case.lm, without("attention_mask")):
        done = run(case.lm, case.requests, 5, Capture(ALL_LAYERS))
    assert tokens_of(done) != case.expected(done) or worst(case, done) > 1e-2


@SOME
def test_with_wrong_positions_the_laws_fail(name: str) -> None:
    case = case_of(name)
    if name in ("bloom", "mpt", "falcon_alibi"):
        pytest.skip("ALiBi reads distances from columns; it has no positions")
    with changed_inputs(case.lm, positions_from_columns):
        done = run(case.lm, case.requests, 5, Capture(ALL_LAYERS))
    assert tokens_of(done) != case.expected(done) or worst(case, done) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_neo"])
def test_without_positions_absolute_ones_are_off(name: str) -> None:
    """A rotary model would not show this fault: only the distance between columns counts there."""
    case = case_of(name)
    with changed_inputs(case.lm, without("position_ids")):
        done = run(case.lm, case.requests, 5, Capture(ALL_LAYERS))
    assert tokens_of(done) != case.expected(done) or worst(case, done) > 1e-2


@SOME
def test_layers_off_by_one_fail(name: str) -> None:
    case = case_of(name)
    done = run(case.lm, case.requests[:3], 3, Capture(ALL_LAYERS))
    assert worst(case, done) < TOLERANCE[torch.float32]
    assert worst(case, done, shift=1) > 1e-2


# --- sampling ---------------------------------------------------------------------------------------------------------


WARPED = Sample(temperature=0.9, top_k=30, top_p=0.95)


@torch.no_grad()
def reference_sampled(model: Any, request: Request, strategy: Sample) -> tuple[int, ...]:
    """Sample one sequence with transformers' own warpers and the same uniforms; no cache, no padding."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(strategy.temperature)]
    warpers += [TopKLogitsWarper(strategy.top_k)] if strategy.top_k else []
    warpers += [TopPLogitsWarper(strategy.top_p)] if strategy.top_p < 1 else []
    ids = torch.tensor([list(request.token_ids)])
    for uniform in uniforms(request.id, request.seed, request.max_new_tokens):
        scores_1V = model(ids, use_cache=False).logits[:, -1].float()
        for warper in warpers:
            scores_1V = warper(ids, scores_1V)
        cdf_V = scores_1V.double().softmax(-1).cumsum(-1)[0]
        token = min(int(torch.searchsorted(cdf_V, float(uniform), right=True)), len(cdf_V) - 1)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return tuple(ids[0, len(request.token_ids) :].tolist())


@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, WARPED) for name in FAMILIES), ("llama", Sample(1.0))], ids=str
)
def test_sampled_tokens_do_not_depend_on_the_batch(name: str, strategy: Sample) -> None:
    case = case_of(name)
    requests = [replace(r, max_new_tokens=min(r.max_new_tokens, 8), seed=11) for r in case.requests]
    lm = wrap(case.lm.model, stop_ids=())
    wanted = {r.id: reference_sampled(lm.model, r, strategy) for r in requests}
    for batch_size, order in ((1, requests), (3, requests[::-1]), (5, requests)):
        assert tokens_of(run(lm, order, batch_size, strategy=strategy)) == wanted
    assert tokens_of(run(lm, requests, 4, Capture((1,)), strategy=strategy)) == wanted


def test_another_seed_or_id_gives_other_tokens() -> None:
    lm, prompt = wrap(shared_model("llama"), stop_ids=()), prompts(1)[0]
    requests = [Request(key, prompt, 12, seed) for key, seed in (("a", 0), ("b", 0))]
    done = run(lm, requests, 2, strategy=Sample(1.0))
    reseeded = run(lm, [replace(r, seed=1) for r in requests], 2, strategy=Sample(1.0))
    assert len({c.token_ids for c in (*done.values(), *reseeded.values())}) == 4
    assert tokens_of(run(lm, requests, 2, strategy=Sample(1.0))) == tokens_of(done)


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Return the p-value of the chi-square test, rare outcomes merged; 0 after an impossible one."""
    from scipy.stats import chisquare

    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    if wanted[-1] < 1:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    return float(chisquare(observed, torch.tensor(wanted).double() / sum(wanted) * sum(observed)).pvalue)


def first_tokens(lm: LanguageModel, prompt: tuple[int, ...], strategy: Sample, n: int) -> Tensor:
    """Count the first tokens of `n` requests."""
    requests = [Request(f"e{i}", prompt, 1) for i in range(n)]
    done = run(lm, requests, 256, strategy=strategy)
    return torch.bincount(torch.tensor([c.token_ids[0] for c in done.values()]), minlength=lm.vocab_size).double()


@pytest.mark.parametrize("strategy", [Sample(1.0), Sample(1.0, top_k=9), Sample(1.3, top_p=0.8), WARPED])
def test_first_tokens_follow_the_softmax(strategy: Sample) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    lm, prompt = wrap(shared_model("llama"), stop_ids=()), prompts(1, longest=4)[0]
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        scores_1V = lm.model(ids).logits[:, -1]
    flat_V = scores_1V.double().softmax(-1)[0]
    scores_1V = TemperatureLogitsWarper(strategy.temperature)(ids, scores_1V)
    scores_1V = TopKLogitsWarper(strategy.top_k or lm.vocab_size)(ids, scores_1V)
    scores_1V = TopPLogitsWarper(strategy.top_p)(ids, scores_1V)
    counts = first_tokens(lm, prompt, strategy, 4096)
    assert chi_square_p(counts, scores_1V.double().softmax(-1)[0]) > 1e-6
    other = flat_V if strategy != Sample(1.0) else (flat_V.log() / 1.3).softmax(-1)
    assert chi_square_p(counts, other) < 1e-6, "the test can't tell distributions apart"


# --- how responses end ------------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_response_and_are_not_part_of_it() -> None:
    model, rows = shared_model("llama"), prompts(6, seed=2)
    unstopped = [reference_greedy(model, row, 12) for row in rows]
    stops = (unstopped[0][0], unstopped[1][3], unstopped[2][11])  # at once, in the middle, as the very last token
    requests = [Request(f"e{i}", row, 12) for i, row in enumerate(rows)]
    requests.append(Request("cut", rows[1], 3))  # its budget ends just before the stop token
    done = run(wrap(model, stop_ids=stops), requests, 2, Capture(ALL_LAYERS, poolings=POOLINGS))
    assert (done["cut"].token_ids, done["cut"].finish_reason) == (unstopped[1][:3], "length")
    for i, response in enumerate(unstopped):
        kept = until_stop(response, stops)
        assert done[f"e{i}"].token_ids == kept
        assert done[f"e{i}"].finish_reason == ("stop" if len(kept) < 12 else "length")
    assert (done["e0"].token_ids, done["e0"].activations) == ((), {})


def test_every_response_may_be_empty() -> None:
    model, rows = shared_model("gpt2"), prompts(5)
    lm = wrap(model, stop_ids=range(97))
    done = run(lm, [Request(f"e{i}", row, 4) for i, row in enumerate(rows)], 2, Capture((0,)))
    assert {(c.token_ids, c.finish_reason) for c in done.values()} == {((), "stop")}
    assert not any(c.activations for c in done.values())


def test_no_requests_give_no_completions() -> None:
    assert run(wrap(shared_model("llama")), [], 4) == {}


def test_each_request_has_its_own_budget() -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    requests = [Request(f"e{i}", row, 1 + 3 * i) for i, row in enumerate(prompts(7))]
    done = run(lm, requests, 3, Capture((0,)))
    assert {key: len(c.token_ids) for key, c in done.items()} == {r.id: r.max_new_tokens for r in requests}


@pytest.mark.parametrize("capture", [None, Capture(ALL_LAYERS)], ids=["plain", "captured"])
def test_stop_strings_end_a_response_at_the_token_that_completes_them(capture: Capture | None) -> None:
    model, tokenizer = shared_model("llama"), tiny_tokenizer()
    rows = prompts(6, seed=5)
    unstopped = [reference_greedy(model, row, 12) for row in rows]
    stop = tokenizer.decode(list(unstopped[0][4:6]))
    lm = wrap(model, tokenizer, stop_ids=())
    done = run(lm, [Request(f"e{i}", r, 12) for i, r in enumerate(rows)], 2, capture, stop_strings=(stop,))
    for i, response in enumerate(unstopped):
        ends = [n for n in range(1, 13) if stop in tokenizer.decode(list(response[:n]))]
        assert done[f"e{i}"].token_ids == response[: ends[0] if ends else 12]
        assert done[f"e{i}"].finish_reason == ("stop_string" if ends else "length")
        for kept in done[f"e{i}"].activations.values():
            hidden_LTD = reference_hidden(model, rows[i] + done[f"e{i}"].token_ids)
            assert deviation(kept, pooled(hidden_LTD, len(rows[i]), "response_mean")) < 1e-5
    assert done["e0"].finish_reason == "stop_string"


def test_progress_counts_every_token_once() -> None:
    case = case_of("llama")
    counts: list[int] = []
    done = run(case.lm, case.requests, 3, on_progress=counts.append)
    assert sum(counts) == sum(len(c.token_ids) for c in done.values())


def one_line(error: BaseException) -> str:
    """Return an error's message, which must be one line."""
    assert "\n" not in str(error)
    return str(error)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (Request("e7", (), 4), "no tokens"),
        (Request("e7", (3,) * 120, 20), "128"),
        (Request("e7", (3,), 0), "max_new_tokens"),
    ],
)
def test_a_request_that_does_not_fit_is_named(request_: Request, part: str) -> None:
    with pytest.raises(PromptError, match="e7") as caught:
        run(wrap(shared_model("gpt2")), [request_], 2)
    assert part in one_line(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_the_engine_cannot_run_are_refused_in_one_line(name: str) -> None:
    model = refused_model(name)
    with pytest.raises(ModelError) as caught:
        wrap(model)
    assert type(model).__name__ in one_line(caught.value)
    assert len(one_line(caught.value)) > 30


# --- sites ------------------------------------------------------------------------------------------------------------

# The part of a block that reads the stream between attention and MLP, where it is not `post_attention_layernorm`.
MID_READERS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo"), "ln_2"),
    **dict.fromkeys(("opt", "biogpt", "xglm"), "final_layer_norm"),
    **dict.fromkeys(("gemma2", "gemma3"), "pre_feedforward_layernorm"),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), "mlp"),
    "apertus": "feedforward_layernorm",
    "mpt": "norm_2",
    "ctrl": "layernorm2",
    "vaultgemma": "pre_feedforward_layernorm",
}
SIDE_BY_SIDE = {
    **dict.fromkeys(("phi", "cohere", "cohere2"), "self_attn"),
    **dict.fromkeys(("gptj", "codegen"), "attn"),
    "gpt_neox": "attention",
    **dict.fromkeys(("falcon", "falcon_new"), "self_attention"),
}
# Normalised, scaled or gated after the addition: the stream is not a sum of its parts.
NOT_SUMS = ("opt_post_norm", "gemma4")
# One architecture of each structure above; the others run among the slow tests.
STRUCTURES = {*FAMILIES, "phi", "gptj", "falcon", "falcon_new", "opt", "olmo2", "apertus", "mpt", "ctrl", "gemma3"}
SUMS = [
    name if name in STRUCTURES else pytest.param(name, marks=pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in NOT_SUMS
]


def reference_sites(case: Case, name: str, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """Return every site of every block [L, T, D], by subtraction along the residual stream."""
    model, itself = case.lm.model, lambda block: block
    start_LTD = reference_site(model, ids, itself, inputs=True)
    end_LTD = reference_site(model, ids, itself)
    if name in SIDE_BY_SIDE:
        attention_LTD = reference_site(model, ids, lambda block: getattr(block, SIDE_BY_SIDE[name]))
        return {"residual": end_LTD, "attention": attention_LTD, "mlp": end_LTD - start_LTD - attention_LTD}
    reader = MID_READERS.get(name, "post_attention_layernorm")
    mid_LTD = reference_site(model, ids, lambda block: getattr(block, reader), inputs=True)
    parts = {"attention": mid_LTD - start_LTD, "mlp": end_LTD - mid_LTD}
    return {"residual": end_LTD, "residual_mid": mid_LTD, **parts}


@pytest.mark.parametrize("name", SUMS)
def test_sites_equal_what_the_blocks_add_to_the_residual_stream(name: str) -> None:
    case = case_of(name)
    requests = case.requests[5:8]
    wanted = {r.id: reference_sites(case, name, r.token_ids + case.responses[r.id]) for r in requests}
    sites = tuple(wanted[requests[0].id])
    capture = Capture(ALL_LAYERS, sites, ("response_mean", "prompt_mean", "all"))
    texts = [(r.id, r.token_ids, case.responses[r.id]) for r in requests]
    runs = [run(case.endless, requests, 3, capture)]
    runs.append({c.id: c for c in teacher_force(case.lm, texts, capture=capture, batch_size=3)})
    for done in runs:
        assert tokens_of(done) == {r.id: case.responses[r.id] for r in requests}
        for r in requests:
            for key, kept in done[r.id].activations.items():
                site, _, pooling = key.partition(".")
                reference = pooled(wanted[r.id][site], len(r.token_ids), pooling)
                assert deviation(kept, reference) < 2e-5, key  # the reference is a difference of large numbers


@pytest.mark.parametrize("name", [*SIDE_BY_SIDE, *NOT_SUMS])
def test_a_site_that_a_block_lacks_is_refused(name: str) -> None:
    case = case_of(name)
    with pytest.raises(ModelError, match="residual_mid") as caught:
        run(case.lm, case.requests, 2, Capture((0,), ("residual_mid",)))
    assert one_line(caught.value)


@pytest.mark.parametrize(
    "wrong", [Capture((LAYERS,)), Capture((-1,)), Capture((0,), ("neck",)), Capture((0,), ("residual",), ("median",))]
)
def test_an_impossible_capture_is_refused_in_one_line(wrong: Capture) -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError) as caught:
        run(case.lm, case.requests, 2, wrong)
    assert one_line(caught.value)
