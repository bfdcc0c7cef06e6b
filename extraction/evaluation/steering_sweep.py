"""The steering sweep: choose a site on some prompts, measure all coefficients on others, against random directions.

A site is a layer, or a few neighbouring layers that are steered together. No prompt has an instruction.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction.engine.steering import Steering
from extraction.engine.teacher_forcing import divergences
from extraction.evaluation.steered_generation import (
    UNSTEERED,
    Condition,
    LayerDirections,
    SteeredAnswer,
    SteeredGeneration,
    answer_all,
    condition_metrics,
    is_coherent,
)

if TYPE_CHECKING:
    from extraction.core.records import Prompt

COEFFICIENTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
ANSWERS = 24  # for each condition
SCAN_COEFFICIENTS = (0.25, 0.5, 1.0, 1.5)
SCAN_QUESTIONS, SCAN_LAYERS = 10, 8
WINDOW = 3  # layers of a site of neighbours
SAMPLES = 4  # answers of a condition that are stored as text


@dataclass(frozen=True)
class SweepPlan:
    """Prompts to choose a site on, prompts to report on, and the candidate directions by method."""

    choose_on: Sequence[Prompt]
    report_on: Sequence[Prompt]
    candidates: Mapping[str, LayerDirections]
    layers: tuple[int, ...]
    answers: int = ANSWERS
    coefficients: tuple[float, ...] = COEFFICIENTS

    @property
    def repeats(self) -> int:
        """Number of answers to each prompt that is reported on, under each condition."""
        return max(1, round(self.answers / len(self.report_on)))

    @property
    def n_answers(self) -> int:
        """Number of answers in all, at most."""
        n_pushes = 2 * len(SCAN_COEFFICIENTS)
        n_sites = len(self.candidates) * min(len(self.layers), SCAN_LAYERS)
        n_scanned = (len(self.candidates) + n_pushes * (n_sites + 1) + 1) * min(len(self.choose_on), SCAN_QUESTIONS)
        n_upper = len(upper_half(self.coefficients))
        return n_scanned + (3 + 2 * len(self.coefficients) + 4 * n_upper) * len(self.report_on) * self.repeats


def typical_n_answers(n_layers: int, answers: int) -> int:
    """Return about how many answers a sweep with one candidate method makes; for the forecast."""
    scanned = (2 + 2 * len(SCAN_COEFFICIENTS) * (min(n_layers, SCAN_LAYERS) + 1)) * SCAN_QUESTIONS
    return scanned + (3 + 2 * len(COEFFICIENTS) + 4 * len(upper_half(COEFFICIENTS))) * answers


def run_sweep(generation: SteeredGeneration, plan: SweepPlan) -> dict[str, Any]:
    """Choose method and site on some prompts, then sweep the coefficients on the others. JSON-ready.

    The site of the other kind (a layer, or its neighbours) is measured beside the chosen one. Ablation removes the
    direction at every layer of the plan.
    """
    method, site, scan = choose_site(generation, plan)
    directions, others = plan.candidates[method], other_site(site, plan.layers)
    sizes, larger = both_signs(plan.coefficients), both_signs(upper_half(plan.coefficients))
    conditions = [
        UNSTEERED,
        *(Condition("trait", "add", site, size) for size in sizes),
        *(Condition("random", "add", site, size) for size in larger),
        *(Condition("trait", "add", others, size) for size in larger if others != site),
        Condition("trait", "ablate", plan.layers),
        Condition("random", "ablate", plan.layers),
    ]
    answers = answer_all(generation, plan.report_on, directions, conditions, plan.repeats)
    kl = _kl_by_condition(generation, plan, directions, conditions, answers[UNSTEERED])
    figures = {
        condition: {**condition_metrics(rows, generation.threshold, seed=generation.seed), "kl": kl[condition]}
        for condition, rows in answers.items()
    }
    coherent = {condition: is_coherent(each, figures[UNSTEERED]) for condition, each in figures.items()}
    return {
        "method": method,
        "layers": list(site),
        "positions": "all",
        "unit": "typical norm of each layer's activations",
        "typical_norm": {str(name): norm for name, norm in directions.norms.items()},
        "questions": len({prompt.example.question for prompt in plan.report_on}),
        "max_new_tokens": generation.max_new_tokens,
        "threshold": generation.threshold,
        "scan": scan,
        "conditions": [
            {
                **_condition_fields(condition),
                **each,
                "coherent": coherent[condition],
                "samples": _samples(answers[condition]),
            }
            for condition, each in figures.items()
        ],
        **reach(site, sizes, figures, coherent),
    }


def choose_site(generation: SteeredGeneration, plan: SweepPlan) -> tuple[str, tuple[int, ...], list[dict[str, Any]]]:
    """Return the method and the layers to steer at, and the measurements of every candidate.

    A candidate's rank is the difference of the trait's rates between the largest coherent push each way; of equals,
    that with the likelier answers. Single layers are tried first, then the best one with its neighbours.
    """
    singles = [(layer,) for layer in _evenly_spaced(plan.layers, SCAN_LAYERS)]
    scan = [candidate for method in plan.candidates for candidate in _scan_sites(generation, plan, method, singles)]
    best = max(scan, key=_rank)  # the first of equals
    window = window_of(best["layers"][0], plan.layers)
    if len(window) > 1:
        scan += _scan_sites(generation, plan, best["method"], [window])
        best = max(scan, key=_rank)
    return best["method"], tuple(best["layers"]), scan


def _rank(candidate: Mapping[str, Any]) -> tuple[float, float]:
    return candidate["moved"], -candidate["surprise"]


def _scan_sites(
    generation: SteeredGeneration, plan: SweepPlan, method: str, sites: Sequence[tuple[int, ...]]
) -> list[dict[str, Any]]:
    prompts, sizes = _evenly_spaced(plan.choose_on, SCAN_QUESTIONS), both_signs(SCAN_COEFFICIENTS)
    pushes = [Condition("trait", "add", site, size) for site in sites for size in sizes]
    answers = answer_all(generation, prompts, plan.candidates[method], [UNSTEERED, *pushes], 1)
    figures = {
        key: condition_metrics(rows, generation.threshold, seed=generation.seed) for key, rows in answers.items()
    }
    coherent = {key: is_coherent(each, figures[UNSTEERED]) for key, each in figures.items()}
    return [{"method": method, "layers": list(site), **_movement(site, sizes, figures, coherent)} for site in sites]


def window_of(layer: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return a layer and its neighbours, fewer at the ends."""
    index = layers.index(layer)
    return layers[max(index - WINDOW // 2, 0) : index + WINDOW // 2 + 1]


def other_site(site: tuple[int, ...], layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the site to compare with: the window around a single layer, or the middle layer of a window."""
    return window_of(site[0], layers) if len(site) == 1 else (site[len(site) // 2],)


def _movement(
    site: tuple[int, ...], sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """Return the largest coherent push each way, the difference of the rates there, and the answers' surprise."""
    largest = largest_coherent(site, sizes, coherent)
    up, down = (_rate("trait", site, largest[side], figures) for side in ("positive", "negative"))
    pushes = [Condition("trait", "add", site, size) for size in largest.values() if size is not None]
    surprise = sum(math.log(figures[push]["perplexity"]) for push in pushes)
    moved = 0.0 if up is None or down is None else up - down
    return {"largest_coherent": largest, "moved": moved, "surprise": surprise}


def _evenly_spaced(items: Sequence[Any], count: int) -> Sequence[Any]:
    """Return at most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _kl_by_condition(
    generation: SteeredGeneration,
    plan: SweepPlan,
    directions: LayerDirections,
    conditions: Sequence[Condition],
    unsteered: Sequence[SteeredAnswer],
) -> dict[Condition, float | None]:
    """Return each condition's mean KL to the unsteered next-token distribution, over one unsteered answer a prompt."""
    found: dict[Condition, list[float]] = {condition: [] for condition in conditions}
    for i, prompt in enumerate(plan.report_on):
        token_ids = unsteered[i * plan.repeats].token_ids
        if not token_ids:
            continue
        steerings = [directions.steering(condition, i) or Steering() for condition in conditions]
        text = (str(i), prompt.token_ids, token_ids)
        for condition, shift in zip(
            conditions, divergences(generation.lm, text, steerings, batch_size=generation.batch_size), strict=True
        ):
            found[condition].append(shift)
    return {condition: statistics.fmean(kl) if kl else None for condition, kl in found.items()}


def _condition_fields(condition: Condition) -> dict[str, Any]:
    return {
        "direction": condition.direction,
        "kind": condition.kind,
        "layers": list(condition.layers),
        "coefficient": condition.coefficient,
    }


def _samples(answers: Sequence[SteeredAnswer]) -> list[dict[str, Any]]:
    """Return the first answer to each of the first questions."""
    first: dict[str, SteeredAnswer] = {}
    for answer in answers:
        first.setdefault(answer.question, answer)
    return [
        {"question": question, "response": answer.text, "score": answer.score}
        for question, answer in list(first.items())[:SAMPLES]
    ]


def reach(
    site: tuple[int, ...], sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """Return the largest coefficient each way up to which answers stay coherent, and the rates there.

    The coefficient is chosen by coherence, not by the rate that is reported; so are those of random directions.
    """
    largest = largest_coherent(site, sizes, coherent)
    reached: dict[str, Any] = {side: _rate("trait", site, size, figures) for side, size in largest.items()}
    random = {side: _rate("random", site, size, figures) for side, size in largest.items()}
    return {"largest_coherent": largest, "reached": {**reached, "random": random}}


def largest_coherent(
    site: tuple[int, ...], sizes: Sequence[float], coherent: Mapping[Condition, bool]
) -> dict[str, float | None]:
    """Return, each way, the last coefficient before the first incoherent one; None if the first is incoherent."""
    found: dict[str, float | None] = {"positive": None, "negative": None}
    for side, sign in (("positive", 1), ("negative", -1)):
        for size in sorted((size for size in sizes if size * sign > 0), key=abs):
            if not coherent[Condition("trait", "add", site, size)]:
                break
            found[side] = size
    return found


def _rate(direction: str, site: tuple[int, ...], size: float | None, figures: Mapping[Condition, Any]) -> float | None:
    """Return the rate of a push; of a random direction not measured at this size, the unsteered rate."""
    if size is None:
        return None
    metrics = figures.get(Condition(direction, "add", site, size), figures.get(UNSTEERED))
    rate = None if metrics is None else metrics["rate"]["value"]
    return None if rate is None else float(rate)


def upper_half(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients from the median up, at which controls and the other site are measured."""
    return tuple(sorted(coefficients)[(len(coefficients) - 1) // 2 :])


def both_signs(coefficients: Iterable[float]) -> list[float]:
    """Return the coefficients with both signs, from the most negative up."""
    sizes = sorted(coefficients)
    return [-size for size in reversed(sizes)] + sizes
