"""Laws of one layer's internals, against transformers alone: modules named by hand, one sequence at a time.

Shapes: T tokens, R of the response, H heads, G key heads, C head dimension, F MLP width, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.activations.per_token import TokenInternals, TokenProjections
from extraction.core.errors import ActivationError, TraitlineError
from extraction.engine.generate import generate
from extraction.model.loading import wrap
from extraction.utils_batch import Completion, Request
from tests.test_engine_laws import case_of, one_line, run, tokens_of
from tests.test_per_token_laws import (
    ALL_LAYERS,
    POISON,
    broken_at,
    eager,
    most_bytes,
    orders,
    points_TL3D,
    stopping_at_once,
    units_LDK,
)
from tests.tiny import HIDDEN, LAYERS, blocks, deviation, taps, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
TOLERANCE = 1e-4
HEADS = 4
LAYER = 1
STREAM = ("residual_in", "residual_mid", "residual_out")

LLAMA: dict[str, tuple[str, bool]] = {  # part: module within the block, True for its input
    "q": ("self_attn.q_proj", False),
    "k": ("self_attn.k_proj", False),
    "v": ("self_attn.v_proj", False),
    "mlp_gate": ("mlp.gate_proj", False),
    "mlp_up": ("mlp.up_proj", False),
    "mlp_activation": ("mlp.down_proj", True),
    "mlp_down": ("mlp.down_proj", False),
}
GPT2 = {"mlp_up": ("mlp.c_fc", False), "mlp_activation": ("mlp.c_proj", True), "mlp_down": ("mlp.c_proj", False)}
NEOX = {
    "mlp_up": ("mlp.dense_h_to_4h", False),
    "mlp_activation": ("mlp.dense_4h_to_h", True),
    "mlp_down": ("mlp.dense_4h_to_h", False),
}
PARTS = {
    **dict.fromkeys(("llama", "gemma2", "qwen3", "mistral", "granite"), LLAMA),
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "mixtral": {key: LLAMA[key] for key in "qkv"},
}
FAMILIES = pytest.mark.parametrize("name", PARTS)
FIVE = pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"])


def fused_qkv(name: str, block: Any, ids: Sequence[int], model: Any) -> dict[str, Tensor]:
    """Split a fused projection: GPT-2's holds q, k and v in turn, GPT-NeoX's head by head."""
    module = block.attn.c_attn if name == "gpt2" else block.attention.query_key_value
    with taps([module]) as seen:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    fused_TX = seen[0][0]
    if name == "gpt2":
        parts = fused_TX.chunk(3, dim=-1)
        return {key: part.unflatten(-1, (HEADS, -1)) for key, part in zip("qkv", parts, strict=True)}
    return dict(zip("qkv", fused_TX.unflatten(-1, (HEADS, -1)).chunk(3, dim=-1), strict=True))


@torch.no_grad()
def internals_of(name: str, ids: Sequence[int], layer: int = LAYER) -> dict[str, Tensor]:
    """Return transformers' own tensors of one layer: every part, and attention by head [T, H, T]."""
    model = case_of(name).lm.model
    block: Any = blocks(model)[layer]
    parts: dict[str, Tensor] = {} if "q" in PARTS[name] else fused_qkv(name, block, ids, model)
    for key, (path, inputs) in PARTS[name].items():
        with taps([block.get_submodule(path)], inputs=inputs) as seen:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        parts[key] = seen[0].reshape(len(ids), -1)
    for key in "qkv":
        parts[key] = parts[key].reshape(len(ids), -1, 8)
    stream_T3D = points_TL3D(model, name, ids)[:, layer]
    parts |= dict(zip(STREAM, stream_T3D.unbind(1), strict=True))
    out = eager(name)(input_ids=torch.tensor([list(ids)]), output_attentions=True, use_cache=False)
    return parts | {"attention": out.attentions[layer][0].transpose(0, 1)}


@cache
def reference_of(name: str) -> dict[str, dict[str, Tensor]]:
    """Return the reference of an architecture's nine requests."""
    case = case_of(name)
    return {r.id: internals_of(name, r.token_ids + case.responses[r.id]) for r in case.requests}


def expected(name: str, completion: Completion, key: str) -> Tensor:
    """Return the part that a completion should have."""
    whole = reference_of(name)[completion.id.partition("/")[0]]
    n_tokens = len(completion.activations["residual_in"])
    return whole[key][:n_tokens, :, :n_tokens] if key == "attention" else whole[key][:n_tokens]


@FAMILIES
@pytest.mark.parametrize("order", [1, 2], ids=["many-in-3", "shuffled-in-8"])
def test_internals_equal_transformers_in_any_batch_and_order(name: str, order: int) -> None:
    batch_size, lm, requests = orders(name)[order]
    case = case_of(name)
    done = run(lm, requests, batch_size, TokenInternals(LAYER))
    assert tokens_of(done) == case.expected(done, lm)
    n_prompts = {r.id: len(r.token_ids) for r in requests}
    for completion in done.values():
        kept = completion.activations
        assert {*reference_of(name)["e0"], "rot_q", "rot_k"} <= set(kept)
        assert {len(part) for part in kept.values()} == {n_prompts[completion.id] + len(completion.token_ids)}
        for key in reference_of(name)["e0"]:
            assert kept[key].dtype == torch.float32, key
            assert deviation(kept[key], expected(name, completion, key)) < TOLERANCE, key


@FIVE
def test_negative_control_the_law_fails_when_shifted_by_one_or_at_another_layer(name: str) -> None:
    case = case_of(name)
    done = run(case.endless, case.requests[:3], 3, TokenInternals(LAYER))
    elsewhere = run(case.endless, case.requests[:3], 3, TokenInternals(LAYER + 1))
    for key in reference_of(name)["e0"]:
        completion = done["e0"]
        right = expected(name, completion, key)
        assert deviation(completion.activations[key], right) < TOLERANCE
        assert deviation(completion.activations[key].roll(1, 0), right) > 1e-2, key
        assert deviation(elsewhere["e0"].activations[key], right) > 1e-2, key
        if right.ndim == 3 and right.shape[1] > 1:
            assert deviation(completion.activations[key].roll(1, 1), right) > 1e-2, key


@FAMILIES
def test_attention_is_the_softmax_of_rotated_queries_and_keys(name: str) -> None:
    """The softmax of rot_q . rot_k, scaled, capped and masked as the model does, equals every head's weights."""
    case = case_of(name)
    config = case.lm.model.config
    done = run(case.endless, case.requests[:4], 2, TokenInternals(LAYER))
    for completion in done.values():
        q_THC, k_TGC, weights_THT = (completion.activations[key] for key in ("rot_q", "rot_k", "attention"))
        assert torch.allclose(weights_THT.sum(-1), torch.ones(weights_THT.shape[:2]), atol=1e-5)
        assert not weights_THT.triu(1)[..., 1:].any() or not weights_THT.transpose(0, 1).triu(1).any()
        k_THC = k_TGC.repeat_interleave(q_THC.shape[1] // k_TGC.shape[1], dim=1)
        scale = getattr(config, "attention_multiplier", None) or 8**-0.5
        scores_THT = torch.einsum("thc,shc->ths", q_THC, k_THC) * scale
        cap = getattr(config, "attn_logit_softcapping", None)
        scores_THT = cap * torch.tanh(scores_THT / cap) if cap else scores_THT
        again_THT = scores_THT.masked_fill(weights_THT == 0, float("-inf")).softmax(-1)
        assert deviation(again_THT, weights_THT) < TOLERANCE
        spoilt = scores_THT.roll(1, 2).masked_fill(weights_THT == 0, float("-inf")).softmax(-1)
        assert len(q_THC) < 3 or deviation(spoilt, weights_THT) > 1e-2


@FIVE
def test_projections_and_internals_agree_on_stream_and_attention(name: str) -> None:
    case, unit_LDK = case_of(name), units_LDK()
    inside = run(case.lm, case.requests, 3, TokenInternals(LAYER))
    along = run(case.lm, case.requests, 3, TokenProjections(ALL_LAYERS, unit_LDK))
    assert tokens_of(inside) == tokens_of(along)
    for key, completion in inside.items():
        stream_T3D = torch.stack([completion.activations[point] for point in STREAM], dim=1)
        both = along[key].activations
        assert deviation(stream_T3D @ unit_LDK[LAYER], both["projections"][:, LAYER]) < TOLERANCE
        n_new = len(completion.token_ids)
        mean_RT = completion.activations["attention"].mean(1)[len(stream_T3D) - n_new :]
        assert not n_new or deviation(mean_RT, both["attention"][:, LAYER]) < TOLERANCE


@FIVE
def test_without_attention_the_other_parts_are_equal(name: str) -> None:
    """q, k and v are left out too: they are identified by attention's own q, k and v."""
    case = case_of(name)
    whole = run(case.lm, case.requests, 3, TokenInternals(LAYER))
    bare = run(case.lm, case.requests, 3, TokenInternals(LAYER, attention=False))
    assert tokens_of(whole) == tokens_of(bare)
    for key, completion in bare.items():
        assert set(whole[key].activations) - set(completion.activations) == {"attention", "rot_q", "rot_k", *"qkv"}
        for part, kept in completion.activations.items():
            assert deviation(kept, whole[key].activations[part]) < TOLERANCE


@FIVE
def test_an_empty_response_has_the_internals_of_its_prompt(name: str) -> None:
    lm, requests, empty = stopping_at_once(name)
    alone = run(lm, requests[:1], 1, TokenInternals(LAYER))
    done = run(lm, requests, 4, TokenInternals(LAYER)) | alone
    assert done[empty].token_ids == ()
    for completion in done.values():
        for key in reference_of(name)["e0"]:
            assert deviation(completion.activations[key], expected(name, completion, key)) < TOLERANCE, key


@pytest.mark.parametrize("layer", [LAYER, LAYERS - 1])
def test_a_nan_is_reported_with_its_example_layer_and_dtype(layer: int) -> None:
    model = tiny_model("llama")
    requests = [Request("well", (5, 6, 7), 4), Request("ex7", (5, POISON, 7), 4)]
    with broken_at(model, layer), pytest.raises(ActivationError, match="ex7") as caught:
        list(generate(wrap(model, stop_ids=()), requests, batch_size=2, capture=TokenInternals(layer)))
    assert f"layer {layer}" in one_line(caught.value)
    assert "float32" in one_line(caught.value)


@pytest.mark.parametrize("layer", [LAYERS, -1])
def test_a_missing_layer_is_refused_in_one_line(layer: int) -> None:
    case = case_of("llama")
    with pytest.raises(TraitlineError, match=f"{layer}") as caught:
        run(case.lm, case.requests, 2, TokenInternals(layer))
    assert one_line(caught.value)


def test_a_long_response_does_not_keep_its_neighbours_internals_alive() -> None:
    long = Request("long", (3, 4, 5), 60)
    short = [replace(long, id=f"s{i}", token_ids=(7, 8 + i), max_new_tokens=3) for i in range(40)]
    alone = most_bytes(TokenInternals(LAYER), [long], 1) - most_bytes(None, [long], 1)
    beside = most_bytes(TokenInternals(LAYER), [long, *short], 8) - most_bytes(None, [long, *short], 8)
    assert alone > 60 * 3 * HIDDEN * 4
    assert beside < 2 * alone
