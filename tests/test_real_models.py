"""The engine's laws on real models: `TRAITLINE_REAL_MODELS=FOLDER pytest -m real`.

FOLDER holds SmolLM2-135M-Instruct and gemma-3-270m; a model that is not there is skipped. Float32, greedy.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path

import pytest
import torch

from extraction.config.experiments import ModelSpec
from extraction.model.language_model import LanguageModel
from extraction.model.loading import load
from extraction.utils_batch import Capture, Request, generate
from tests.tiny import deviation, reference_greedy, until_stop

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TRAITLINE_REAL_MODELS" not in os.environ, reason="TRAITLINE_REAL_MODELS names no folder"),
]
NAMES = ("SmolLM2-135M-Instruct", "gemma-3-270m")
LENGTHS = tuple(2 + round(698 * i / 59) for i in range(60))  # prompts of 2 to 700 tokens
N_NEW = 16
TEXT = (
    "The harbour was quiet when the ferry came in. Two children counted the gulls, a baker carried bread to the inn, "
    "and the old clock of the town hall struck seven. Nobody knew yet that the letter had arrived. "
)


@cache
def model(name: str) -> LanguageModel:
    """Load a model of the folder in float32; skip the test if it is not there."""
    folder = Path(os.environ["TRAITLINE_REAL_MODELS"]) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the folder")
    torch.set_num_threads(2)
    return load(ModelSpec(name, str(folder), dtype="float32", device="cpu"))


@cache
def requests(name: str) -> tuple[Request, ...]:
    """Return natural texts of all lengths, each from another place, in a random order."""
    lm = model(name)
    assert lm.tokenizer is not None
    ids = lm.tokenizer(TEXT * 30, add_special_tokens=False)["input_ids"]
    prompts = [tuple(ids[7 * i : 7 * i + length]) for i, length in enumerate(LENGTHS)]
    assert [len(prompt) for prompt in prompts] == list(LENGTHS)
    asked = [Request(f"e{i}", prompt, N_NEW) for i, prompt in enumerate(prompts)]
    return tuple(random.Random(0).sample(asked, len(asked)))


@cache
def references(name: str) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Return by id the tokens of `model.generate` alone, and the response means [L, D] of a plain pass."""
    lm, found = model(name), {}
    for request in requests(name):
        tokens = until_stop(reference_greedy(lm.model, request.token_ids, N_NEW, lm.stop_ids), lm.stop_ids)
        with torch.no_grad():
            hidden = lm.model(
                torch.tensor([[*request.token_ids, *tokens]]), output_hidden_states=True, use_cache=False
            ).hidden_states
        means = [states[0, len(request.token_ids) :].double().mean(0) for states in hidden[1:-1]]
        found[request.id] = tokens, torch.stack(means) if tokens else torch.empty(0)
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 16])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_captured_means_equal_transformers(name: str, batch_size: int) -> None:
    lm, wanted = model(name), references(name)
    layers = tuple(range(lm.n_layers - 1))  # transformers norms the last one's output
    done = list(generate(lm, requests(name), batch_size=batch_size, capture=Capture(layers)))
    assert {c.id: c.token_ids for c in done} == {key: tokens for key, (tokens, _) in wanted.items()}
    pairs = [(c.activations["residual.response_mean"], wanted[c.id][1]) for c in done if c.token_ids]
    worst = max(deviation(captured_LD, mean_LD) for captured_LD, mean_LD in pairs)
    print(f"{name}, batch size {batch_size}: {len(done)} responses equal, captured means within {worst:.1e}")
    assert worst < 1e-4
    assert min(deviation(captured_LD.roll(1, 0), mean_LD) for captured_LD, mean_LD in pairs) > 1e-2  # layers off by one
