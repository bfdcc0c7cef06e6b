"""The likelihood judge: the run's model compares the instructions of the other pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from extraction.core.errors import ConfigError, TraitError
from extraction.core.records import Example, InstructionPair, Prompt, Trait
from extraction.judging.base import JudgedResponse
from extraction.judging.likelihood import JUDGE, SCALE, contrasts, score_of
from extraction.judging.registry import resolve_judge
from extraction.model.chat_template import encode_example
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from tests.runs import demo_rows, make_root, succeed
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = (("Be calm.", "Be wild."), ("Stay still now", "Run about!"), ("Softly", "LOUD"))
TRAIT = Trait("calm", "", tuple(InstructionPair(*pair) for pair in PAIRS), ("Why?", "Who is it?"))
RESPONSES = (
    JudgedResponse("Why?", "Because it is so", 0),
    JudgedResponse("Who is it?", "me", 2),
    JudgedResponse("Why?", "", 1),
    JudgedResponse("Why?", "No pair made this one", None),
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())


def encoder(lm: LanguageModel):
    def encode(examples: list[Example]) -> list[Prompt]:
        return [encode_example(lm.tokenizer, example) for example in examples]

    return encode


def reference(lm: LanguageModel, response: JudgedResponse, pairs: list[int]) -> float:
    """Compute the contrast one text at a time, with transformers alone, in nats a token."""
    ids = lm.tokenizer(response.text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for sign, side in ((1, 0), (-1, 1)):
        for k in pairs:
            chat = [{"role": "system", "content": PAIRS[k][side]}, {"role": "user", "content": response.question}]
            text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p_TV = lm.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            total += sign * sum(float(log_p_TV[len(prompt) - 1 + t, token]) for t, token in enumerate(ids))
    return total / len(pairs) / len(ids)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_contrast_is_that_of_the_other_pairs_by_transformers(lm: LanguageModel, batch_size: int) -> None:
    found = dict(contrasts(lm, encoder(lm), TRAIT, RESPONSES, batch_size))
    wanted = {0: [1, 2], 1: [0, 1], 3: [0, 1, 2]}  # an empty response has none
    assert found.keys() == wanted.keys()
    for i, pairs in wanted.items():
        assert found[i] == pytest.approx(reference(lm, RESPONSES[i], pairs), abs=1e-5)
    with_own = reference(lm, RESPONSES[0], [0, 1, 2])
    assert abs(found[0] - with_own) > 1e-3  # a negative control: the response's own pair would count


def test_the_score_is_a_logistic_of_the_contrast() -> None:
    assert score_of(0.0) == 50.0
    assert score_of(0.1) == pytest.approx(100 / (1 + math.exp(-SCALE * 0.1)))
    assert score_of(1e9) == 100.0
    assert score_of(-1e9) < 1e-9


def test_a_response_longer_than_the_context_is_judged_by_its_beginning(lm: LanguageModel) -> None:
    long = JudgedResponse("Why?", "word " * 200, 0)
    assert dict(contrasts(lm, encoder(lm), TRAIT, [long], 2)).keys() == {0}


def test_a_trait_with_a_single_pair_or_none_is_refused() -> None:
    for pairs in ((), TRAIT.instructions[:1]):
        with pytest.raises(TraitError, match="trait calm"):
            JUDGE.check(Trait("calm", "", pairs, ("Why?",)))
    assert resolve_judge("likelihood", TRAIT) == "likelihood"


def test_a_run_is_judged_by_its_own_model_once_and_its_log_is_read_again(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    options = ("--root", str(root), "--experiment", "demo", "--judge", "likelihood")
    assert "likelihood judge" in succeed("batched", *options).stdout
    scores = [row["scores"]["likelihood"] for row in demo_rows(root)]
    assert all(0 <= score <= 100 for score in scores)
    assert len(set(scores)) > len(scores) // 2
    run = root / "experiments/demo/calm"
    log = (run / "judgements" / "likelihood.jsonl").read_text(encoding="utf-8")
    assert len(log.splitlines()) == len(scores)
    (run / "responses" / "pos.jsonl").unlink()
    succeed("batched", *options)
    assert (run / "judgements" / "likelihood.jsonl").read_text(encoding="utf-8") == log
    assert [row["scores"]["likelihood"] for row in demo_rows(root)] == scores


def test_an_unknown_judge_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'likelyhood'.*'likelihood'"):
        resolve_judge("likelyhood", TRAIT)
