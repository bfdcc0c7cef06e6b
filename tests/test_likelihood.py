"""Likelihoods and divergences equal those of plain transformers, one text at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from extraction.core.errors import PromptError
from extraction.engine.steering import Steering
from extraction.engine.teacher_forcing import divergences, log_likelihoods, rows_that_fit
from extraction.model.loading import wrap
from tests.test_steering import plainly_steered, vector
from tests.tiny import FAMILIES, VOCABULARY, prompts, shared_model

pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
EVERY = pytest.mark.parametrize("name", FAMILIES)


def texts_of(n: int = 7) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Prompts and responses of several lengths."""
    return [
        (f"t{i}", ids[:-2], ids[-2:] + prompts(n, seed=1)[i][: i + 1]) for i, ids in enumerate(prompts(n)) if ids[:-2]
    ]


@torch.no_grad()
def chances(model: torch.nn.Module, ids: tuple[int, ...], n_prompt: int) -> Tensor:
    """Log-probabilities [T, V] at the positions that response tokens come from, by one plain pass."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, n_prompt - 1 : -1].log_softmax(-1)


@EVERY
def test_likelihoods_equal_transformers_one_at_a_time(name: str) -> None:
    model = shared_model(name)
    texts = texts_of()
    for batch_size in (1, 4):
        found = dict(log_likelihoods(wrap(model), texts, batch_size=batch_size))
        assert set(found) == {text_id for text_id, _, _ in texts}
        for text_id, prompt, response in texts:
            expected_TV = chances(model, prompt + response, len(prompt))
            expected_T = expected_TV[torch.arange(len(response)), torch.tensor(response)]
            assert torch.allclose(found[text_id], expected_T, atol=2e-5), text_id
            shifted_T = chances(model, prompt + response, len(prompt) + 1)  # the control: one position late
            if len(response) > 2:
                late_T = shifted_T[torch.arange(len(response) - 1), torch.tensor(response[:-1])]
                assert not torch.allclose(found[text_id][:-1], late_T, atol=1e-2)


@EVERY
def test_divergences_equal_two_plain_passes(name: str) -> None:
    model = shared_model(name)
    text = texts_of()[-1]
    _, prompt, response = text
    unit = vector(model, 7) / vector(model, 7).norm()
    steerings = [
        Steering(),
        Steering(add={1: vector(model, 1)}),
        Steering(add={0: vector(model, 2)}, ablate={1: unit}),
        Steering(add={1: vector(model, 3)}, positions="response"),
    ]
    plain_TV = chances(model, prompt + response, len(prompt))
    expected = []
    for steering in steerings:
        with plainly_steered(model, steering, len(prompt)):
            steered_TV = chances(model, prompt + response, len(prompt))
        expected.append(float((steered_TV.exp() * (steered_TV - plain_TV)).sum(-1).mean()))
    for batch_size in (1, 3, 8):
        found = divergences(wrap(model), text, steerings, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert min(found[1:]) > 1e-4


def test_a_text_without_a_prompt_or_a_response_is_refused_by_name() -> None:
    lm = wrap(shared_model("llama"))
    for text in [("a", (), (1,)), ("a", (1,), ())]:
        with pytest.raises(PromptError, match=r"^a: has no"):
            list(log_likelihoods(lm, [text], batch_size=2))


def test_a_batch_holds_as_many_logits_as_memory_may() -> None:
    lm = wrap(shared_model("llama"))
    assert rows_that_fit(lm, 10, 8) == 8
    assert rows_that_fit(lm, 2**28 // (4 * VOCABULARY * 3), 8) == 3
    assert rows_that_fit(lm, 2**40, 8) == 1
