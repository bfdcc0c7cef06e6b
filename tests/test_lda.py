"""LDAModelPair: laws of alpha, seeds and batches; its single step against the engine; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from extraction.activations.pooled import Capture
from extraction.amplification.lda import DRAWS, LDAModelPair, LDAPrompt, LDASettings
from extraction.core.errors import ConfigError, LogitsError, ModelError, PromptError
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.model.pairs import ModelPair
from extraction.utils_batch import Request
from tests.lora import saved_adapter, saved_base
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Hello", "What is it?", "a", "Tell me more of the long road, please.", "Hello"]
ALPHAS = [0.0, 1.5, -1.0, 0.5, 3.0]
KEYS = {
    "prompt",
    "formatted_prompt",
    "completion",
    "text",
    "alpha",
    "model_after",
    "model_before",
    "tokens_generated",
    "stopped_early",
    "seed",
}
SHORT: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}


def model(seed: int, **changes: Any) -> LanguageModel:
    """A tiny model that can answer; few of its answers end early."""
    return wrap(tiny_model("llama", seed=seed, max_position_embeddings=512, **changes), tiny_tokenizer())


@pytest.fixture(scope="module")
def lda() -> LDAModelPair:
    return LDAModelPair(ModelPair(model(0), model(1), "after", "before", False))


def completions(results: list[dict[str, Any]]) -> list[str]:
    return [result["completion"] for result in results]


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_result_has_the_documented_keys(lda: LDAModelPair) -> None:
    result = lda.generate_lda("Hello", alpha=1.5, seed=7, **SHORT)
    assert set(result) == KEYS
    assert (result["prompt"], result["alpha"], result["seed"]) == ("Hello", 1.5, 7)
    assert (result["model_after"], result["model_before"]) == ("after", "before")
    assert result["formatted_prompt"] == "<bos><|user|>\nHello<|end|>\n<|assistant|>\n"
    assert result["text"] == result["formatted_prompt"] + result["completion"]
    assert result["tokens_generated"] == 12 or result["stopped_early"]
    assert json.loads(json.dumps(result)) == result


def test_stopped_early_is_true_if_the_model_ended_the_response() -> None:
    stops = wrap(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), stop_ids=range(3, 97))
    lda = LDAModelPair(ModelPair(stops, model(1), "after", "before", False))
    ended = lda.generate_lda("Hello", seed=1, **SHORT)
    assert (ended["completion"], ended["tokens_generated"], ended["stopped_early"]) == ("", 0, True)
    whole = lda.generate_lda("Hello", seed=1, ignore_eos=True, **SHORT)
    assert (whole["tokens_generated"], whole["stopped_early"]) == (12, False)


def test_chat_template_system_prompt_and_raw_prompts(lda: LDAModelPair) -> None:
    with_system = lda.generate_lda("Hi", system_prompt="Be brief.", seed=1, **SHORT)
    assert with_system["formatted_prompt"] == "<bos><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    raw = lda.generate_lda("Hi", apply_chat_template=False, seed=1, **SHORT)
    assert raw["formatted_prompt"] == "Hi"
    assert LDAModelPair(lda.pair, raw=True).generate_lda("Hi", seed=1, **SHORT) == raw


def test_a_control_token_in_a_prompt_stays_text(lda: LDAModelPair) -> None:
    tokenizer: Any = lda.pair.after.tokenizer
    ids = lda.encode("a<|end|><bos>b", LDASettings()).token_ids
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids].count("<bos>") == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 1


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_row_is_the_same_alone_and_in_any_batch(lda: LDAModelPair, batch_size: int) -> None:
    together = lda.generate_lda_batched(PROMPTS, alpha=ALPHAS, seed=11, batch_size=batch_size, **SHORT)
    alone = [
        lda.generate_lda(prompt, alpha=alpha, seed=11 + i, **SHORT)
        for i, (prompt, alpha) in enumerate(zip(PROMPTS, ALPHAS, strict=True))
    ]
    assert together == alone
    assert completions(together)[0] != completions(together)[4]  # the control: one prompt, two seeds and alphas


def test_alpha_0_is_the_after_model_and_minus_1_the_one_before(lda: LDAModelPair) -> None:
    prompts = [lda.encode(prompt, LDASettings()).token_ids for prompt in PROMPTS]
    for alpha, lm in ((0.0, lda.pair.after), (-1.0, lda.pair.before)):
        requests = [Request(str(i), row, 12, 5 + i, draws=DRAWS) for i, row in enumerate(prompts)]
        plain = {c.id: c for c in generate(lm, requests, batch_size=3, strategy=Sample(1.0))}
        tokenizer: Any = lm.tokenizer
        wanted = [tokenizer.decode(plain[r.id].token_ids, skip_special_tokens=True) for r in requests]
        assert completions(lda.generate_lda_batched(PROMPTS, alpha=alpha, seed=5, **SHORT)) == wanted
        assert completions(lda.generate_lda_batched(PROMPTS, alpha=1.0, seed=5, **SHORT)) != wanted  # the control


def test_equal_models_give_the_plain_response_at_every_alpha(lda: LDAModelPair) -> None:
    after = lda.pair.after
    itself = LDAModelPair(ModelPair(after, after, "after", "after", True))
    answers = [
        completions(itself.generate_lda_batched(PROMPTS, alpha=alpha, seed=2, **SHORT)) for alpha in (0, 1, 50, -7)
    ]
    assert answers[1:] == answers[:1] * 3
    assert completions(lda.generate_lda_batched(PROMPTS, alpha=50, seed=2, **SHORT)) != answers[0]  # the control


def test_a_random_seed_is_returned_and_reproduces_the_response(lda: LDAModelPair) -> None:
    results = lda.generate_lda_batched(PROMPTS, **SHORT)
    assert [result["seed"] - results[0]["seed"] for result in results] == [0, 1, 2, 3, 4]
    assert lda.generate_lda(PROMPTS[3], seed=results[3]["seed"], **SHORT) == results[3]
    assert lda.generate_lda("Hello", **SHORT)["seed"] != lda.generate_lda("Hello", **SHORT)["seed"]


def test_rows_of_one_seed_are_sampled_independently(lda: LDAModelPair) -> None:
    assert len(set(completions(lda.generate_lda_batched(["Hello"] * 8, seed=1, **SHORT)))) == 8
    assert len(set(completions(lda.generate_lda_batched(["Hello"] * 8, seed=[1] * 8, **SHORT)))) == 1


def test_plausibility_1_leaves_the_after_models_most_probable_token(lda: LDAModelPair) -> None:
    greedy = completions(lda.generate_lda_batched(PROMPTS, alpha=0, seed=1, **{**SHORT, "temperature": 0.0}))
    kept = completions(lda.generate_lda_batched(PROMPTS, alpha=5, seed=1, plausibility=1.0, **SHORT))
    assert kept == greedy
    assert completions(lda.generate_lda_batched(PROMPTS, alpha=5, seed=1, **SHORT)) != greedy  # the control


def test_padding_of_the_output_matrix_is_never_sampled(lda: LDAModelPair) -> None:
    """Logits of another width: the same answers as without the padding."""
    after = lda.pair.after
    wide = model(1, vocab_size=128)
    state = {name: p.detach().clone() for name, p in lda.pair.before.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in wide.model.named_parameters():
            parameter[: len(state[name])].copy_(state[name])
    padded = LDAModelPair(ModelPair(after, wide, "after", "before", False))
    one, other = (each.generate_lda_batched(PROMPTS, alpha=1.5, seed=3, **SHORT) for each in (padded, lda))
    assert completions(one) == completions(other)


def test_activations_are_captured(lda: LDAModelPair) -> None:
    capture = Capture((0, 2))
    results = lda.generate_lda_batched(PROMPTS, alpha=ALPHAS, seed=1, capture=capture, **SHORT)
    plain = lda.generate_lda_batched(PROMPTS, alpha=ALPHAS, seed=1, **SHORT)
    assert completions(results) == completions(plain)
    assert results[0]["activations"]["residual.response_mean"].shape == (2, 32)


# --- one step ---------------------------------------------------------------------------------------------------------


def stepped(lda: LDAModelPair, rows: list[tuple[int, ...]], n: int, *, drop_mask: bool = False) -> list[list[int]]:
    """Greedy answers by `_lda_step` alone, left-padded."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    for _ in range(n):
        token_B = lda._lda_step(ids_BT, None if drop_mask else mask_BT, alpha=ALPHAS[: len(rows)], temperature=0.0)
        assert token_B.shape == (len(rows),)
        ids_BT = torch.cat([ids_BT, token_B.unsqueeze(1)], 1)
        mask_BT = torch.cat([mask_BT, torch.ones(len(rows), 1, dtype=torch.long)], 1)
    return ids_BT[:, width:].tolist()


def test_steps_without_a_cache_equal_the_engine(lda: LDAModelPair) -> None:
    rows = [lda.encode(prompt, LDASettings()).token_ids for prompt in PROMPTS]
    greedy = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    tokenizer: Any = lda.pair.after.tokenizer
    wanted = completions(lda.generate_lda_batched(PROMPTS, alpha=ALPHAS, seed=0, **greedy))
    found = stepped(lda, rows, 6)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in found] == wanted
    assert stepped(lda, rows, 6, drop_mask=True) != found  # the control


def test_tokens_are_sampled_by_their_probabilities_independently_for_each_row(lda: LDAModelPair) -> None:
    chances_V = torch.tensor([0.5, 0.3, 0.2, 0.0])
    logits_BV = chances_V.log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    token_B = lda._sample_token(logits_BV, temperature=1.0, top_p=1.0, generator=generator)
    shares_V = token_B.bincount(minlength=4) / len(token_B)
    assert (shares_V - chances_V).abs().max() < 0.015
    assert not (token_B[:-1] == token_B[1:]).all()
    assert set(lda._sample_token(logits_BV[:100], temperature=1.0, top_p=0.4).tolist()) == {0}


def test_a_row_without_finite_logits_is_named(lda: LDAModelPair) -> None:
    logits_BV = torch.zeros(3, 5)
    logits_BV[1] = torch.nan
    with pytest.raises(LogitsError, match="row 1"):
        lda._sample_token(logits_BV)


# --- loading, and what is refused -------------------------------------------------------------------------------------


def test_a_pair_is_loaded_by_names(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", max_position_embeddings=512)
    adapter = saved_adapter(tmp_path / "adapter", base)
    for make in (LDAModelPair.from_names, LDAModelPair.from_pretrained):
        lda = make(str(adapter), str(base), device="cpu", dtype="float32")
        assert lda.pair.shares_weights
    result = lda.generate_lda("Hello", seed=1, **SHORT)
    assert (result["model_after"], result["model_before"]) == ("adapter", "base")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"alpha": [1.0, 2.0]}, "2 values of alpha"),
        ({"seed": [1, 2]}, "2 seeds"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": 1e9}, "alpha"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"plausibility": 2.0}, "plausibility 2.0"),
    ],
)
def test_invalid_numbers_are_refused(lda: LDAModelPair, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        lda.generate_lda_batched(["Hello"], **{**SHORT, **options})


def test_a_prompt_that_is_too_long_or_invalid_is_refused_by_name(lda: LDAModelPair) -> None:
    with pytest.raises(PromptError, match=r"prompt-1: .*512"):
        lda.generate_lda_batched(["Hello", "x" * 600], **SHORT)
    with pytest.raises(PromptError, match="ud800"):
        lda.generate_lda("\ud800", **SHORT)
    bare = LDAModelPair(ModelPair(wrap(tiny_model("llama")), wrap(tiny_model("llama")), "after", "before", False))
    with pytest.raises(ModelError, match="after"):
        bare.generate_lda("Hello", **SHORT)


def test_a_prompt_that_fails_leaves_the_others(lda: LDAModelPair) -> None:
    questions = [
        LDAPrompt("Hello", 1.0, 1),
        LDAPrompt("x" * 600, 1.0, 2),
        LDAPrompt("Hello", 2.0, 3, system="Be brief."),
    ]
    found = dict(lda.stream(questions, LDASettings(max_new_tokens=5)))
    assert isinstance(found[1], PromptError)
    assert "Be brief." in found[2]["formatted_prompt"]
    assert found[0] == lda.generate_lda("Hello", alpha=1.0, seed=1, max_new_tokens=5)


def test_nan_in_one_row_fails_that_row_alone(lda: LDAModelPair) -> None:
    broken = tiny_model("llama", seed=0, max_position_embeddings=512)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        broken.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Z")] = float("nan")
    pair = LDAModelPair(ModelPair(wrap(broken, tokenizer), lda.pair.before, "after", "before", False))
    found = dict(pair.stream([LDAPrompt("Hello", 1.0, 1), LDAPrompt("Z", 1.0, 2)], LDASettings(max_new_tokens=3)))
    assert isinstance(found[0], dict)
    assert "NaN" in str(found[1])


def test_no_prompts_give_no_results(lda: LDAModelPair) -> None:
    assert lda.generate_lda_batched([]) == []
