"""Observed attention equals the model's own, family by family, alone and in the engine's batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.core.errors import ModelError
from extraction.engine.generate import generate
from extraction.model.attention_weights import ATTENTION_NAME, AttentionReading, watch_attention
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.model.lora import share_weights
from extraction.utils_batch import Request
from tests.tiny import WINDOW, blocks, deviation, prompts, shared_model, taps, tiny_model

# attention computed outside transformers' interface: another class each, with and without ALiBi
OWN = ("gptj", "codegen", "falcon", "falcon_alibi", "xglm", "bloom", "mpt", "gpt_neo")
LATER = ("nemotron", "ctrl")  # outside the interface in transformers 5.4
CAPPED = ("gemma2",)  # transformers 5.4 runs it without soft-capping by default
FAMILIES = ["llama", "gemma2", "qwen3", "mistral", "gpt2", "gpt_neox", "opt", "mixtral"]
# sinks, shared keys, chunks, latent projections, scaled scores, parallel blocks and other classes
OBSERVED = [
    *FAMILIES,
    "gpt_oss",
    "gemma4",
    "llama4_chunked",
    "deepseek_v3",
    "granite",
    "cohere",
    "phi3",
    "biogpt",
    *LATER,
]
LONG = prompts(1)[0]  # longer than the sliding windows


@contextmanager
def noting(lm: LanguageModel, layers: Sequence[int] | None = None) -> Iterator[dict[int, list[AttentionReading]]]:
    """Yield copies of the readings by layer."""
    seen: dict[int, list[AttentionReading]] = {
        layer: [] for layer in (range(lm.n_layers) if layers is None else layers)
    }

    def note(layer: int, a: AttentionReading) -> None:
        seen[layer].append(AttentionReading(*(x.clone() for x in (a.q_BTHC, a.k_BTGC, a.v_BTGC, a.weights_BHTS))))

    with watch_attention(lm, tuple(seen), note):
        yield seen


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def observed(name: str, ids: Sequence[int] = LONG, dtype: torch.dtype = torch.float32) -> list[AttentionReading]:
    """Return every layer's attention in one text."""
    with noting(wrap(shared_model(name, dtype))) as seen:
        logits_of(shared_model(name, dtype), ids)
    return [reading for (reading,) in seen.values()]


def expand(states_BTGC: Tensor, heads: int) -> Tensor:
    """Repeat key heads for every query head: [B, T, G, C] -> [B, T, H, C]."""
    return states_BTGC.repeat_interleave(heads // states_BTGC.shape[2], dim=2)


def softmax_by_hand(
    a: AttentionReading, scale: float, *, window: int = 10**6, cap: float = 0.0, causal: bool = True
) -> Tensor:
    """Compute softmax(q . k * scale) under a causal mask, a window and a cap: [B, H, T, T]."""
    score_BHTS = torch.einsum("bthc,bshc->bhts", a.q_BTHC, expand(a.k_BTGC, a.q_BTHC.shape[2])) * scale
    score_BHTS = cap * torch.tanh(score_BHTS / cap) if cap else score_BHTS
    row_T1, column_S = torch.arange(score_BHTS.shape[2])[:, None], torch.arange(score_BHTS.shape[3])
    hidden_TS = (column_S > row_T1) | (column_S <= row_T1 - window)
    return score_BHTS.masked_fill(hidden_TS & causal, float("-inf")).softmax(-1)


# --- against transformers alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVED)
def test_observed_weights_equal_transformers_own_and_the_model_is_unchanged(name: str) -> None:
    model = tiny_model(name)
    if name in CAPPED:
        model.set_attn_implementation("eager")
    lm = wrap(model)  # may switch its linear layers to oneDNN, so before the first logits
    implementation, before_TV = model.config._attn_implementation, logits_of(model, LONG)
    try:
        with noting(lm) as seen:
            during_TV = logits_of(model, LONG)
    except ModelError as refusal:
        if name not in LATER:
            raise
        pytest.skip(str(refusal))
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits_of(model, LONG), before_TV)
    assert deviation(during_TV, before_TV) < 2e-5
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([LONG]), use_cache=False, output_attentions=True).attentions
    for (reading,), weights_BHTS in zip(seen.values(), expected, strict=True):
        assert deviation(reading.weights_BHTS, weights_BHTS) < 2e-5
        row_BHT = reading.weights_BHTS.sum(-1)
        assert (row_BHT < 1 + 1e-6).all()
        assert (row_BHT > 1 - 1e-6).all() != (name == "gpt_oss")  # the rest goes to its sinks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "scale", "options"),
    [
        ("llama", 8**-0.5, {}),
        ("qwen3", 8**-0.5, {}),
        ("gpt2", 8**-0.5, {}),
        ("gpt_neox", 8**-0.5, {}),
        ("gpt_neox_sequential", 8**-0.5, {}),
        ("granite", 0.3, {}),
        ("mistral", 8**-0.5, {"window": WINDOW}),
    ],
)
def test_weights_are_the_softmax_of_rotated_queries_and_keys(
    name: str, scale: float, options: dict[str, Any], dtype: torch.dtype
) -> None:
    for reading in observed(name, dtype=dtype):
        assert reading.weights_BHTS.dtype == dtype
        by_hand = softmax_by_hand(reading, scale, **options)
        # no closer in float64: eager attention computes its softmax in float32
        assert deviation(reading.weights_BHTS, by_hand) < 1e-5
        assert deviation(reading.weights_BHTS, softmax_by_hand(reading, 2 * scale, **options)) > 1e-2
        assert deviation(reading.weights_BHTS, softmax_by_hand(reading, scale, causal=False)) > 1e-2


@pytest.mark.parametrize("layer", range(3))
def test_gemma2_caps_and_windows_its_scores(layer: int) -> None:
    model = tiny_model("gemma2", attn_logit_softcapping=2.0, attn_implementation="eager")
    with noting(wrap(model), [layer]) as seen:
        logits_of(model, LONG)
    window = 10**6 if layer == 1 else WINDOW
    weights_BHTS = seen[layer][0].weights_BHTS
    assert deviation(weights_BHTS, softmax_by_hand(seen[layer][0], 8**-0.5, window=window, cap=2.0)) < 1e-5
    assert deviation(weights_BHTS, softmax_by_hand(seen[layer][0], 8**-0.5, window=window)) > 1e-2
    assert deviation(weights_BHTS, softmax_by_hand(seen[layer][0], 8**-0.5, window=window - 1, cap=2.0)) > 1e-2 or (
        layer == 1
    )


def test_a_model_that_runs_without_soft_capping_is_observed_without() -> None:
    """sdpa has no soft-capping; where transformers allows Gemma-2 on it, observing keeps the logits."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.5, attn_implementation="eager")
    capped_TV = logits_of(model, LONG)
    model.config._attn_implementation = "sdpa"
    try:
        plain_TV = logits_of(model, LONG)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    with noting(wrap(model)) as seen:
        during_TV = logits_of(model, LONG)
    assert deviation(during_TV, plain_TV) < 1e-5
    assert deviation(capped_TV, plain_TV) > 1e-3
    assert deviation(seen[1][0].weights_BHTS, softmax_by_hand(seen[1][0], 8**-0.5)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_queries_and_keys_equal_the_models_own_after_rotation(name: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model: Any = shared_model(name)
    position_1T = torch.arange(len(LONG))[None]
    for block, reading in zip(blocks(model), observed(name), strict=True):
        attention: Any = block.self_attn
        with taps([attention.q_proj, attention.k_proj, attention.v_proj]) as made, torch.no_grad():
            logits_of(model, LONG)
            q, k, v = (x.unflatten(-1, (-1, 8)) for x in made)
            if name == "qwen3":
                q, k = attention.q_norm(q), attention.k_norm(k)
            cos, sin = model.model.rotary_emb(q, position_1T)
            rotated_q, rotated_k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        assert deviation(reading.q_BTHC, rotated_q.transpose(1, 2)) < 1e-5
        assert deviation(reading.k_BTGC, rotated_k.transpose(1, 2)) < 1e-5
        assert deviation(reading.v_BTGC, v) < 1e-5
        assert deviation(reading.q_BTHC, q) > 1e-2  # negative control: before the rotary embedding


# --- in a batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "gemma4", "llama4_chunked"])
def test_a_left_padded_row_attends_as_it_does_alone(name: str) -> None:
    model = shared_model(name)
    texts = prompts(4)
    mask_BT = torch.tensor([[0] * (24 - len(text)) + [1] * len(text) for text in texts])
    ids_BT = torch.tensor([[0] * (24 - len(text)) + list(text) for text in texts])
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    lm = wrap(model)
    with noting(lm) as seen, torch.no_grad():
        lm.last_logits(ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=False)
    for row, text in enumerate(texts):
        live = slice(24 - len(text), 24)
        for (batched,), alone in zip(seen.values(), observed(name, text), strict=True):
            weights_HTS = batched.weights_BHTS[row, :, live]
            assert batched.weights_BHTS.isfinite().all()
            assert deviation(weights_HTS[..., live], alone.weights_BHTS[0]) < 1e-5
            assert not weights_HTS[..., : 24 - len(text)].any()
            for left, right in ((batched.q_BTHC, alone.q_BTHC), (batched.k_BTGC, alone.k_BTGC)):
                assert deviation(left[row, live], right[0]) < 1e-5
            assert deviation(batched.v_BTGC[row, live], alone.v_BTGC[0]) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_in_the_engines_batch_equals_that_of_one_pass(name: str) -> None:
    """All requests enter at once, longest first, and none ends before the others: row i is request i."""
    model, n_new = shared_model(name), 6
    lm = wrap(model, stop_ids=())
    requests = [Request(f"r{i}", text, n_new) for i, text in enumerate(sorted(prompts(4), key=len, reverse=True))]
    plain = {c.id: c.token_ids for c in generate(lm, requests, batch_size=4)}
    with noting(lm) as seen:
        done = {c.id: c.token_ids for c in generate(lm, requests, batch_size=4)}
    assert done == plain
    for row, request in enumerate(requests):
        text = request.token_ids + done[request.id][:-1]
        for layer, alone in enumerate(observed(name, text)):
            prefill, *steps = seen[layer]
            assert len(steps) == n_new - 1
            for step, reading in enumerate(steps):
                last = len(request.token_ids) + step
                weights_HS = reading.weights_BHTS[row, :, 0]
                assert deviation(weights_HS[:, -last - 1 :], alone.weights_BHTS[0, :, last, : last + 1]) < 1e-5
                assert not weights_HS[:, : -last - 1].any()
                assert reading.k_BTGC.shape[1] == reading.v_BTGC.shape[1] == 1  # of the new token only
                assert deviation(reading.k_BTGC[row, 0], alone.k_BTGC[0, last]) < 1e-5
                assert deviation(reading.q_BTHC[row, 0], alone.q_BTHC[0, last]) < 1e-5
            n_prompt = len(request.token_ids)
            wanted_HTS = alone.weights_BHTS[0, :, :n_prompt, :n_prompt]
            assert deviation(prefill.weights_BHTS[row, :, -n_prompt:, -n_prompt:], wanted_HTS) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_observing_refilled_slots_changes_no_token(name: str) -> None:
    lm = wrap(shared_model(name), stop_ids=())
    requests = [Request(f"r{i}", text, 3 + 5 * (i % 3)) for i, text in enumerate(prompts(9))]
    plain = {c.id: c.token_ids for c in generate(lm, requests, batch_size=3)}
    finite: list[bool] = []
    with watch_attention(lm, [0, 2], lambda _, a: finite.append(bool(a.weights_BHTS.isfinite().all()))):
        assert {c.id: c.token_ids for c in generate(lm, requests, batch_size=3)} == plain
    assert finite
    assert all(finite)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_padding_makes_no_nan(dtype: torch.dtype) -> None:
    lm = wrap(shared_model("llama", dtype), stop_ids=())
    requests = [Request(f"r{i}", text, 4) for i, text in enumerate(prompts(4))]
    with noting(lm) as seen:
        list(generate(lm, requests, batch_size=3))
    assert all(a.weights_BHTS.isfinite().all() for layer in seen.values() for a in layer)


# --- refusals and restoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OWN, "diffllama"])
def test_unreadable_attention_is_refused_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as transformers_logging

    model = tiny_model(name)
    lm, before = wrap(model), model.config._attn_implementation
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match=r"--no-attention"), noting(lm):
            pass
    finally:
        transformers_logging.disable_propagation()
        transformers_logging.set_verbosity(verbosity)
    assert caplog.records == []
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_inside_leaves_the_model_as_it_was(failure: type[BaseException]) -> None:
    model = tiny_model("llama")
    lm, before = wrap(model), model.config._attn_implementation

    def fail(_layer: int, _attended: AttentionReading) -> None:
        raise failure

    with pytest.raises(failure), watch_attention(lm, [1], fail):
        logits_of(model, LONG)
    assert model.config._attn_implementation == before
    with noting(lm) as seen:
        logits_of(model, LONG)
    assert [len(found) for found in seen.values()] == [1, 1, 1]


def test_a_model_has_one_observer_at_a_time() -> None:
    model = tiny_model("llama")
    lm = wrap(model)
    with noting(lm) as seen:
        with pytest.raises(ModelError, match="LlamaForCausalLM"), noting(lm):
            pass
        logits_of(model, LONG)
    assert [len(found) for found in seen.values()] == [1, 1, 1]
    assert model.config._attn_implementation != ATTENTION_NAME


def test_only_the_requested_layers_are_observed() -> None:
    model = tiny_model("llama")
    with noting(wrap(model), [2]) as seen:
        logits_of(model, LONG)
    assert list(seen) == [2]
    assert deviation(seen[2][0].weights_BHTS, observed("llama")[2].weights_BHTS) == 0
    assert deviation(seen[2][0].weights_BHTS, observed("llama")[1].weights_BHTS) > 1e-2
    with (
        pytest.raises(ModelError, match=r"layer 3 .*0 to 2"),
        noting(wrap(model), [3]),
    ):
        pass


def test_two_models_with_shared_tensors_are_observed_separately() -> None:
    first = tiny_model("llama")
    second = share_weights(first)
    with noting(wrap(first)) as seen:
        logits_of(second, LONG)
        assert not any(seen.values())
        assert second.config._attn_implementation == "sdpa"
        with noting(wrap(second)) as seen_of_second:
            logits_of(second, LONG)
        logits_of(first, LONG)
    assert [len(found) for found in seen.values()] == [len(found) for found in seen_of_second.values()] == [1, 1, 1]
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


def test_the_other_towers_of_a_model_keep_their_attention() -> None:
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    text |= {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision | {"intermediate_size": 16}, mm_tokens_per_image=1)
    config.vision_config._attn_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.config.vision_config._attn_implementation = "eager"
    parts = (model.config, model.config.text_config, model.config.vision_config)
    before = [part._attn_implementation for part in parts]
    with noting(wrap(model)) as seen:
        logits_of(model, LONG)
        assert parts[2]._attn_implementation == "eager"
    assert [part._attn_implementation for part in parts] == before
    assert all((a.weights_BHTS.sum(-1) - 1).abs().max() < 1e-5 for layer in seen.values() for a in layer)
