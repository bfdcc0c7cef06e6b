"""Steered answers and their metrics: how often the trait shows, how likely and how repetitive the text is.

A coefficient of 1 adds a vector as long as the layer's typical activation. All conditions of all prompts run in one
batch of the engine, each row with its own coefficient. Random directions of the same length are the control.

Shapes: L layers, D hidden, T tokens, Q questions.
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
from extraction.engine.requests import Request
from extraction.engine.steering import Steering
from extraction.engine.teacher_forcing import log_likelihoods
from extraction.judging.base import JudgedResponse

if TYPE_CHECKING:
    from extraction.core.records import Prompt
    from extraction.engine.sampler import Sample
    from extraction.judging.base import Scorer
    from extraction.model.language_model import LanguageModel

N_RANDOM = 4  # random directions; a question's answers take them in turn
NGRAM = 4
# a condition is coherent if its answers differ from unsteered ones by at most these
PERPLEXITY_FACTOR = 2.0
REPETITION_MARGIN = 0.1
COHERENCE_THRESHOLD = 50.0


@dataclass(frozen=True)
class Condition:
    """One way to steer. `direction`: trait, random or none; `kind`: add, ablate or none."""

    direction: str
    kind: str
    layers: tuple[int, ...] = ()
    coefficient: float = 0.0

    @property
    def label(self) -> str:
        """A name that is unique among the conditions of a sweep."""
        return f"{self.direction}/{self.kind}/{'+'.join(map(str, self.layers))}/{self.coefficient:g}"


UNSTEERED = Condition("none", "none")


@dataclass(frozen=True)
class LayerDirections:
    """Unit directions `layer -> [D]`, the trait's and random ones, with the typical activation norm of each layer."""

    trait: Mapping[int, Tensor]
    random: Sequence[Mapping[int, Tensor]]
    norms: Mapping[int, float]
    positions: str = "all"

    def steering(self, condition: Condition, repeat: int) -> Steering | None:
        """Return the steering of the `repeat`-th answer to a question; None if unsteered."""
        if condition.direction == "none":
            return None
        unit = self.trait if condition.direction == "trait" else self.random[repeat % len(self.random)]
        if condition.kind == "ablate":
            return Steering(ablate={layer: unit[layer] for layer in condition.layers}, positions=self.positions)
        size = condition.coefficient / len(condition.layers)
        pushes = {layer: size * self.norms[layer] * unit[layer] for layer in condition.layers}
        return Steering(add=pushes, positions=self.positions)


def layer_directions(
    direction_LD: Tensor, norms_L: Sequence[float], layers: Sequence[int], *, seed: int
) -> LayerDirections:
    """Normalise [L, D] vectors, and draw random directions from the seed.

    A random direction is the same at every layer, as a trait's nearly is, so that at several layers both push as far.
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
    """One answer. `surprise`: mean negative log-likelihood of its tokens in nats, under the unsteered model."""

    question: str
    text: str
    token_ids: tuple[int, ...]
    score: float | None
    coherence: float | None
    surprise: float | None


@dataclass(frozen=True)
class SteeredGeneration:
    """The model and the settings of steered generation, and the judge of the answers."""

    lm: LanguageModel
    strategy: Sample
    scorer: Scorer
    max_new_tokens: int
    batch_size: int
    seed: int = 0
    threshold: float = 50.0
    on_progress: Callable[[int, int], None] = field(default=lambda _answers, _tokens: None)


def answer_all(
    generation: SteeredGeneration,
    prompts: Sequence[Prompt],
    directions: LayerDirections,
    conditions: Sequence[Condition],
    repeats: int,
) -> dict[Condition, list[SteeredAnswer]]:
    """Answer every prompt `repeats` times under every condition, in one batch; judge and score the answers.

    A repeat draws the same random numbers under every condition, so that only the steering differs. Answers are in the
    order of the prompts, the repeats of each together.
    """
    rows = {
        f"{condition.label}/{i}/{repeat}": (condition, prompt, directions.steering(condition, repeat), f"{i}/{repeat}")
        for condition in conditions
        for i, prompt in enumerate(prompts)
        for repeat in range(repeats)
    }
    requests = [
        Request(key, prompt.token_ids, generation.max_new_tokens, generation.seed, steering, draws)
        for key, (_, prompt, steering, draws) in rows.items()
    ]
    token_ids: dict[str, tuple[int, ...]] = {}
    for completion in generate(
        generation.lm,
        requests,
        batch_size=generation.batch_size,
        strategy=generation.strategy,
        on_progress=lambda n_tokens: generation.on_progress(0, n_tokens),
    ):
        token_ids[completion.id] = completion.token_ids
        generation.on_progress(1, 0)
    surprises = _surprises(generation, {key: (prompt, token_ids[key]) for key, (_, prompt, *_) in rows.items()})
    texts = {key: _decode(generation.lm, ids) for key, ids in token_ids.items()}
    judgements = generation.scorer(
        [JudgedResponse(prompt.example.question, texts[key]) for key, (_, prompt, *_) in rows.items()]
    )
    answers: dict[Condition, list[SteeredAnswer]] = {condition: [] for condition in conditions}
    for (key, (condition, prompt, *_)), judged in zip(rows.items(), judgements, strict=True):
        question, surprise = prompt.example.question, surprises.get(key)
        answer = SteeredAnswer(question, texts[key], token_ids[key], judged.score, judged.coherence, surprise)
        answers[condition].append(answer)
    return answers


def _decode(lm: LanguageModel, token_ids: Sequence[int]) -> str:
    assert lm.tokenizer is not None
    return str(lm.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _surprises(
    generation: SteeredGeneration, answers: Mapping[str, tuple[Prompt, tuple[int, ...]]]
) -> dict[str, float]:
    """Return the surprise of each answer that is not empty."""
    texts = [(key, prompt.token_ids, token_ids) for key, (prompt, token_ids) in answers.items() if token_ids]
    scored = log_likelihoods(generation.lm, texts, batch_size=generation.batch_size)
    return {key: -float(chances_T.double().mean()) for key, chances_T in scored}


def repetition(token_ids: Sequence[int]) -> float:
    """Return the share of a text's n-grams that occur earlier in it; 0 for a text of fewer than NGRAM tokens."""
    grams = list(zip(*(token_ids[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rate_with_interval(
    answers: Sequence[SteeredAnswer], threshold: float, *, seed: int, bootstraps: int = 1000
) -> dict[str, Any]:
    """Return the share of scored answers at or above the threshold, with a 95% percentile bootstrap over questions."""
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


def condition_metrics(answers: Sequence[SteeredAnswer], threshold: float, *, seed: int) -> dict[str, Any]:
    """Return the metrics of one condition's answers, JSON-ready; `perplexity` is the median over answers."""
    scores = [answer.score for answer in answers if answer.score is not None]
    judged = [answer.coherence for answer in answers if answer.coherence is not None]
    surprises = [answer.surprise for answer in answers if answer.surprise is not None]
    return {
        "n": len(answers),
        "missing": len(answers) - len(scores),
        "rate": rate_with_interval(answers, threshold, seed=seed),
        "score": statistics.fmean(scores) if scores else None,
        "perplexity": math.exp(statistics.median(surprises)) if surprises else None,
        "repetition": statistics.fmean(repetition(answer.token_ids) for answer in answers),
        "judged_coherence": statistics.fmean(judged) if judged else None,
    }


def is_coherent(figures: Mapping[str, Any], unsteered: Mapping[str, Any]) -> bool:
    """Return True if answers are about as likely and as varied as unsteered ones, and judged coherent if judged."""
    if figures["perplexity"] is None or unsteered["perplexity"] is None:
        return False
    judged = figures["judged_coherence"]
    return bool(
        figures["perplexity"] <= PERPLEXITY_FACTOR * unsteered["perplexity"]
        and figures["repetition"] <= unsteered["repetition"] + REPETITION_MARGIN
        and (judged is None or judged >= COHERENCE_THRESHOLD)
    )
