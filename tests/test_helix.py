"""Tests of batch_speculative_generate and HelixEngine: responses, times and statistics of each prompt."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraction.amplification.helix import (
    GenerationConfig,
    HelixEngine,
    batch_speculative_generate,
    create_attention_mask,
    pad_sequences,
)
from extraction.core.errors import ConfigError, ModelError, PromptError
from extraction.model.loading import wrap
from tests.tiny import reference_greedy, shared_model, tiny_model, tiny_tokenizer
from tests.two_models import noisy_model

PROMPTS = ("What is AI?", "Explain ML", "Define NN", "x", "Why is the sky blue, and the sea?")
KEYS = {"text", "tokens", "num_tokens", "time_seconds", "tokens_per_second", "time_to_first_token", "stats"}
STATS = {"total_steps", "acceptance_rates", "avg_acceptance_rate"}


@cache
def models() -> tuple[Any, Any, Any]:
    """Draft, target, and a tokenizer without a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return noisy_model("llama"), shared_model("llama"), tokenizer


def wanted(n: int, prompts: Sequence[str] = PROMPTS) -> list[tuple[int, ...]]:
    """Return transformers' greedy response to each prompt alone."""
    _, target, tokenizer = models()
    lm = wrap(target, tokenizer)
    return [reference_greedy(target, tokenizer(prompt)["input_ids"], n, lm.stop_ids) for prompt in prompts]


# --- batch_speculative_generate --------------------------------------------------------------------------------------


def test_the_signature_is_the_documented_one() -> None:
    parameters = list(inspect.signature(batch_speculative_generate).parameters.values())
    asked = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    empty = inspect.Parameter.empty
    assert asked == [
        ("draft_model", empty),
        ("target_model", empty),
        ("tokenizer", empty),
        ("prompts", empty),
        ("max_tokens", 50),
        ("temperature", 0.7),
        ("speculation_depth", 4),
    ]


@pytest.mark.parametrize("with_draft", [True, False], ids=["draft", "lookup"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_greedy_answers_are_the_targets_own_each_in_its_place(with_draft: bool, batch_size: int | None) -> None:
    draft, target, tokenizer = models()
    results = batch_speculative_generate(
        draft if with_draft else None, target, tokenizer, list(PROMPTS), 12, 0.0, batch_size=batch_size
    )
    assert [tuple(result["tokens"]) for result in results] == wanted(12)
    for result in results:
        assert set(result) == KEYS
        assert set(result["stats"]) == STATS
        assert result["num_tokens"] == len(result["tokens"])
        assert result["text"] == tokenizer.decode(result["tokens"], skip_special_tokens=True)
        assert result["tokens_per_second"] == pytest.approx(result["num_tokens"] / result["time_seconds"])


def test_figures_account_for_the_tokens() -> None:
    draft, target, tokenizer = models()
    seen = set()
    for result in batch_speculative_generate(draft, target, tokenizer, list(PROMPTS), 20, 0.0):
        stats = result["stats"]
        assert all(0.0 <= rate <= 1.0 for rate in stats["acceptance_rates"])
        assert 0 < len(stats["acceptance_rates"]) <= stats["total_steps"] <= result["num_tokens"] + 1
        assert min(stats["acceptance_rates"]) <= stats["avg_acceptance_rate"] <= max(stats["acceptance_rates"])
        seen |= set(stats["acceptance_rates"])
    assert len(seen) > 1
    for result in batch_speculative_generate(target, target, tokenizer, list(PROMPTS), 20, 0.0):
        assert set(result["stats"]["acceptance_rates"]) == {1.0}
        assert result["stats"]["avg_acceptance_rate"] == 1.0
        assert result["stats"]["total_steps"] < 15


def test_times_are_the_prompts_own() -> None:
    """With one place for three prompts, the later ones wait: their first tokens come later, in turn."""
    draft, target, tokenizer = models()
    started = time.perf_counter()
    results = batch_speculative_generate(draft, target, tokenizer, list(PROMPTS[:3]), 20, 0.0, batch_size=1)
    took = time.perf_counter() - started
    spans = sorted((result["time_to_first_token"], result["time_seconds"]) for result in results)
    assert all(0 < first < last < took for first, last in spans)
    assert all(end < begin for (_, end), (begin, _) in pairwise(spans))


def test_in_one_batch_every_first_token_precedes_every_last_one() -> None:
    draft, target, tokenizer = models()
    results = batch_speculative_generate(draft, target, tokenizer, list(PROMPTS), 20, 0.0)
    assert max(r["time_to_first_token"] for r in results) < min(r["time_seconds"] for r in results)


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch() -> None:
    draft, target, tokenizer = models()

    def said(**options: Any) -> list[list[int]]:
        return [r["tokens"] for r in batch_speculative_generate(draft, target, tokenizer, PROMPTS, 15, 1.0, **options)]

    first = said()
    assert first == said(batch_size=2) == said(batch_size=1)
    assert first != said(seed=1)
    assert first != said(top_k=3)
    assert first != said(top_p=0.3)


def test_the_same_prompt_twice_is_answered_twice() -> None:
    draft, target, tokenizer = models()
    one, other = batch_speculative_generate(draft, target, tokenizer, ["Tell me", "Tell me"], 15, 1.0)
    assert one["tokens"] != other["tokens"]
    one, other = batch_speculative_generate(draft, target, tokenizer, ["Tell me", "Tell me"], 15, 0.0)
    assert one["tokens"] == other["tokens"]


def test_rows_stop_by_themselves_at_a_stop_token_and_at_a_stop_string() -> None:
    draft, target, tokenizer = models()
    unstopped = wanted(12)
    stop = tokenizer.decode(list(unstopped[0][3:5]))
    cut = batch_speculative_generate(draft, target, tokenizer, PROMPTS, 12, 0.0, stop=(stop,))
    assert tuple(cut[0]["tokens"]) == unstopped[0][:5]
    lm = wrap(target, tokenizer, stop_ids=(unstopped[1][2], unstopped[2][0]))
    engine = HelixEngine(lm, draft)
    results = engine.batch_generate(PROMPTS, GenerationConfig(max_tokens=12, temperature=0.0))
    assert tuple(results[1]["tokens"]) == unstopped[1][:2]
    empty = results[2]
    assert (empty["text"], empty["num_tokens"], empty["time_to_first_token"], empty["tokens_per_second"]) == (
        "",
        0,
        None,
        0.0,
    )


def test_prompts_go_through_the_chat_template_unless_raw() -> None:
    draft, target, plain = models()
    chat, options = tiny_tokenizer(), ([*PROMPTS], 12, 0.0)
    rendered = [
        chat.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in PROMPTS
    ]

    def answers(tokenizer: Any, **more: Any) -> list[tuple[int, ...]]:
        return [tuple(r["tokens"]) for r in batch_speculative_generate(draft, target, tokenizer, *options, **more)]

    assert answers(chat) == wanted(12, rendered) != wanted(12)
    assert answers(chat, raw=True) == answers(plain) == answers(plain, raw=True) == wanted(12)
    greedy = GenerationConfig(max_tokens=12, temperature=0.0)
    engines = (HelixEngine(target, draft, tokenizer=chat, raw=raw) for raw in (False, True))
    assert [tuple(engine.batch_generate(PROMPTS, greedy)[0]["tokens"]) for engine in engines] == [
        wanted(12, rendered)[0],
        wanted(12)[0],
    ]


def test_no_prompts_are_no_answers() -> None:
    draft, target, tokenizer = models()
    assert batch_speculative_generate(draft, target, tokenizer, []) == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens 0"),
        ({"batch_size": 0}, ConfigError, "batch_size 0"),
        ({"temperature": -1.0}, ConfigError, "temperature -1.0"),
        ({"speculation_depth": 0}, ConfigError, "depth 0"),
        ({"top_p": 0.0}, ConfigError, "top_p 0.0"),
        ({"seed": -1}, ConfigError, "seed -1"),
        ({"max_tokens": 500}, PromptError, "128"),
    ],
)
def test_invalid_options_are_refused_in_one_line(options: dict[str, Any], error: Any, words: str) -> None:
    draft, target, tokenizer = models()
    with pytest.raises(error, match=words) as caught:
        batch_speculative_generate(draft, target, tokenizer, ["fine"], **options)
    assert "\n" not in str(caught.value)


def test_a_prompt_without_tokens_is_named_by_its_place() -> None:
    draft, target, tokenizer = models()
    with pytest.raises(PromptError, match="prompt 1"):
        batch_speculative_generate(draft, target, tokenizer, ["fine", ""])


def test_another_vocabulary_is_refused() -> None:
    _, target, tokenizer = models()
    with pytest.raises(ModelError, match="50"):
        batch_speculative_generate(tiny_model("gpt2", vocab_size=50), target, tokenizer, ["fine"])


# --- HelixEngine -----------------------------------------------------------------------------------------------------


def test_an_engine_answers_as_the_function_does() -> None:
    draft, target, tokenizer = models()
    engine = HelixEngine(target, draft, tokenizer=tokenizer)
    config = GenerationConfig(max_tokens=9, temperature=0.9, top_k=20, top_p=0.9, seed=4, speculation_depth=2)
    results = engine.batch_generate(PROMPTS, config)
    same = batch_speculative_generate(draft, target, tokenizer, PROMPTS, 9, 0.9, 2, top_k=20, top_p=0.9, seed=4)
    assert [r["tokens"] for r in results] == [r["tokens"] for r in same]
    assert max(r["num_tokens"] for r in engine.batch_generate(PROMPTS)) == 50, "the default"


def test_an_engine_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        HelixEngine(shared_model("llama"))


# --- padding ---------------------------------------------------------------------------------------------------------


def test_padding_stands_on_the_left_where_a_decoder_wants_it() -> None:
    rows = [[5, 6, 7], [8], []]
    assert pad_sequences(rows, 9).tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]]
    assert pad_sequences(rows, 9, side="right").tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert create_attention_mask([3, 1, 0]).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert create_attention_mask([3, 1, 0], side="right").tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert pad_sequences([]).shape == create_attention_mask([]).shape == (0, 0)
    assert pad_sequences([[], []]).shape == (2, 0)


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), st.sampled_from(["left", "right"]))
def test_padded_rows_are_recovered_by_the_mask_also_with_a_pad_id_in_the_text(rows: Any, side: str) -> None:
    padded_BT, mask_BT = pad_sequences(rows, 0, side=side), create_attention_mask(list(map(len, rows)), side=side)
    assert padded_BT.shape == mask_BT.shape
    assert {padded_BT.dtype, mask_BT.dtype} == {torch.long}
    kept = [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(padded_BT, mask_BT, strict=True)]
    assert kept == rows


@pytest.mark.parametrize("do", [lambda: pad_sequences([[1]], side="up"), lambda: create_attention_mask([1], side="up")])
def test_another_side_is_refused(do: Any) -> None:
    with pytest.raises(ConfigError, match="'up'"):
        do()
