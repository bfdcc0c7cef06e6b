"""Laws of what is read token by token, against transformers alone: one sequence at a time, hooks of the test's own.

The reference knows the three points of a block by hand: what goes in, what the part after attention is given (or, where
attention and MLP run side by side, what goes in and attention's output together), and what comes out.

Shapes: T tokens, P of the prompt, R of the response, L layers, K directions, D hidden, H heads; 3 points.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extraction.activations.per_token import TokenProjections
from extraction.core.errors import ActivationError, ModelError, TraitlineError
from extraction.engine.generate import generate
from extraction.engine.logit_diff import Amplify
from extraction.engine.sampler import Sample
from extraction.engine.speculation import Speculate
from extraction.engine.steering import Steering
from extraction.model.loading import LanguageModel, wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.test_engine_laws import case_of, one_line, poisoned, run, tokens_of
from tests.tiny import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    WINDOW,
    blocks,
    deviation,
    prompts,
    reference_greedy,
    shared_model,
    taps,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
ALL_LAYERS = tuple(range(LAYERS))
TRAITS = 3
TOLERANCE = 1e-4  # of the largest projection

# The part of a block that is given the stream after attention; the rest read it at `post_attention_layernorm`.
READS_AFTER = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo"), "ln_2"),
    **dict.fromkeys(("opt", "biogpt", "xglm"), "final_layer_norm"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma4", "vaultgemma"), "pre_feedforward_layernorm"),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "flex_olmo"), "mlp"),
    "apertus": "feedforward_layernorm",
    "mpt": "norm_2",
    "ctrl": "layernorm2",
    "opt_post_norm": "self_attn_layer_norm",  # normalised after the addition: the sum itself is read
}
# Blocks whose attention and MLP both read the same input: what attention adds.
ADDS_BESIDE = {
    **dict.fromkeys(("phi", "cohere", "cohere2"), "self_attn"),
    **dict.fromkeys(("gptj", "codegen"), "attn"),
    "gpt_neox": "attention",
    **dict.fromkeys(("falcon", "falcon_new"), "self_attention"),
}
ASKED = (
    *("llama", "gemma2", "gemma3", "qwen3", "mistral", "gpt2", "gpt_neox", "gpt_neox_sequential", "mixtral"),
    *("olmo2", "cohere", "phi", "granite", "opt_post_norm"),
)
MANY = pytest.mark.parametrize("name", ASKED)
SOME = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])
REST = [name for name in ARCHITECTURES if name not in ASKED]


# --- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def points_TL3D(model: Any, name: str, ids: Sequence[int]) -> Tensor:
    """The stream at the three points of every block, one plain pass."""
    ids_1T = torch.tensor([list(ids)])
    readers = [getattr(block, READS_AFTER.get(name, "post_attention_layernorm"), None) for block in blocks(model)]
    beside = [getattr(block, ADDS_BESIDE[name]) for block in blocks(model)] if name in ADDS_BESIDE else []
    with (
        taps(blocks(model), inputs=True) as before,
        taps(blocks(model)) as after,
        taps(beside or readers, inputs=not beside) as middle,
    ):
        model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
    start_LTD, middle_LTD, end_LTD = (
        torch.stack([hidden.reshape(len(ids), -1) for hidden in seen]) for seen in (before, middle, after)
    )
    if beside:
        middle_LTD = start_LTD + middle_LTD
    return torch.stack([start_LTD, middle_LTD, end_LTD]).permute(2, 1, 0, 3)


@cache
def eager(name: str) -> Any:
    """The same model, with the attention that can tell its weights."""
    model = deepcopy(shared_model(name))
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def head_mean_LTT(name: str, ids: Sequence[int]) -> Tensor:
    """What transformers itself says of attention, the mean over heads."""
    ids_1T = torch.tensor([list(ids)])
    mask_1T = torch.ones_like(ids_1T)
    out = eager(name)(input_ids=ids_1T, attention_mask=mask_1T, output_attentions=True, use_cache=False)
    return torch.stack([weights_1HTT[0].mean(0) for weights_1HTT in out.attentions])


def units_LDK(n_traits: int = TRAITS, n_layers: int = LAYERS, seed: int = 5) -> Tensor:
    """Random directions of length 1, another one at every layer."""
    drawn = torch.randn(n_layers, HIDDEN, n_traits, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def projected(points: Tensor, unit_LDK: Tensor) -> Tensor:
    """[T, L, 3, K] of [T, L, 3, D], in float64."""
    return torch.einsum("tlpd,ldk->tlpk", points.double(), unit_LDK.double())


@dataclass(frozen=True)
class Told:
    """What transformers says of every request, to its whole budget: causal, so a shorter answer is its beginning."""

    name: str
    n_prompt: dict[str, int]
    points: dict[str, Tensor]

    def projections(self, completion: Completion, unit_LDK: Tensor) -> Tensor:
        """What a completion should have."""
        key = completion.id.partition("/")[0]
        n_tokens = self.n_prompt[key] + len(completion.token_ids)
        return projected(self.points[key][:n_tokens], unit_LDK)


@cache
def told(name: str) -> Told:
    """The reference of an architecture's nine requests."""
    case = case_of(name)
    points = {r.id: points_TL3D(case.lm.model, name, r.token_ids + case.responses[r.id]) for r in case.requests}
    return Told(name, {r.id: len(r.token_ids) for r in case.requests}, points)


def orders(name: str) -> list[tuple[int, LanguageModel, list[Request]]]:
    """Alone; many in three slots, so that they are refilled and the window rolls; eight, shuffled; reversed."""
    case = case_of(name)
    shuffled = random.Random(2).sample(case.requests, len(case.requests))
    return [
        (1, case.lm, list(case.requests)),
        (3, *case.orders()[1][1:]),
        (8, case.endless, shuffled),
        (8, case.lm, list(case.requests[::-1])),
    ]


def worst(
    name: str, done: dict[str, Completion], unit_LDK: Tensor, change: Callable[[Tensor], Tensor] = lambda kept: kept
) -> float:
    """The largest deviation of any completion's projections; `change` spoils the reference on purpose."""
    return max(
        deviation(c.activations["projections"], change(told(name).projections(c, unit_LDK))) for c in done.values()
    )


# --- projections -----------------------------------------------------------------------------------------------------


@MANY
@pytest.mark.parametrize("order", range(4), ids=["alone", "many-in-3", "shuffled-in-8", "reversed-in-8"])
def test_projections_equal_transformers_in_any_batch_and_order(name: str, order: int) -> None:
    batch_size, lm, requests = orders(name)[order]
    done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert tokens_of(done) == case_of(name).said(done, lm)
    for completion in done.values():
        kept = completion.activations["projections"]
        n_prompt = told(name).n_prompt[completion.id.partition("/")[0]]
        assert set(completion.activations) == {"projections"}
        assert kept.shape == (n_prompt + len(completion.token_ids), LAYERS, 3, TRAITS)
        assert (kept.dtype, kept.device.type) == (torch.float32, "cpu")
    assert worst(name, done, units_LDK()) < TOLERANCE


@pytest.mark.parametrize("name", REST)
def test_projections_equal_transformers_in_every_other_architecture(name: str) -> None:
    """Four prompts in two slots; whether the tokens are right is the engine's laws' business."""
    model = shared_model(name)
    requests = [Request(f"e{i}", row, n) for i, (row, n) in enumerate(zip(prompts(4), (6, 9, 2, 4), strict=True))]
    done = run(wrap(model, stop_ids=()), requests, 2, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    for r in requests:
        wanted = projected(points_TL3D(model, name, r.token_ids + done[r.id].token_ids), units_LDK())
        assert deviation(done[r.id].activations["projections"], wanted) < TOLERANCE
        assert deviation(done[r.id].activations["projections"], wanted.roll(1, 2)) > 1e-2


@SOME
def test_amplified_it_is_the_after_model_that_is_read(name: str) -> None:
    """Two models decode at once; the rows are those of the first, at the tokens that both agreed on."""
    case = case_of(name)
    before = wrap(tiny_model(name, seed=1), stop_ids=())
    strategy = Amplify(before, alpha=0.7)
    plain = run(case.endless, case.requests[:4], 2, strategy=strategy)
    done = run(
        case.endless,
        case.requests[:4],
        2,
        TokenProjections(ALL_LAYERS, units_LDK(), attention=False),
        strategy=strategy,
    )
    assert tokens_of(done) == tokens_of(plain)
    assert tokens_of(done) != {key: case.responses[key] for key in done}
    for r in case.requests[:4]:
        wanted = projected(points_TL3D(case.lm.model, name, r.token_ids + done[r.id].token_ids), units_LDK())
        assert deviation(done[r.id].activations["projections"], wanted) < TOLERANCE


def test_speculation_is_refused_in_one_line() -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError, match="speculation") as caught:
        run(case.lm, case.requests, 3, TokenProjections(ALL_LAYERS, units_LDK()), strategy=Speculate())
    assert one_line(caught.value)


def test_the_cases_are_hard_enough() -> None:
    """Prompts longer than a window, an answer of no token, stops in mid-response, refills, directions that differ."""
    for name in ("llama", "mistral", "gemma2"):
        case = case_of(name)
        assert max(len(r.token_ids) for r in case.requests) > 2 * WINDOW
        assert getattr(case.lm.model.config, "sliding_window", WINDOW) == WINDOW
        assert min(len(r.token_ids) for r in case.requests) == 1
        assert len(case.orders()[1][2]) > 3 * 3
        said = case.said(tokens_as_completions(name))
        assert any(len(case.responses[key]) > len(response) for key, response in said.items())
    assert (units_LDK()[:, :, 0] * units_LDK()[:, :, 1]).sum(1).abs().max() < 0.6


def tokens_as_completions(name: str) -> dict[str, Completion]:
    """The reference's answers in the form that `said` takes."""
    return {key: Completion(key, tokens, "length") for key, tokens in case_of(name).responses.items()}


def roll(dim: int) -> Callable[[Tensor], Tensor]:
    """Off by one along a dimension of [T, L, 3, K]."""
    return lambda kept: kept.roll(1, dim)


@SOME
def test_off_by_a_token_a_layer_a_point_or_a_trait_the_law_fails(name: str) -> None:
    case = case_of(name)
    done = run(case.endless, case.requests, 3, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert worst(name, done, units_LDK()) < TOLERANCE
    for dim in range(4):
        assert worst(name, done, units_LDK(), roll(dim)) > 1e-2, f"dimension {dim}"


@SOME
def test_what_the_mlp_reads_is_not_the_stream(name: str) -> None:
    """The MLP's normalised input, which scripts take for `after_attention`, is far from it."""
    case, unit_LDK = case_of(name), units_LDK()
    done = run(case.endless, case.requests[:3], 3, TokenProjections(ALL_LAYERS, unit_LDK, attention=False))
    for r in case.requests[:3]:
        ids = r.token_ids + case.responses[r.id]
        mlps = [getattr(block, "mlp") for block in blocks(case.lm.model)]  # noqa: B009 (nn.Module has no such name)
        with taps(mlps, inputs=True) as seen, torch.no_grad():
            case.lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        normalised_TLD = torch.stack([hidden.reshape(len(ids), -1) for hidden in seen], dim=1)
        wrong = projected(normalised_TLD.unsqueeze(2), unit_LDK)
        kept = done[r.id].activations["projections"]
        assert deviation(kept[:, :, 1:2], wrong) > 0.1
        assert deviation(kept, projected(points_TL3D(case.lm.model, name, ids), unit_LDK)) < TOLERANCE


@SOME
def test_what_comes_out_of_a_layer_goes_into_the_next(name: str) -> None:
    case = case_of(name)
    same_LDK = units_LDK(n_layers=1).expand(LAYERS, -1, -1)
    done = run(case.lm, case.requests, 3, TokenProjections(ALL_LAYERS, same_LDK, attention=False))
    for completion in done.values():
        kept = completion.activations["projections"]
        assert torch.equal(kept[:, 1:, 0], kept[:, :-1, 2])
        assert deviation(kept[:, :, 1], kept[:, :, 0]) > 1e-3


@SOME
def test_several_traits_in_one_pass_equal_each_alone_and_some_layers_equal_all(name: str) -> None:
    case, unit_LDK = case_of(name), units_LDK(8)
    together = run(case.lm, case.requests, 4, TokenProjections(ALL_LAYERS, unit_LDK, attention=False))
    for trait in (0, 3, 7):
        alone = run(case.lm, case.requests, 4, TokenProjections(ALL_LAYERS, unit_LDK[:, :, [trait]], attention=False))
        for key, completion in alone.items():
            both = together[key].activations["projections"][..., [trait]]
            assert deviation(completion.activations["projections"], both) < 1e-6
    for layers in ((1,), (0, 2)):
        some = run(case.lm, case.requests, 4, TokenProjections(layers, unit_LDK[list(layers)], attention=False))
        for key, completion in some.items():
            both = together[key].activations["projections"][:, list(layers)]
            assert deviation(completion.activations["projections"], both) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_direction_upside_down_gives_the_opposite_and_the_basis_gives_the_stream(name: str) -> None:
    case = case_of(name)
    basis_LDK = torch.eye(HIDDEN).expand(LAYERS, -1, -1)
    done = run(case.endless, case.requests[:4], 2, TokenProjections(ALL_LAYERS, basis_LDK, attention=False))
    for r in case.requests[:4]:
        assert deviation(done[r.id].activations["projections"], told(name).points[r.id]) < TOLERANCE
    up, down = (
        run(case.endless, case.requests[:4], 2, TokenProjections(ALL_LAYERS, sign * units_LDK(), attention=False))
        for sign in (1, -1)
    )
    for key in up:
        assert torch.equal(up[key].activations["projections"], -down[key].activations["projections"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_projected_in_float32(name: str, dtype: torch.dtype) -> None:
    """Summed over the hidden size in half precision, the deviation from the same stream's would be far larger."""
    model = shared_model(name, dtype)
    lm = wrap(model, stop_ids=())
    requests = [Request("e0", prompts(1)[0], 6), Request("e1", prompts(5)[4], 6)]
    for r in requests:  # alone: the same stream to the last bit or nearly so
        (done,) = generate(lm, [r], batch_size=1, capture=TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
        kept = done.activations["projections"]
        wanted = projected(points_TL3D(model, name, r.token_ids + done.token_ids), units_LDK())
        assert kept.dtype == torch.float32
        n_prompt = len(r.token_ids)
        assert deviation(kept[:n_prompt, :, ::2], wanted[:n_prompt, :, ::2]) < 2e-3
        assert deviation(kept, wanted) < 0.1


# --- attention -------------------------------------------------------------------------------------------------------


@MANY
@pytest.mark.parametrize("order", range(3), ids=["alone", "many-in-3", "shuffled-in-8"])
def test_attention_equals_the_head_mean_of_an_eager_model(name: str, order: int) -> None:
    batch_size, lm, requests = orders(name)[order]
    case = case_of(name)
    done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
    assert tokens_of(done) == case.said(done, lm)
    assert worst(name, done, units_LDK()) < TOLERANCE
    wanted = {r.id: head_mean_LTT(name, r.token_ids + case.responses[r.id]) for r in case.requests}
    for completion in done.values():
        key = completion.id.partition("/")[0]
        n_prompt, n_new = told(name).n_prompt[key], len(completion.token_ids)
        weights_RLT = completion.activations["attention"]
        assert weights_RLT.shape == (n_new, LAYERS, n_prompt + n_new)
        assert (weights_RLT.dtype, weights_RLT.device.type) == (torch.float32, "cpu")
        reference = wanted[key][:, n_prompt : n_prompt + n_new, : n_prompt + n_new].transpose(0, 1)
        if n_new:
            assert deviation(weights_RLT, reference) < TOLERANCE
        for r, row_LT in enumerate(weights_RLT):
            assert not row_LT[:, n_prompt + r + 1 :].any(), "a row sees what comes after it"
            assert row_LT.min() >= 0
            assert torch.allclose(row_LT.sum(-1), torch.ones(LAYERS), atol=1e-5)
        if n_new > 2:
            assert deviation(weights_RLT.roll(1, 0), reference) > 1e-2
            assert deviation(weights_RLT.roll(1, 1), reference) > 1e-2
            assert deviation(weights_RLT.roll(1, 2), reference) > 1e-2


def test_a_window_shorter_than_the_prompt_hides_its_beginning() -> None:
    case = case_of("mistral")
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    for r in case.requests:
        weights_RLT = done[r.id].activations["attention"]
        for i, row_LT in enumerate(weights_RLT):
            first_seen = len(r.token_ids) + i + 1 - WINDOW
            assert not row_LT[:, : max(0, first_seen)].any()


def test_attention_with_sinks_sums_to_less_than_one_and_is_still_transformers_own() -> None:
    case = case_of("gpt_oss")
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert tokens_of(done) == case.responses
    for r in case.requests:
        n_prompt = len(r.token_ids)
        wanted = head_mean_LTT("gpt_oss", r.token_ids + case.responses[r.id])[:, n_prompt:].transpose(0, 1)
        assert deviation(done[r.id].activations["attention"], wanted) < TOLERANCE
        assert done[r.id].activations["attention"].sum(-1).max() < 1


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj", "falcon", "gpt_neo"])
def test_attention_of_its_own_is_refused_with_the_remedy_that_works(name: str) -> None:
    case = case_of(name)
    with pytest.raises(ModelError, match="--no-attention") as caught:
        run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert one_line(caught.value)
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert worst(name, done, units_LDK()) < TOLERANCE


# --- what must not matter --------------------------------------------------------------------------------------------


@MANY
def test_reading_changes_no_token(name: str) -> None:
    case = case_of(name)
    requests = [replace(r, seed=4) for r in case.requests]
    for strategy in (None, Sample(0.8, top_p=0.95)):
        plain = run(case.lm, requests, 3, strategy=strategy)
        read = run(case.lm, requests, 3, TokenProjections(ALL_LAYERS, units_LDK()), strategy=strategy)
        assert tokens_of(read) == tokens_of(plain)
        assert {k: c.finish_reason for k, c in read.items()} == {k: c.finish_reason for k, c in plain.items()}


@SOME
def test_poisoned_padding_is_not_read(name: str) -> None:
    """1e6 in every block's output wherever the mask has no token."""
    case = case_of(name)

    def at_padding(inputs: dict[str, Any]) -> Tensor:
        ids_BT = inputs["input_ids"]
        mask_BS = inputs.get("attention_mask")  # none in the passes that look the model over
        return torch.zeros_like(ids_BT, dtype=torch.bool) if mask_BS is None else ~mask_BS[:, -ids_BT.shape[1] :].bool()

    with poisoned(case.lm, ALL_LAYERS, at_padding):
        done = run(case.lm, case.requests, 5, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert tokens_of(done) == case.said(done)
    assert worst(name, done, units_LDK()) < TOLERANCE


def test_a_model_that_was_read_is_as_it_was() -> None:
    """No hook stays, nor another attention: after a run, after one that was left halfway, and after one that failed."""
    model = tiny_model("llama")
    lm = wrap(model, stop_ids=())
    requests = [Request(f"e{i}", row, 5) for i, row in enumerate(prompts(6))]

    def state() -> tuple[Any, int]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return model.config._attn_implementation, hooks

    before = state()
    capture = TokenProjections(ALL_LAYERS, units_LDK())
    list(generate(lm, requests, batch_size=2, capture=capture))
    assert state() == before
    halfway = generate(lm, requests, batch_size=2, capture=capture)
    next(halfway)
    assert state() != before
    halfway.close()
    assert state() == before
    with broken_at(model, 1), pytest.raises(ActivationError):
        list(generate(lm, [*requests, Request("ill", (5, POISON, 7), 5)], batch_size=2, capture=capture))
    assert state() == before
    first, second = (run(lm, requests, 3, capture) for _ in range(2))
    for key in first:
        for kind in ("projections", "attention"):
            assert torch.equal(first[key].activations[kind], second[key].activations[kind])


# --- how responses end -----------------------------------------------------------------------------------------------


def stopping_at_once(name: str) -> tuple[LanguageModel, list[Request], str]:
    """A model that ends one of several answers before its first token; its id."""
    case = case_of(name)
    first = case.responses["e0"][0]
    return wrap(case.lm.model, stop_ids=(first,)), list(case.requests), "e0"


@SOME
def test_an_empty_response_still_has_its_prompts_rows(name: str) -> None:
    lm, requests, empty = stopping_at_once(name)
    for batch_size in (1, 4):
        done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
        n_prompt = len(requests[0].token_ids)
        assert (done[empty].token_ids, done[empty].finish_reason) == ((), "stop")
        assert done[empty].activations["projections"].shape == (n_prompt, LAYERS, 3, TRAITS)
        assert done[empty].activations["attention"].shape == (0, LAYERS, n_prompt)
        assert worst(name, done, units_LDK()) < TOLERANCE


def test_when_every_response_is_empty_each_has_its_own_prompt() -> None:
    name = "llama"
    requests = list(case_of(name).requests)
    lm = wrap(case_of(name).lm.model, stop_ids=range(97))
    for batch_size in (1, 4):
        done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
        assert {c.token_ids for c in done.values()} == {()}
        assert worst(name, done, units_LDK()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stop_strings_end_the_rows_where_they_end_the_response(name: str) -> None:
    model, tokenizer = shared_model(name), tiny_tokenizer()
    rows = prompts(6, seed=5)
    unstopped = [reference_greedy(model, row, 12) for row in rows]
    stop = tokenizer.decode(list(unstopped[0][4:6]))
    lm = wrap(model, tokenizer, stop_ids=())
    requests = [Request(f"e{i}", row, 12) for i, row in enumerate(rows)]
    done = run(lm, requests, 2, TokenProjections(ALL_LAYERS, units_LDK()), stop_strings=(stop,))
    assert done["e0"].finish_reason == "stop_string"
    for i, row in enumerate(rows):
        completion = done[f"e{i}"]
        assert completion.token_ids == unstopped[i][: len(completion.token_ids)]
        wanted = projected(points_TL3D(model, name, row + completion.token_ids), units_LDK())
        assert deviation(completion.activations["projections"], wanted) < TOLERANCE
        assert completion.activations["attention"].shape[::2] == (len(completion.token_ids), len(wanted))


def test_one_token_of_budget_has_its_row() -> None:
    case = case_of("llama")
    requests = [replace(r, max_new_tokens=1) for r in case.requests]
    done = run(case.endless, requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert {len(c.token_ids) for c in done.values()} == {1}
    assert {c.activations["attention"].shape[0] for c in done.values()} == {1}
    assert worst("llama", done, units_LDK()) < TOLERANCE


# --- steered ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_stream_that_is_read_is_the_steered_one(name: str) -> None:
    """Pushed along a direction at layer 1, a token's projection there rises by the push; the next layer is given it."""
    case, unit_LDK = case_of(name), units_LDK()
    push = 3.0 * unit_LDK[1, :, 0]
    requests = [replace(case.requests[0], steering=Steering(add={1: push}), max_new_tokens=1), case.requests[1]]
    done = run(case.endless, requests, 2, TokenProjections(ALL_LAYERS, unit_LDK, attention=False))
    kept = done["e0"].activations["projections"][: len(requests[0].token_ids)]
    plain = told(name).projections(Completion("e0", (), "length"), unit_LDK)
    shift = kept.double() - plain
    scale = float(plain.abs().max())
    assert deviation(shift[:, 1, 2], (push.double() @ unit_LDK[1].double()).expand(len(kept), -1)) < 1e-3
    assert shift[:, 1, :2].abs().max() < TOLERANCE * scale
    assert deviation(shift[:, 2, 0], (push.double() @ unit_LDK[2].double()).expand(len(kept), -1)) < 1e-3
    assert worst(name, {"e1": done["e1"]}, unit_LDK) < TOLERANCE


# --- what is broken is named -----------------------------------------------------------------------------------------


POISON = 90  # a token that makes a block's output NaN where it stands


@contextmanager
def broken_at(model: Any, layer: int, value: float = float("nan"), token: int | None = POISON) -> Iterator[None]:
    """A block's output is not finite where a token stands (None: everywhere, also in passes that look it over)."""
    ids: dict[str, Tensor] = {}

    def remember(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids["BT"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def spoil(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        where_BT = torch.ones_like(ids["BT"], dtype=torch.bool) if token is None else ids["BT"] == token
        hidden.view(*where_BT.shape, -1)[where_BT] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [
        model.base_model.register_forward_pre_hook(remember, with_kwargs=True),
        blocks(model)[layer].register_forward_hook(spoil),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", [False, True], ids=["projections", "attention"])
@pytest.mark.parametrize("layer", ALL_LAYERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_layer_that_is_nan_is_named_with_its_example_and_type(name: str, layer: int, attention: bool) -> None:
    model = tiny_model(name)
    requests = [Request("well", (5, 6, 7), 4), Request("ex7", (5, POISON, 7), 4)]
    capture = TokenProjections(ALL_LAYERS, units_LDK(), attention)
    with broken_at(model, layer), pytest.raises(ActivationError) as caught:
        list(generate(wrap(model, stop_ids=()), requests, batch_size=2, capture=capture))
    line = one_line(caught.value)
    assert "ex7" in line
    assert f"layer {layer}" in line
    assert "float32" in line


@pytest.mark.parametrize("capture", [TokenProjections(ALL_LAYERS, units_LDK()), Capture(ALL_LAYERS, ("residual_mid",))])
@pytest.mark.parametrize("layer", ALL_LAYERS)
def test_a_model_that_is_nan_throughout_is_not_taken_for_an_unknown_architecture(layer: int, capture: Any) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    lm = wrap(model, stop_ids=())
    with broken_at(model, layer, token=None), pytest.raises(ActivationError) as caught:
        list(generate(lm, [Request("e0", (5, 6, 7), 4)], batch_size=2, capture=capture))
    line = one_line(caught.value)
    assert f"layer {layer}" in line
    assert "float16" in line
    assert "--dtype bfloat16" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_prompt_token_that_is_not_finite_is_found_though_the_logits_are_sound(value: float) -> None:
    """In the last block nothing attends to it any more: only the readings can tell."""
    model = tiny_model("llama")
    lm = wrap(model, stop_ids=())
    requests = [Request("well", (5, 6, 7), 3), Request("ex7", (5, POISON, 7), 3)]
    with broken_at(model, LAYERS - 1, value):
        assert len(list(generate(lm, requests, batch_size=2))) == 2, "the logits were to be sound"
        with pytest.raises(ActivationError, match="ex7") as caught:
            list(generate(lm, requests, batch_size=2, capture=TokenProjections(ALL_LAYERS, units_LDK())))
    assert f"layer {LAYERS - 1}" in one_line(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        TokenProjections((LAYERS,), units_LDK(n_layers=1)),
        TokenProjections((-1,), units_LDK(n_layers=1)),
        TokenProjections(ALL_LAYERS, units_LDK()[:, :-1]),
        TokenProjections((0,), units_LDK()),
        TokenProjections(ALL_LAYERS, units_LDK()[0]),
        TokenProjections(ALL_LAYERS, units_LDK() * float("nan")),
    ],
    ids=["beyond", "negative", "width", "layers", "two dimensions", "nan"],
)
def test_a_reading_that_cannot_be_is_refused_in_one_line(wrong: TokenProjections) -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError) as caught:
        run(case.lm, case.requests, 2, wrong)
    assert one_line(caught.value)


# --- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def counting_tensors() -> Iterator[Callable[[], int]]:
    """Counts the bytes of the tensors that were made since, and live, each storage once."""
    gc.collect()
    gc.freeze()  # what was there before is looked at no more

    def count() -> int:
        storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    try:
        yield count
    finally:
        gc.unfreeze()


def most_bytes(capture: Any, requests: Sequence[Request], batch_size: int, *, prefills: bool = False) -> int:
    """The most that live at any layer of any decode step (or of any pass). Deterministic."""
    lm, most = wrap(shared_model("llama"), stop_ids=()), 0
    running = generate(lm, requests, batch_size=batch_size, capture=capture)

    def sample(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal most
        if prefills or output.shape[1] == 1:
            most = max(most, count())

    with counting_tensors() as count:
        handles = [module.register_forward_hook(sample) for module in blocks(lm.model)]
        try:
            for completion in running:
                del completion
        finally:
            for handle in handles:
                handle.remove()
    return most


def alike(n: int, n_new: int, n_prompt: int = 20) -> list[Request]:
    """Requests that end together."""
    return [Request(f"e{i}", tuple(range(3 + i, 3 + i + n_prompt)), n_new) for i in range(n)]


A_PROJECTION = LAYERS * 3 * 4  # bytes a token and trait


@pytest.mark.parametrize("prefills", [False, True], ids=["decoding", "throughout"])
def test_more_traits_take_the_room_of_their_projections_and_no_more(prefills: bool) -> None:
    one, eight = (
        most_bytes(TokenProjections(ALL_LAYERS, units_LDK(k), False), alike(4, 24), 4, prefills=prefills)
        for k in (1, 8)
    )
    kept, directions = 7 * A_PROJECTION * 4 * (20 + 24), 7 * LAYERS * HIDDEN * 4
    assert eight - one < 1.1 * kept + 2 * directions
    if not prefills:
        assert eight - one > 0.9 * kept


def test_a_longer_response_takes_the_room_of_its_projections_and_no_hidden_states() -> None:
    """Against a capture of every token's hidden states, which must be seen to grow."""
    few, many = alike(4, 8), alike(4, 40)
    captures = {
        "projections": TokenProjections(ALL_LAYERS, units_LDK(1), False),
        "hidden states": Capture(ALL_LAYERS, poolings=("all",)),
    }
    plain = most_bytes(None, many, 4) - most_bytes(None, few, 4)
    growth = {
        kind: most_bytes(capture, many, 4) - most_bytes(capture, few, 4) - plain for kind, capture in captures.items()
    }
    assert growth["hidden states"] > 0.9 * 4 * 32 * LAYERS * HIDDEN * 4
    assert growth["projections"] < 1.2 * 4 * 32 * A_PROJECTION


@pytest.mark.parametrize("attention", [False, True], ids=["projections", "attention"])
def test_a_long_answer_does_not_keep_what_was_read_of_its_neighbours(attention: bool) -> None:
    """One row of 60 tokens beside 60 short ones: what lives is its own, not every pass that it was in."""
    long = Request("long", (3, 4, 5), 60)
    short = [Request(f"s{i}", (7, 8 + i), 3) for i in range(60)]
    n_traits = 16
    read = TokenProjections(ALL_LAYERS, units_LDK(n_traits), attention)
    alone = most_bytes(read, [long], 1) - most_bytes(None, [long], 1)
    beside = most_bytes(read, [long, *short], 8) - most_bytes(None, [long, *short], 8)
    its_own = 63 * A_PROJECTION * n_traits
    assert alone < 2 * its_own + 100_000
    assert beside < 2 * alone
