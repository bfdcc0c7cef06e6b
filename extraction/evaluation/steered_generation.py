"""Steered answers and what they come to: how often the trait shows, how likely and how varied the text is.

A coefficient of 1 adds a vector as long as the layer's typical activation. All conditions of all prompts run as one
queue of the engine, a coefficient a row. Random directions of the same length are the control.

Shapes: L layers, D hidden, T tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from extraction.engine.generate import generate
from extraction.engine.likelihood import log_likelihoods
from extraction.engine.requests import Request
from extraction.engine.steering import Steering

if TYPE_CHECKING:
    from extraction.core.records import Prompt
    from extraction.engine.sampler import Sample
    from extraction.judging.base import Scorer
    from extraction.model.loading import LanguageModel

N_RANDOM = 4  # random directions, dealt over a question's answers
NGRAM = 4
# a condition is coherent when its answers are at most so much less likely, and so much more repetitive, than unsteered
PERPLEXITY_FACTOR = 2.0
REPETITION_MARGIN = 0.1
COHERENCE_THRESHOLD = 50.0


@dataclass(frozen=True)
class Condition:
    """One way of steering. `direction`: trait, random or none; `kind`: add, ablate or none."""

    direction: str
    kind: str
    layers: tuple[int, ...] = ()
    coefficient: float = 0.0

    @property
    def label(self) -> str:
        """Unique among the conditions of a sweep."""
        return f"{self.direction}/{self.kind}/{'+'.join(map(str, self.layers))}/{self.coefficient:g}"


UNSTEERED = Condition("none", "none")


@dataclass(frozen=True)
class LayerDirections:
    """Unit directions by layer, `layer -> [D]`: the trait's, and random ones; with each layer's typical norm."""

    trait: Mapping[int, Tensor]
    random: Sequence[Mapping[int, Tensor]]
    norms: Mapping[int, float]
    positions: str = "all"

    def steering(self, condition: Condition, repeat: int) -> Steering | None:
        """What a condition does to the `repeat`-th answer to a question."""
        if condition.direction == "none":
            return None
        unit = self.trait if condition.direction == "trait" else self.random[repeat % len(self.random)]
        if condition.kind == "ablate":
            return Steering(ablate={layer: unit[layer] for layer in condition.layers}, positions=self.positions)
        size = condition.coefficient / len(condition.layers)
        pushes = {layer: size * self.norms[layer] * unit[layer] for layer in condition.layers}
        return Steering(add=pushes, positions=self.positions)


def directions_of(
    direction_LD: Tensor, norms_L: Sequence[float], layers: Sequence[int], *, seed: int
) -> LayerDirections:
    """Unit directions of [L, D] vectors, and random ones from the seed.

    A random direction is the same at every layer, as a trait's nearly is: at several layers, too, they push as far.
    """
    unit_LD = direction_LD.double() / direction_LD.double().norm(dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(direction_LD.shape[1], generator=generator, dtype=torch.float64) for _ in range(N_RANDOM)]
    random = [dict.fromkeys(layers, (draw_D / draw_D.norm()).float()) for draw_D in draws]
    return LayerDirections(
        dict(zip(layers, unit_LD.float(), strict=True)), random, dict(zip(layers, map(float, norms_L), strict=True))
    )


@dataclass(frozen=True)
class SteeredAnswer:
    """One steered answer, and what is known of it. `surprise`: mean negative log-likelihood in nats, unsteered."""

    question: str
    text: str
    token_ids: tuple[int, ...]
    score: float | None
    coherence: float | None
    surprise: float | None


@dataclass(frozen=True)
class SteeredGeneration:
    """Who answers, and how it is judged."""

    lm: LanguageModel
    strategy: Sample
    scorer: Scorer
    max_new_tokens: int
    batch_size: int
    seed: int = 0
    threshold: float = 50.0
    on_progress: Callable[[int, int], None] = field(default=lambda _answers, _tokens: None)


def answer_all(
    trying: SteeredGeneration,
    prompts: Sequence[Prompt],
    directions: LayerDirections,
    conditions: Sequence[Condition],
    repeats: int,
) -> dict[Condition, list[SteeredAnswer]]:
    """Every prompt, `repeats` times under every condition, in one queue; judged, and scored by the unsteered model.

    A prompt's repeat has the same random numbers under every condition: what differs is the steering.
    """
    plan = {
        f"{condition.label}/{i}/{repeat}": (condition, prompt, directions.steering(condition, repeat), f"{i}/{repeat}")
        for condition in conditions
        for i, prompt in enumerate(prompts)
        for repeat in range(repeats)
    }
    requests = [
        Request(key, prompt.token_ids, trying.max_new_tokens, trying.seed, steering, draws)
        for key, (_, prompt, steering, draws) in plan.items()
    ]
    said = {}
    for completion in generate(
        trying.lm,
        requests,
        batch_size=trying.batch_size,
        strategy=trying.strategy,
        on_progress=lambda n_tokens: trying.on_progress(0, n_tokens),
    ):
        said[completion.id] = completion.token_ids
        trying.on_progress(1, 0)
    surprises = _surprises(trying, {key: (prompt, said[key]) for key, (_, prompt, *_) in plan.items()})
    texts = {key: _text(trying.lm, token_ids) for key, token_ids in said.items()}
    judged = trying.scorer([(prompt.example.question, texts[key]) for key, (_, prompt, *_) in plan.items()])
    found: dict[Condition, list[SteeredAnswer]] = {condition: [] for condition in conditions}
    for (key, (condition, prompt, *_)), each in zip(plan.items(), judged, strict=True):
        question = prompt.example.question
        answer = SteeredAnswer(question, texts[key], said[key], each.score, each.coherence, surprises.get(key))
        found[condition].append(answer)
    return found


def _text(lm: LanguageModel, token_ids: Sequence[int]) -> str:
    assert lm.tokenizer is not None
    return str(lm.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _surprises(trying: SteeredGeneration, said: Mapping[str, tuple[Prompt, tuple[int, ...]]]) -> dict[str, float]:
    texts = [(key, prompt.token_ids, token_ids) for key, (prompt, token_ids) in said.items() if token_ids]
    scored = log_likelihoods(trying.lm, texts, batch_size=trying.batch_size)
    return {key: -float(chances_T.double().mean()) for key, chances_T in scored}


def repetition(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of a text's n-grams that it has had before; 0 for a text shorter than that."""
    grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bounded_rate(
    answers: Sequence[SteeredAnswer], threshold: float, *, seed: int, bootstraps: int = 1000
) -> dict[str, Any]:
    """Share of the scored answers at or above the threshold, with a 95% percentile bootstrap over questions."""
    hits: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.score is not None:
            hits.setdefault(answer.question, []).append(answer.score >= threshold)
    if not hits:
        return {"value": None, "low": None, "high": None}
    positive_Q, n_Q = (np.array([f(rows) for rows in hits.values()], dtype=float) for f in (sum, len))
    counts = np.random.default_rng(seed).multinomial(len(hits), np.full(len(hits), 1 / len(hits)), bootstraps)
    low, high = np.percentile(counts @ positive_Q / (counts @ n_Q), [2.5, 97.5])
    return {"value": float(positive_Q.sum() / n_Q.sum()), "low": float(low), "high": float(high)}


def figures_of(answers: Sequence[SteeredAnswer], threshold: float, *, seed: int) -> dict[str, Any]:
    """What one condition's answers come to, JSON-ready; `perplexity` is the median over answers."""
    scores = [answer.score for answer in answers if answer.score is not None]
    judged = [answer.coherence for answer in answers if answer.coherence is not None]
    surprises = [answer.surprise for answer in answers if answer.surprise is not None]
    return {
        "n": len(answers),
        "missing": len(answers) - len(scores),
        "rate": bounded_rate(answers, threshold, seed=seed),
        "score": statistics.fmean(scores) if scores else None,
        "perplexity": math.exp(statistics.median(surprises)) if surprises else None,
        "repetition": statistics.fmean(repetition(answer.token_ids) for answer in answers),
        "judged_coherence": statistics.fmean(judged) if judged else None,
    }


def is_coherent(figures: Mapping[str, Any], unsteered: Mapping[str, Any]) -> bool:
    """Whether answers are about as likely, and as varied, as without steering, and judged coherent where judged."""
    if figures["perplexity"] is None or unsteered["perplexity"] is None:
        return False
    judged = figures["judged_coherence"]
    return bool(
        figures["perplexity"] <= PERPLEXITY_FACTOR * unsteered["perplexity"]
        and figures["repetition"] <= unsteered["repetition"] + REPETITION_MARGIN
        and (judged is None or judged >= COHERENCE_THRESHOLD)
    )
