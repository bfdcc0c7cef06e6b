"""Capture sets that no model made: smooth trajectories over words, with what real ones have: a huge token 0, levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from extraction.core.records import POINTS
from extraction.monitoring.dynamics import dynamics
from extraction.monitoring.page_data import CaptureSetData, TextReading, TraitData

TEMPLATE = ("<bos>", "<start_of_turn>", "user", "\n")
TURN = ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")
TEXT = (
    "I think that the answer is most likely yes , although it depends on what you mean by a good idea . "
    "Paris is the capital of France . \n\n First , let us look at the numbers : they are not certain , and nobody "
    "can promise that the weather will hold . Still , it may well be so , and you are right to ask ."
)
QUESTION = "What will the weather be like in Paris tomorrow , and is it a good idea to plan a picnic ?"
SAID, ASKED = TEXT.split(" "), QUESTION.split(" ")
NAMES = ("uncertainty_calibration", "sycophancy", "commitment_strength", "cognitive_load")


def make_reading(
    index: int, n_tokens: int = 60, n_layers: int = 6, n_traits: int = 1, *, texts: Sequence[str] = ()
) -> TextReading:
    """One prompt; `texts` stand as pieces at the response's start."""
    generator = np.random.default_rng(index)
    words = [f" {ASKED[(index + i) % len(ASKED)]}" for i in range(5 + index % 9)]
    prompt = [*TEMPLATE, *words, *TURN]
    n_response = max(n_tokens - len(prompt), 0)
    said = [*texts, *(SAID[(index * 7 + i) % len(SAID)] for i in range(n_response))][:n_response]
    pieces = [*prompt, *(word if word in texts or "\n" in word else f" {word}" for word in said)]
    x_TLPK = _trajectories(generator, len(pieces), n_layers, n_traits, len(prompt))
    names = [name_of(k) for k in range(n_traits)]
    return TextReading(
        id=f"p{index:04d}",
        prompt="".join(words).strip(),
        response="".join(pieces[len(prompt) :]),
        pieces=pieces,
        tokens=[piece.replace(" ", "\u2581") for piece in pieces],
        token_ids=[int(number) for number in generator.integers(0, 50_000, len(pieces))],
        n_prompt=len(prompt),
        finish_reason="stop" if index % 3 else "length",
        projections_TLPK=x_TLPK,
        dynamics={
            name: dynamics(x_TLPK[len(prompt) :, :, 2, k], np.full(n_layers, 0.4)) for k, name in enumerate(names)
        },
    )


def _trajectories(generator: Any, n_tokens: int, n_layers: int, n_traits: int, n_prompt: int) -> np.ndarray:
    """A random walk that turns to a side in the response, stronger in the middle layers; token 0 is huge."""
    t = np.arange(n_tokens)[:, None, None, None]
    middle = 1 + 2 * np.exp(-((np.arange(n_layers) / max(n_layers, 1) - 0.6) ** 2) * 12)[None, :, None, None]
    turn = generator.choice([-1.0, 1.0], n_traits) * generator.uniform(0.6, 2.2, n_traits)
    start = n_prompt + generator.uniform(0.1, 0.6) * max(n_tokens - n_prompt, 1)
    rise = 1 / (1 + np.exp(-(t - start) / 4))
    wave = np.sin(t / generator.uniform(5, 11) + generator.uniform(0, 6, n_traits)) * 0.5
    walk = generator.normal(0, 0.22, (n_tokens, 1, 1, n_traits)) + generator.normal(
        0, 0.05, (n_tokens, n_layers, 3, n_traits)
    )
    x = middle * (turn * rise + wave + walk) + np.array([-0.2, 0.0, 0.15])[None, None, :, None] + 0.4
    x[:1] += 90.0
    return x.astype(np.float32)


def name_of(k: int) -> str:
    """The k-th trait's name."""
    return NAMES[k] if k < len(NAMES) else f"trait_{k}"


def make_trait(k: int, n_layers: int) -> TraitData:
    """Every other trait has levels; the second layer has none."""
    levels_L2 = np.array([[-1.5, 2.5 + 0.1 * layer] for layer in range(n_layers)])
    levels_L2[1:2] = np.nan
    return TraitData(
        name=name_of(k),
        description="How openly the answer says what it does not know. Positive: hedges. Negative: asserts.",
        method=("probe", "mean_diff")[k % 2],
        layer=n_layers // 2,
        levels_L2=None if k % 2 else levels_L2,
    )


def make_set(
    n_prompts: int = 8, n_tokens: int = 60, n_layers: int = 6, n_traits: int = 1, *, texts: Sequence[str] = (),
    **changes: Any,
) -> CaptureSetData:  # fmt: skip
    """A whole set."""
    given: dict[str, Any] = {
        "title": "prompts_uncertainty",
        "experiment": "gemma_2b_cognitive",
        "name": "tier2-prompts_uncertainty-1a2b3c4d",
        "model": "gemma_2b",
        "traits": tuple(make_trait(k, n_layers) for k in range(n_traits)),
        "layers": tuple(range(n_layers)),
        "points": POINTS,
        "readings": [make_reading(i, n_tokens, n_layers, n_traits, texts=texts) for i in range(n_prompts)],
        "settings": {"generation": {"max_new_tokens": 50, "temperature": 0.7}, "seed": 0, "dtype": "float32"},
    }
    return CaptureSetData(**{**given, **changes})
