"""Laws of per-token capture, against transformers alone: one sequence at a time, with hooks of the test's own.

The reference names the modules at the three stream points by hand: the block's input, the input of the part after
attention (in parallel blocks, the block's input plus attention's output), and the block's output.

Shapes: T tokens, P of the prompt, R of the response, L layers, K directions, D hidden, H heads; 3 stream points.
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
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.test_engine_laws import case_of, one_line, poisoned, run, tokens_of
from tests.tiny import (
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

# The module of a block whose input is the stream after attention; elsewhere it is `post_attention_layernorm`.
MODULE_AFTER_ATTENTION = {
    **dict.fromkeys(("gpt2", "gpt_neo"), "ln_2"),
    "opt": "final_layer_norm",
    **dict.fromkeys(("gemma2", "gemma3", "gemma4"), "pre_feedforward_layernorm"),
    "olmo2": "mlp",
    "apertus": "feedforward_layernorm",
    "mpt": "norm_2",
    "ctrl": "layernorm2",
    "opt_post_norm": "self_attn_layer_norm",  # normalised after the addition: the sum itself is read
}
# Parallel blocks: the module whose output attention adds.
PARALLEL_ATTENTION = {
    **dict.fromkeys(("phi", "cohere"), "self_attn"),
    "gptj": "attn",
    "gpt_neox": "attention",
    **dict.fromkeys(("falcon", "falcon_new"), "self_attention"),
}
# GQA; norms on both sides; normed q and k; sliding window; fused qkv; parallel blocks; experts; norms after the sum
FAMILIES = pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen3", "mistral", "gpt2", "gpt_neox", "mixtral", "opt_post_norm"]
)
FIVE = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])
# one of every other way to build a block or to name its modules
OTHER_BLOCKS = (
    *("gemma3", "gemma4", "olmo2", "granite", "opt", "apertus", "mpt", "ctrl", "gpt_neo"),
    *("cohere", "phi", "gptj", "falcon", "falcon_new", "gpt_oss", "bloom", "gpt_neox_sequential"),
)


# --- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def points_TL3D(model: Any, name: str, ids: Sequence[int]) -> Tensor:
    """Return the stream at the three points of every block, from one plain pass."""
    ids_1T = torch.tensor([list(ids)])
    after_attention = [
        getattr(block, MODULE_AFTER_ATTENTION.get(name, "post_attention_layernorm"), None) for block in blocks(model)
    ]
    parallel = (
        [getattr(block, PARALLEL_ATTENTION[name]) for block in blocks(model)] if name in PARALLEL_ATTENTION else []
    )
    with (
        taps(blocks(model), inputs=True) as before,
        taps(blocks(model)) as after,
        taps(parallel or after_attention, inputs=not parallel) as middle,
    ):
        model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False)
    start_LTD, middle_LTD, end_LTD = (
        torch.stack([hidden.reshape(len(ids), -1) for hidden in seen]) for seen in (before, middle, after)
    )
    if parallel:
        middle_LTD = start_LTD + middle_LTD
    return torch.stack([start_LTD, middle_LTD, end_LTD]).permute(2, 1, 0, 3)


@cache
def eager(name: str) -> Any:
    """Return the same model with eager attention, which returns its weights."""
    model = deepcopy(shared_model(name))
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def head_mean_LTT(name: str, ids: Sequence[int]) -> Tensor:
    """Return transformers' own attention weights, averaged over heads."""
    ids_1T = torch.tensor([list(ids)])
    mask_1T = torch.ones_like(ids_1T)
    out = eager(name)(input_ids=ids_1T, attention_mask=mask_1T, output_attentions=True, use_cache=False)
    return torch.stack([weights_1HTT[0].mean(0) for weights_1HTT in out.attentions])


def units_LDK(n_traits: int = TRAITS, n_layers: int = LAYERS, seed: int = 5) -> Tensor:
    """Draw random unit directions, another one at every layer."""
    drawn = torch.randn(n_layers, HIDDEN, n_traits, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def projected(points: Tensor, unit_LDK: Tensor) -> Tensor:
    """Project [T, L, 3, D] on the directions in float64: [T, L, 3, K]."""
    return torch.einsum("tlpd,ldk->tlpk", points.double(), unit_LDK.double())


@dataclass(frozen=True)
class Reference:
    """The stream of every request and its full response by transformers; a shorter response is its beginning."""

    name: str
    n_prompt: dict[str, int]
    points: dict[str, Tensor]

    def projections(self, completion: Completion, unit_LDK: Tensor) -> Tensor:
        """Return the projections that a completion should have."""
        key = completion.id.partition("/")[0]
        n_tokens = self.n_prompt[key] + len(completion.token_ids)
        return projected(self.points[key][:n_tokens], unit_LDK)


@cache
def reference_of(name: str) -> Reference:
    """Return the reference of an architecture's nine requests."""
    case = case_of(name)
    points = {r.id: points_TL3D(case.lm.model, name, r.token_ids + case.responses[r.id]) for r in case.requests}
    return Reference(name, {r.id: len(r.token_ids) for r in case.requests}, points)


def orders(name: str) -> list[tuple[int, LanguageModel, list[Request]]]:
    """List the runs: one by one; many in 3 slots (refills, the window rolls); shuffled; reversed."""
    case = case_of(name)
    shuffled = random.Random(2).sample(case.requests, len(case.requests))
    return [
        (1, case.lm, list(case.requests)),
        (3, *case.orders()[1][1:]),
        (8, case.endless, shuffled),
        (8, case.lm, list(case.requests[::-1])),
    ]


def worst(
    name: str, done: dict[str, Completion], unit_LDK: Tensor, change: Callable[[Tensor], Tensor] = lambda right: right
) -> float:
    """Return the largest deviation of any completion's projections; `change` spoils the reference on purpose."""
    return max(
        deviation(c.activations["projections"], change(reference_of(name).projections(c, unit_LDK)))
        for c in done.values()
    )


# --- projections -----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("order", range(4), ids=["alone", "many-in-3", "shuffled-in-8", "reversed-in-8"])
def test_projections_equal_transformers_in_any_batch_and_order(name: str, order: int) -> None:
    batch_size, lm, requests = orders(name)[order]
    done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert tokens_of(done) == case_of(name).expected(done, lm)
    for completion in done.values():
        kept = completion.activations["projections"]
        n_prompt = reference_of(name).n_prompt[completion.id.partition("/")[0]]
        assert set(completion.activations) == {"projections"}
        assert kept.shape == (n_prompt + len(completion.token_ids), LAYERS, 3, TRAITS)
        assert (kept.dtype, kept.device.type) == (torch.float32, "cpu")
    assert worst(name, done, units_LDK()) < TOLERANCE


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_projections_equal_transformers_in_every_other_kind_of_block(name: str) -> None:
    """Four prompts in two slots; the engine's laws check the tokens."""
    model = shared_model(name)
    requests = [Request(f"e{i}", row, n) for i, (row, n) in enumerate(zip(prompts(4), (6, 9, 2, 4), strict=True))]
    done = run(wrap(model, stop_ids=()), requests, 2, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    for r in requests:
        expected = projected(points_TL3D(model, name, r.token_ids + done[r.id].token_ids), units_LDK())
        assert deviation(done[r.id].activations["projections"], expected) < TOLERANCE
        assert deviation(done[r.id].activations["projections"], expected.roll(1, 2)) > 1e-2


@FIVE
def test_with_two_models_the_after_model_is_captured(name: str) -> None:
    """Two models decode together; the projections are the first model's, at the tokens chosen from both."""
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
        expected = projected(points_TL3D(case.lm.model, name, r.token_ids + done[r.id].token_ids), units_LDK())
        assert deviation(done[r.id].activations["projections"], expected) < TOLERANCE


def test_speculation_is_refused_in_one_line() -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError) as caught:
        run(case.lm, case.requests, 3, TokenProjections(ALL_LAYERS, units_LDK()), strategy=Speculate())
    assert one_line(caught.value)


def test_the_cases_are_hard_enough() -> None:
    """Prompts longer than a window and of one token, responses that stop early, refills, directions that differ."""
    for name in ("llama", "mistral", "gemma2"):
        case = case_of(name)
        assert max(len(r.token_ids) for r in case.requests) > 2 * WINDOW
        assert getattr(case.lm.model.config, "sliding_window", WINDOW) == WINDOW
        assert min(len(r.token_ids) for r in case.requests) == 1
        assert len(case.orders()[1][2]) > 3 * 3
        said = case.expected(tokens_as_completions(name))
        assert any(len(case.responses[key]) > len(response) for key, response in said.items())
    assert (units_LDK()[:, :, 0] * units_LDK()[:, :, 1]).sum(1).abs().max() < 0.6


def tokens_as_completions(name: str) -> dict[str, Completion]:
    """Return the reference's responses as completions."""
    return {key: Completion(key, tokens, "length") for key, tokens in case_of(name).responses.items()}


def roll(dim: int) -> Callable[[Tensor], Tensor]:
    """Shift the reference by one along a dimension of [T, L, 3, K]."""
    return lambda right: right.roll(1, dim)


@FIVE
def test_negative_control_the_law_fails_when_shifted_by_a_token_layer_point_or_trait(name: str) -> None:
    case = case_of(name)
    done = run(case.endless, case.requests, 3, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert worst(name, done, units_LDK()) < TOLERANCE
    for dim in range(4):
        assert worst(name, done, units_LDK(), roll(dim)) > 1e-2, f"dimension {dim}"


@FIVE
def test_negative_control_the_mlps_input_is_not_the_stream(name: str) -> None:
    """The MLP's normalised input, which is sometimes mistaken for `after_attention`, is far from it."""
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


@FIVE
def test_a_layers_output_is_the_next_layers_input(name: str) -> None:
    case = case_of(name)
    same_LDK = units_LDK(n_layers=1).expand(LAYERS, -1, -1)
    done = run(case.lm, case.requests, 3, TokenProjections(ALL_LAYERS, same_LDK, attention=False))
    for completion in done.values():
        kept = completion.activations["projections"]
        assert torch.equal(kept[:, 1:, 0], kept[:, :-1, 2])
        assert deviation(kept[:, :, 1], kept[:, :, 0]) > 1e-3


@FIVE
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
def test_a_negated_direction_negates_and_the_standard_basis_gives_the_stream(name: str) -> None:
    case = case_of(name)
    basis_LDK = torch.eye(HIDDEN).expand(LAYERS, -1, -1)
    done = run(case.endless, case.requests[:4], 2, TokenProjections(ALL_LAYERS, basis_LDK, attention=False))
    for r in case.requests[:4]:
        assert deviation(done[r.id].activations["projections"], reference_of(name).points[r.id]) < TOLERANCE
    up, down = (
        run(case.endless, case.requests[:4], 2, TokenProjections(ALL_LAYERS, sign * units_LDK(), attention=False))
        for sign in (1, -1)
    )
    for key in up:
        assert torch.equal(up[key].activations["projections"], -down[key].activations["projections"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_projected_in_float32(name: str, dtype: torch.dtype) -> None:
    """Sums over the hidden size in half precision would deviate far more."""
    model = shared_model(name, dtype)
    lm = wrap(model, stop_ids=())
    requests = [Request("e0", prompts(1)[0], 6), Request("e1", prompts(5)[4], 6)]
    for r in requests:  # one at a time: the same stream almost to the last bit
        (done,) = generate(lm, [r], batch_size=1, capture=TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
        kept = done.activations["projections"]
        expected = projected(points_TL3D(model, name, r.token_ids + done.token_ids), units_LDK())
        assert kept.dtype == torch.float32
        n_prompt = len(r.token_ids)
        assert deviation(kept[:n_prompt, :, ::2], expected[:n_prompt, :, ::2]) < 2e-3
        assert deviation(kept, expected) < 0.1


# --- attention -------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("order", range(3), ids=["alone", "many-in-3", "shuffled-in-8"])
def test_attention_equals_the_head_mean_of_an_eager_model(name: str, order: int) -> None:
    batch_size, lm, requests = orders(name)[order]
    case = case_of(name)
    done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
    assert tokens_of(done) == case.expected(done, lm)
    assert worst(name, done, units_LDK()) < TOLERANCE
    expected = {r.id: head_mean_LTT(name, r.token_ids + case.responses[r.id]) for r in case.requests}
    for completion in done.values():
        key = completion.id.partition("/")[0]
        n_prompt, n_new = reference_of(name).n_prompt[key], len(completion.token_ids)
        weights_RLT = completion.activations["attention"]
        assert weights_RLT.shape == (n_new, LAYERS, n_prompt + n_new)
        assert (weights_RLT.dtype, weights_RLT.device.type) == (torch.float32, "cpu")
        reference = expected[key][:, n_prompt : n_prompt + n_new, : n_prompt + n_new].transpose(0, 1)
        if n_new:
            assert deviation(weights_RLT, reference) < TOLERANCE
        for r, row_LT in enumerate(weights_RLT):
            assert not row_LT[:, n_prompt + r + 1 :].any(), "a token attends to later ones"
            assert row_LT.min() >= 0
            assert torch.allclose(row_LT.sum(-1), torch.ones(LAYERS), atol=1e-5)
        if n_new > 2:
            assert deviation(weights_RLT.roll(1, 0), reference) > 1e-2
            assert deviation(weights_RLT.roll(1, 1), reference) > 1e-2
            assert deviation(weights_RLT.roll(1, 2), reference) > 1e-2


def test_a_sliding_window_hides_the_prompts_beginning() -> None:
    case = case_of("mistral")
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    for r in case.requests:
        weights_RLT = done[r.id].activations["attention"]
        for i, row_LT in enumerate(weights_RLT):
            first_visible = len(r.token_ids) + i + 1 - WINDOW
            assert not row_LT[:, : max(0, first_visible)].any()


def test_attention_with_sinks_sums_to_less_than_one_and_equals_transformers() -> None:
    case = case_of("gpt_oss")
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert tokens_of(done) == case.responses
    for r in case.requests:
        n_prompt = len(r.token_ids)
        expected = head_mean_LTT("gpt_oss", r.token_ids + case.responses[r.id])[:, n_prompt:].transpose(0, 1)
        assert deviation(done[r.id].activations["attention"], expected) < TOLERANCE
        assert done[r.id].activations["attention"].sum(-1).max() < 1


@pytest.mark.parametrize("name", ["bloom", "gptj", "falcon"])
def test_attention_outside_transformers_interface_is_refused_with_a_remedy_that_works(name: str) -> None:
    case = case_of(name)
    with pytest.raises(ModelError, match="--no-attention") as caught:
        run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert one_line(caught.value)
    done = run(case.endless, case.requests, 4, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert worst(name, done, units_LDK()) < TOLERANCE


# --- side effects ----------------------------------------------------------------------------------------------------


@FIVE
def test_capture_changes_no_token(name: str) -> None:
    case = case_of(name)
    requests = [replace(r, seed=4) for r in case.requests]
    for strategy in (None, Sample(0.8, top_p=0.95)):
        plain = run(case.lm, requests, 3, strategy=strategy)
        read = run(case.lm, requests, 3, TokenProjections(ALL_LAYERS, units_LDK()), strategy=strategy)
        assert tokens_of(read) == tokens_of(plain)
        assert {k: c.finish_reason for k, c in read.items()} == {k: c.finish_reason for k, c in plain.items()}


@FIVE
def test_poisoned_padding_is_not_read(name: str) -> None:
    """Every block's output is 1e6 wherever the mask has no token."""
    case = case_of(name)

    def at_padding(inputs: dict[str, Any]) -> Tensor:
        ids_BT = inputs["input_ids"]
        mask_BS = inputs.get("attention_mask")  # none in the probe
        return torch.zeros_like(ids_BT, dtype=torch.bool) if mask_BS is None else ~mask_BS[:, -ids_BT.shape[1] :].bool()

    with poisoned(case.lm, ALL_LAYERS, at_padding):
        done = run(case.lm, case.requests, 5, TokenProjections(ALL_LAYERS, units_LDK(), attention=False))
    assert tokens_of(done) == case.expected(done)
    assert worst(name, done, units_LDK()) < TOLERANCE


def test_capture_leaves_the_model_as_it_was() -> None:
    """No hook and no attention function stays after a run, one that was closed halfway, and one that failed."""
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
        list(generate(lm, [*requests, Request("poisoned", (5, POISON, 7), 5)], batch_size=2, capture=capture))
    assert state() == before
    first, second = (run(lm, requests, 3, capture) for _ in range(2))
    for key in first:
        for kind in ("projections", "attention"):
            assert torch.equal(first[key].activations[kind], second[key].activations[kind])


# --- how responses end -----------------------------------------------------------------------------------------------


def stopping_at_once(name: str) -> tuple[LanguageModel, list[Request], str]:
    """Return a model that ends one of several responses before its first token, requests, and that one's id."""
    case = case_of(name)
    first = case.responses["e0"][0]
    return wrap(case.lm.model, stop_ids=(first,)), list(case.requests), "e0"


@FIVE
def test_an_empty_response_has_the_rows_of_its_prompt(name: str) -> None:
    lm, requests, empty = stopping_at_once(name)
    for batch_size in (1, 4):
        done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
        n_prompt = len(requests[0].token_ids)
        assert (done[empty].token_ids, done[empty].finish_reason) == ((), "stop")
        assert done[empty].activations["projections"].shape == (n_prompt, LAYERS, 3, TRAITS)
        assert done[empty].activations["attention"].shape == (0, LAYERS, n_prompt)
        assert worst(name, done, units_LDK()) < TOLERANCE


def test_if_every_response_is_empty_each_has_the_rows_of_its_prompt() -> None:
    name = "llama"
    requests = list(case_of(name).requests)
    lm = wrap(case_of(name).lm.model, stop_ids=range(97))
    for batch_size in (1, 4):
        done = run(lm, requests, batch_size, TokenProjections(ALL_LAYERS, units_LDK()))
        assert {c.token_ids for c in done.values()} == {()}
        assert worst(name, done, units_LDK()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_end_where_a_stop_string_ends_the_response(name: str) -> None:
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
        expected = projected(points_TL3D(model, name, row + completion.token_ids), units_LDK())
        assert deviation(completion.activations["projections"], expected) < TOLERANCE
        assert completion.activations["attention"].shape[::2] == (len(completion.token_ids), len(expected))


def test_a_response_of_one_token_has_one_row() -> None:
    case = case_of("llama")
    requests = [replace(r, max_new_tokens=1) for r in case.requests]
    done = run(case.endless, requests, 4, TokenProjections(ALL_LAYERS, units_LDK()))
    assert {len(c.token_ids) for c in done.values()} == {1}
    assert {c.activations["attention"].shape[0] for c in done.values()} == {1}
    assert worst("llama", done, units_LDK()) < TOLERANCE


# --- steered ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_steered_stream_is_captured(name: str) -> None:
    """Steering at layer 1 shifts the projection there by the steering vector, and the next layer's input too."""
    case, unit_LDK = case_of(name), units_LDK()
    push = 3.0 * unit_LDK[1, :, 0]
    requests = [replace(case.requests[0], steering=Steering(add={1: push}), max_new_tokens=1), case.requests[1]]
    done = run(case.endless, requests, 2, TokenProjections(ALL_LAYERS, unit_LDK, attention=False))
    kept = done["e0"].activations["projections"][: len(requests[0].token_ids)]
    plain = reference_of(name).projections(Completion("e0", (), "length"), unit_LDK)
    shift = kept.double() - plain
    scale = float(plain.abs().max())
    assert deviation(shift[:, 1, 2], (push.double() @ unit_LDK[1].double()).expand(len(kept), -1)) < 1e-3
    assert shift[:, 1, :2].abs().max() < TOLERANCE * scale
    assert deviation(shift[:, 2, 0], (push.double() @ unit_LDK[2].double()).expand(len(kept), -1)) < 1e-3
    assert worst(name, {"e1": done["e1"]}, unit_LDK) < TOLERANCE


# --- non-finite activations ------------------------------------------------------------------------------------------


POISON = 90  # a token at which a block's output is made NaN


@contextmanager
def broken_at(model: Any, layer: int, value: float = float("nan"), token: int | None = POISON) -> Iterator[None]:
    """Replace a block's output by `value` where a token stands (None: everywhere, in the probe too)."""
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
def test_a_nan_is_reported_with_its_example_layer_and_dtype(name: str, layer: int, attention: bool) -> None:
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
def test_nan_in_the_probe_is_not_reported_as_an_unknown_architecture(layer: int, capture: Any) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    lm = wrap(model, stop_ids=())
    with broken_at(model, layer, token=None), pytest.raises(ActivationError) as caught:
        list(generate(lm, [Request("e0", (5, 6, 7), 4)], batch_size=2, capture=capture))
    line = one_line(caught.value)
    assert f"layer {layer}" in line
    assert "float16" in line
    assert "--dtype bfloat16" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_prompt_token_is_found_though_the_logits_are_finite(value: float) -> None:
    """No later token attends to the last block's output, so only the capture can show it."""
    model = tiny_model("llama")
    lm = wrap(model, stop_ids=())
    requests = [Request("well", (5, 6, 7), 3), Request("ex7", (5, POISON, 7), 3)]
    with broken_at(model, LAYERS - 1, value):
        assert len(list(generate(lm, requests, batch_size=2))) == 2, "the logits should be finite"
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
    ids=["out of range", "negative", "width", "layers", "two dimensions", "nan"],
)
def test_an_invalid_capture_is_refused_in_one_line(wrong: TokenProjections) -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError) as caught:
        run(case.lm, case.requests, 2, wrong)
    assert one_line(caught.value)


# --- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def counting_tensors() -> Iterator[Callable[[], int]]:
    """Count the bytes of live tensors made since, each storage once."""
    gc.collect()
    gc.freeze()  # exclude earlier objects

    def count() -> int:
        storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) is Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    try:
        yield count
    finally:
        gc.unfreeze()


def most_bytes(capture: Any, requests: Sequence[Request], batch_size: int, *, prefills: bool = False) -> int:
    """Return the most bytes alive at any layer of any decode step (or of any pass). Deterministic."""
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


def equal_requests(n: int, n_new: int, n_prompt: int = 20) -> list[Request]:
    """Make requests that end together."""
    return [Request(f"e{i}", tuple(range(3 + i, 3 + i + n_prompt)), n_new) for i in range(n)]


PROJECTION_BYTES = LAYERS * 3 * 4  # per token and trait


@pytest.mark.parametrize("prefills", [False, True], ids=["decoding", "throughout"])
def test_more_traits_take_the_memory_of_their_projections_only(prefills: bool) -> None:
    one, eight = (
        most_bytes(TokenProjections(ALL_LAYERS, units_LDK(k), False), equal_requests(4, 24), 4, prefills=prefills)
        for k in (1, 8)
    )
    kept, directions = 7 * PROJECTION_BYTES * 4 * (20 + 24), 7 * LAYERS * HIDDEN * 4
    assert eight - one < 1.1 * kept + 2 * directions
    if not prefills:
        assert eight - one > 0.9 * kept


def test_a_longer_response_takes_the_memory_of_its_projections_only() -> None:
    """Negative control: a capture of every token's hidden states grows."""
    few, many = equal_requests(4, 8), equal_requests(4, 40)
    captures = {
        "projections": TokenProjections(ALL_LAYERS, units_LDK(1), False),
        "hidden states": Capture(ALL_LAYERS, poolings=("all",)),
    }
    plain = most_bytes(None, many, 4) - most_bytes(None, few, 4)
    growth = {
        kind: most_bytes(capture, many, 4) - most_bytes(capture, few, 4) - plain for kind, capture in captures.items()
    }
    assert growth["hidden states"] > 0.9 * 4 * 32 * LAYERS * HIDDEN * 4
    assert growth["projections"] < 1.2 * 4 * 32 * PROJECTION_BYTES


@pytest.mark.parametrize("attention", [False, True], ids=["projections", "attention"])
def test_a_long_response_does_not_keep_its_neighbours_rows_alive(attention: bool) -> None:
    """One row of 60 tokens beside 60 short ones keeps its own tensors, not every pass that it was in."""
    long = Request("long", (3, 4, 5), 60)
    short = [Request(f"s{i}", (7, 8 + i), 3) for i in range(60)]
    n_traits = 16
    capture = TokenProjections(ALL_LAYERS, units_LDK(n_traits), attention)
    alone = most_bytes(capture, [long], 1) - most_bytes(None, [long], 1)
    beside = most_bytes(capture, [long, *short], 8) - most_bytes(None, [long, *short], 8)
    own = 63 * PROJECTION_BYTES * n_traits
    assert alone < 2 * own + 100_000
    assert beside < 2 * alone
