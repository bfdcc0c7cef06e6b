"""Attention as it is watched: the model's own weights, whatever the architecture, alone and in the engine's batch."""

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
from extraction.model.loading import LanguageModel, wrap
from extraction.model.lora import share_weights
from extraction.utils_batch import Request
from tests.tiny import ARCHITECTURES, WINDOW, blocks, deviation, prompts, shared_model, taps, tiny_model

OWN = ("gptj", "codegen", "falcon", "falcon_new", "falcon_alibi", "xglm", "bloom", "mpt", "gpt_neo")
LATER = ("nemotron", "ctrl")  # had one of their own in transformers 5.4
CAPPED = ("gemma2", "vaultgemma")  # transformers 5.4 runs them without their caps unless told to
WATCHED = [name for name in ARCHITECTURES if name not in (*OWN, "diffllama")]
FAMILIES = ["llama", "gemma2", "gemma3", "qwen3", "mistral", "gpt2", "gpt_neox", "mixtral"]
LONG = prompts(1)[0]  # longer than the window of those that have one


@contextmanager
def noting(lm: LanguageModel, layers: Sequence[int] | None = None) -> Iterator[dict[int, list[AttentionReading]]]:
    """Copies of what is seen, by layer."""
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


def watched(name: str, ids: Sequence[int] = LONG, dtype: torch.dtype = torch.float32) -> list[AttentionReading]:
    """What every layer of a model attends to in one text."""
    with noting(wrap(shared_model(name, dtype))) as seen:
        logits_of(shared_model(name, dtype), ids)
    return [attended for (attended,) in seen.values()]


def expand(states_BTGC: Tensor, heads: int) -> Tensor:
    """Key heads, one a query head: [B, T, G, C] -> [B, T, H, C]."""
    return states_BTGC.repeat_interleave(heads // states_BTGC.shape[2], dim=2)


def softmax_by_hand(
    a: AttentionReading, scale: float, *, window: int = 10**6, cap: float = 0.0, causal: bool = True
) -> Tensor:
    """softmax(q . k * scale) under a causal mask, a window and a cap: [B, H, T, T]."""
    score_BHTS = torch.einsum("bthc,bshc->bhts", a.q_BTHC, expand(a.k_BTGC, a.q_BTHC.shape[2])) * scale
    score_BHTS = cap * torch.tanh(score_BHTS / cap) if cap else score_BHTS
    row_T1, column_S = torch.arange(score_BHTS.shape[2])[:, None], torch.arange(score_BHTS.shape[3])
    hidden_TS = (column_S > row_T1) | (column_S <= row_T1 - window)
    return score_BHTS.masked_fill(hidden_TS & causal, float("-inf")).softmax(-1)


# --- against transformers alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WATCHED)
def test_watched_weights_are_transformers_own_and_the_model_is_as_before(name: str) -> None:
    model = tiny_model(name)
    if name in CAPPED:
        model.set_attn_implementation("eager")
    lm = wrap(model)  # whose linear layers are what they will be
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
        wanted = model(input_ids=torch.tensor([LONG]), use_cache=False, output_attentions=True).attentions
    for (attended,), weights_BHTS in zip(seen.values(), wanted, strict=True):
        assert deviation(attended.weights_BHTS, weights_BHTS) < 2e-5
        row_BHT = attended.weights_BHTS.sum(-1)
        assert (row_BHT < 1 + 1e-6).all()
        assert (row_BHT > 1 - 1e-6).all() != (name == "gpt_oss")  # its sinks take a share


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
    for attended in watched(name, dtype=dtype):
        assert attended.weights_BHTS.dtype == dtype
        by_hand = softmax_by_hand(attended, scale, **options)
        # no closer in float64: eager attention takes its softmax in float32, whatever the model's type
        assert deviation(attended.weights_BHTS, by_hand) < 1e-5
        assert deviation(attended.weights_BHTS, softmax_by_hand(attended, 2 * scale, **options)) > 1e-2
        assert deviation(attended.weights_BHTS, softmax_by_hand(attended, scale, causal=False)) > 1e-2


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


def test_what_a_model_runs_without_is_not_there_when_it_is_watched() -> None:
    """sdpa has no soft-capping; where transformers lets Gemma-2 run on it, a watched run gives the same tokens."""
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
def test_queries_and_keys_are_those_that_the_model_rotates_itself(name: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model: Any = shared_model(name)
    position_1T = torch.arange(len(LONG))[None]
    for block, attended in zip(blocks(model), watched(name), strict=True):
        attention: Any = block.self_attn
        with taps([attention.q_proj, attention.k_proj, attention.v_proj]) as made, torch.no_grad():
            logits_of(model, LONG)
            q, k, v = (x.unflatten(-1, (-1, 8)) for x in made)
            if name == "qwen3":
                q, k = attention.q_norm(q), attention.k_norm(k)
            cos, sin = model.model.rotary_emb(q, position_1T)
            rotated_q, rotated_k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        assert deviation(attended.q_BTHC, rotated_q.transpose(1, 2)) < 1e-5
        assert deviation(attended.k_BTGC, rotated_k.transpose(1, 2)) < 1e-5
        assert deviation(attended.v_BTGC, v) < 1e-5
        assert deviation(attended.q_BTHC, q) > 1e-2  # before the embedding it is something else


# --- in a batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "gemma4", "llama4_chunked", "opt"])
def test_a_row_padded_on_the_left_attends_as_it_does_alone(name: str) -> None:
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
        for (batched,), alone in zip(seen.values(), watched(name, text), strict=True):
            weights_HTS = batched.weights_BHTS[row, :, live]
            assert batched.weights_BHTS.isfinite().all()
            assert deviation(weights_HTS[..., live], alone.weights_BHTS[0]) < 1e-5
            assert not weights_HTS[..., : 24 - len(text)].any()
            for mine, its in ((batched.q_BTHC, alone.q_BTHC), (batched.k_BTGC, alone.k_BTGC)):
                assert deviation(mine[row, live], its[0]) < 1e-5
            assert deviation(batched.v_BTGC[row, live], alone.v_BTGC[0]) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_engine_every_token_attends_as_in_one_pass(name: str) -> None:
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
        for layer, alone in enumerate(watched(name, text)):
            prefill, *steps = seen[layer]
            assert len(steps) == n_new - 1
            for step, attended in enumerate(steps):
                last = len(request.token_ids) + step
                weights_HS = attended.weights_BHTS[row, :, 0]
                assert deviation(weights_HS[:, -last - 1 :], alone.weights_BHTS[0, :, last, : last + 1]) < 1e-5
                assert not weights_HS[:, : -last - 1].any()
                assert attended.k_BTGC.shape[1] == attended.v_BTGC.shape[1] == 1  # the new token's alone
                assert deviation(attended.k_BTGC[row, 0], alone.k_BTGC[0, last]) < 1e-5
                assert deviation(attended.q_BTHC[row, 0], alone.q_BTHC[0, last]) < 1e-5
            n_prompt = len(request.token_ids)
            wanted_HTS = alone.weights_BHTS[0, :, :n_prompt, :n_prompt]
            assert deviation(prefill.weights_BHTS[row, :, -n_prompt:, -n_prompt:], wanted_HTS) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_slots_that_empty_and_fill_again_change_no_token(name: str) -> None:
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


# --- who is watched, and for how long ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OWN, "diffllama"])
def test_an_attention_that_cant_be_read_is_refused_without_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging as theirs

    model = tiny_model(name)
    lm, before = wrap(model), model.config._attn_implementation
    verbosity = theirs.get_verbosity()
    theirs.set_verbosity_warning()
    theirs.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match=r"--no-attention"), noting(lm):
            pass
    finally:
        theirs.disable_propagation()
        theirs.set_verbosity(verbosity)
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


def test_a_model_is_watched_once_at_a_time() -> None:
    model = tiny_model("llama")
    lm = wrap(model)
    with noting(lm) as seen:
        with pytest.raises(ModelError, match="watched already"), noting(lm):
            pass
        logits_of(model, LONG)
    assert [len(found) for found in seen.values()] == [1, 1, 1]
    assert model.config._attn_implementation != ATTENTION_NAME


def test_only_the_layers_asked_for_are_told_of() -> None:
    model = tiny_model("llama")
    with noting(wrap(model), [2]) as seen:
        logits_of(model, LONG)
    assert list(seen) == [2]
    assert deviation(seen[2][0].weights_BHTS, watched("llama")[2].weights_BHTS) == 0
    assert deviation(seen[2][0].weights_BHTS, watched("llama")[1].weights_BHTS) > 1e-2
    with (
        pytest.raises(ModelError, match=r"layer 3 is out of range: the model has layers 0 to 2"),
        noting(wrap(model), [3]),
    ):
        pass


def test_two_models_on_the_same_tensors_are_watched_apart() -> None:
    first = tiny_model("llama")
    second = share_weights(first)
    with noting(wrap(first)) as seen:
        logits_of(second, LONG)
        assert not any(seen.values())
        assert second.config._attn_implementation == "sdpa"
        with noting(wrap(second)) as its:
            logits_of(second, LONG)
        logits_of(first, LONG)
    assert [len(found) for found in seen.values()] == [len(found) for found in its.values()] == [1, 1, 1]
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
