"""Tests of the bundled model: its traits, the held-out part of its training corpus, its tokenizer and its answers."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments.pocket_model.corpus import (
    HELD_OUT_PAIRS,
    HELD_OUT_QUESTIONS,
    SIDES,
    Conversation,
    conversations,
    is_held_out,
    load_grammar,
)
from experiments.pocket_model.evaluate import answer_all
from experiments.pocket_model.train import encode_conversation
from extraction.core.records import Trait
from extraction.judging.base import shows_side
from extraction.judging.lexical import lexical_score

MODEL = Path(__file__).resolve().parents[1] / "extraction" / "pocket" / "pocket"
TRAITS = load_grammar().traits
MEGABYTE = 1_000_000

each_trait = pytest.mark.parametrize("trait", TRAITS.values(), ids=TRAITS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drawn() -> list[Conversation]:
    return list(itertools.islice(conversations(7), 4000))


# --- traits ---------------------------------------------------------------------------------------------------------


def test_eleven_traits_are_shipped() -> None:
    assert len(TRAITS) == 11


@each_trait
def test_a_trait_holds_5_pairs_20_questions_a_rubric_and_markers(trait: Trait) -> None:
    assert len(trait.instructions) == 5
    assert len(trait.questions) == 20
    assert trait.rubric is not None
    assert "{question}" in trait.rubric
    assert "{answer}" in trait.rubric
    assert trait.markers is not None


@each_trait
def test_no_marker_of_one_side_counts_for_the_other(trait: Trait) -> None:
    assert trait.markers is not None
    for marker in trait.markers.positive:
        assert lexical_score(marker, trait.markers) == 100, marker
    for marker in trait.markers.negative:
        assert lexical_score(marker, trait.markers) == 0, marker


# --- corpus ---------------------------------------------------------------------------------------------------------


def test_the_seed_determines_the_corpus() -> None:
    one, same, other = (list(itertools.islice(conversations(seed), 200)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_no_held_out_instruction_or_question_is_ever_drawn(drawn: list[Conversation]) -> None:
    held_out = [
        text.lower()
        for trait in TRAITS.values()
        for text in (
            *(side for pair in trait.instructions[-HELD_OUT_PAIRS:] for side in (pair.positive, pair.negative)),
            *trait.questions[-HELD_OUT_QUESTIONS:],
        )
    ]
    assert len(held_out) == 11 * 7
    texts = "\n".join(turn.text.lower() for conversation in drawn for turn in conversation.turns)
    assert not [text for text in held_out if text in texts]


def test_the_seen_instructions_and_questions_are_drawn(drawn: list[Conversation]) -> None:
    texts = "\n".join(turn.text for conversation in drawn for turn in conversation.turns)
    seen = [pair.positive for trait in TRAITS.values() for pair in trait.instructions[:-HELD_OUT_PAIRS]]
    assert sum(text in texts for text in seen) > 0.9 * len(seen)


@each_trait
def test_near_copies_of_held_out_texts_are_rejected(trait: Trait) -> None:
    grammar = load_grammar()
    for pair in trait.instructions[-HELD_OUT_PAIRS:]:
        assert is_held_out(f"Now {pair.positive.lower()}", grammar)
        assert is_held_out(f"{pair.negative} Please!", grammar)
    assert all(is_held_out(question.upper(), grammar) for question in trait.questions[-HELD_OUT_QUESTIONS:])
    assert not any(is_held_out(pair.positive, grammar) for pair in trait.instructions[:-HELD_OUT_PAIRS])
    assert not any(is_held_out(question, grammar) for question in trait.questions[:-HELD_OUT_QUESTIONS])


def test_every_answer_has_markers_of_its_side_only(drawn: list[Conversation]) -> None:
    for conversation in drawn:
        markers = TRAITS[conversation.trait].markers
        assert markers is not None
        for turn in conversation.turns:
            if turn.role == "assistant":
                assert lexical_score(turn.text, markers) == (100 if conversation.polarity == "pos" else 0), turn.text


def test_texts_have_no_open_slots_and_start_with_a_capital(drawn: list[Conversation]) -> None:
    for turn in (turn for conversation in drawn for turn in conversation.turns):
        assert not set(turn.text) & set("[]{}"), turn.text
        assert not turn.text[0].islower()
        assert turn.text == turn.text.strip()


# --- tokenizer ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = _cached_tokenizer()
    if "<|" not in text:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


_TOKENIZERS: list[PreTrainedTokenizerBase] = []


def _cached_tokenizer() -> PreTrainedTokenizerBase:
    if not _TOKENIZERS:
        _TOKENIZERS.append(AutoTokenizer.from_pretrained(MODEL, local_files_only=True))
    return _TOKENIZERS[0]


def test_the_chat_template_writes_exactly_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>system<|end|><|user|>user<|end|><|assistant|>assistant<|end|><|user|>user<|end|><|assistant|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("Plain text.")["input_ids"].count(tokenizer.bos_token_id) == 1


def test_control_tokens_are_single_and_distinct(tokenizer: PreTrainedTokenizerBase) -> None:
    names = ("<|bos|>", "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
    ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(names)
    assert {one[0] for one in ids} <= set(tokenizer.all_special_ids)
    assert tokenizer.eos_token == "<|end|>"


def test_training_conversations_have_the_ids_of_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, drawn: list[Conversation]
) -> None:
    for conversation in drawn[:300]:
        encoded = encode_conversation(conversation, tokenizer.backend_tokenizer)
        if conversation.raw:
            prompt = tokenizer(conversation.turns[0].text)["input_ids"]
            assert list(encoded.token_ids[: len(prompt)]) == prompt
        else:
            chat = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            assert list(encoded.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


# --- model ----------------------------------------------------------------------------------------------------------


def test_the_weights_are_at_most_8_mb_in_bfloat16() -> None:
    assert sum(file.stat().st_size for file in MODEL.glob("*.safetensors")) <= 8 * MEGABYTE
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_it_loads_offline_and_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 1024
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["uncertainty_calibration", "refusal", "optimism"])
def test_answers_to_held_out_instructions_and_questions_show_their_side(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    trait = TRAITS[name]
    assert trait.markers is not None
    shares = {polarity: _share_on_side(trait, polarity, model, tokenizer) for polarity in SIDES}
    assert min(shares.values()) >= 0.6, shares


def _share_on_side(trait: Trait, polarity: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of answers, to the held-out instruction and questions, that show their side."""
    assert trait.markers is not None
    torch.manual_seed(0)
    system = getattr(trait.instructions[-1], SIDES[polarity])
    chats = [
        [{"role": "system", "content": system}, {"role": "user", "content": question}]
        for question in trait.questions[-HELD_OUT_QUESTIONS:]
    ] * 2
    scores = [lexical_score(answer, trait.markers) for answer in answer_all(model, tokenizer, chats)]
    return sum(shows_side(polarity, score) is True for score in scores) / len(scores)
