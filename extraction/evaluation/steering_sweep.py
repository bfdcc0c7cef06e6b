"""The steering sweep: choose a layer on some prompts, try all coefficients on others, against random directions.

All prompts are without an instruction. What is reported is JSON-ready.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction.engine.likelihood import divergences
from extraction.engine.steering import Steering
from extraction.evaluation.steered_generation import (
    UNSTEERED,
    Condition,
    LayerDirections,
    SteeredAnswer,
    SteeredGeneration,
    answer_all,
    figures_of,
    is_coherent,
)

if TYPE_CHECKING:
    from extraction.core.records import Prompt

COEFFICIENTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
ANSWERS = 24  # of every condition
SCAN_COEFFICIENTS = (0.25, 0.5, 1.0, 1.5)
SCAN_QUESTIONS, SCAN_LAYERS = 10, 8
WINDOW = 3  # neighbouring layers that are steered together
SAMPLES = 4  # answers of a condition that are kept as text


@dataclass(frozen=True)
class SweepPlan:
    """What is tried: prompts to choose a layer by, prompts to report on, and candidates by method."""

    choose_on: Sequence[Prompt]
    report_on: Sequence[Prompt]
    candidates: Mapping[str, LayerDirections]
    layers: tuple[int, ...]
    answers: int = ANSWERS
    coefficients: tuple[float, ...] = COEFFICIENTS

    @property
    def repeats(self) -> int:
        """Answers to each prompt that is reported on, under every condition."""
        return max(1, round(self.answers / len(self.report_on)))

    @property
    def n_answers(self) -> int:
        """How many answers are made in all, at most."""
        n_pushes = 2 * len(SCAN_COEFFICIENTS)
        n_places = len(self.candidates) * min(len(self.layers), SCAN_LAYERS)
        n_scanned = (len(self.candidates) + n_pushes * (n_places + 1) + 1) * min(len(self.choose_on), SCAN_QUESTIONS)
        n_strong = len(strong(self.coefficients))
        return n_scanned + (3 + 2 * len(self.coefficients) + 4 * n_strong) * len(self.report_on) * self.repeats


def usual_answers(n_layers: int, answers: int) -> int:
    """About how many answers a sweep makes with one method to choose from; for a forecast."""
    scanned = (2 + 2 * len(SCAN_COEFFICIENTS) * (min(n_layers, SCAN_LAYERS) + 1)) * SCAN_QUESTIONS
    return scanned + (3 + 2 * len(COEFFICIENTS) + 4 * len(strong(COEFFICIENTS))) * answers


def evaluate(trying: SteeredGeneration, plan: SweepPlan) -> dict[str, Any]:
    """Choose method and layer on some prompts, sweep the coefficients on the others. JSON-ready.

    The place that is chosen moves the trait furthest while answers stay coherent: a layer, or a few neighbours, each of
    which gets its share of the coefficient. The other kind of place is tried beside it. Ablation removes the direction
    at every layer of the plan.
    """
    method, place, scan = choose_place(trying, plan)
    directions, others = plan.candidates[method], counterpart(place, plan.layers)
    sizes, larger = signed(plan.coefficients), signed(strong(plan.coefficients))
    conditions = [
        UNSTEERED,
        *(Condition("trait", "add", place, size) for size in sizes),
        *(Condition("random", "add", place, size) for size in larger),
        *(Condition("trait", "add", others, size) for size in larger if others != place),
        Condition("trait", "ablate", plan.layers),
        Condition("random", "ablate", plan.layers),
    ]
    answers = answer_all(trying, plan.report_on, directions, conditions, plan.repeats)
    shifts = _shifts(trying, plan, directions, conditions, answers[UNSTEERED])
    figures = {
        condition: {**figures_of(rows, trying.threshold, seed=trying.seed), "kl": shifts[condition]}
        for condition, rows in answers.items()
    }
    coherent = {condition: is_coherent(each, figures[UNSTEERED]) for condition, each in figures.items()}
    return {
        "method": method,
        "layers": list(place),
        "positions": "all",
        "unit": "typical norm of each layer's activations",
        "typical_norm": {str(name): norm for name, norm in directions.norms.items()},
        "questions": len({prompt.example.question for prompt in plan.report_on}),
        "max_new_tokens": trying.max_new_tokens,
        "threshold": trying.threshold,
        "scan": scan,
        "conditions": [
            {**_named(condition), **each, "coherent": coherent[condition], "samples": _samples(answers[condition])}
            for condition, each in figures.items()
        ],
        **reach(place, sizes, figures, coherent),
    }


def choose_place(trying: SteeredGeneration, plan: SweepPlan) -> tuple[str, tuple[int, ...], list[dict[str, Any]]]:
    """The method and the layer, or layers, to steer at, and what was seen of all.

    Each is tried at a few coefficients, and counts by how far the trait's rate lies apart between the largest coherent
    push each way; of equals, by how likely those answers are. Single layers first, then the best one's neighbours with
    it.
    """
    singles = [(layer,) for layer in _spread(plan.layers, SCAN_LAYERS)]
    scan = [seen for method in plan.candidates for seen in _scan(trying, plan, method, singles)]
    best = max(scan, key=_merit)  # the first of equals
    window = window_of(best["layers"][0], plan.layers)
    if len(window) > 1:
        scan += _scan(trying, plan, best["method"], [window])
        best = max(scan, key=_merit)
    return best["method"], tuple(best["layers"]), scan


def _merit(seen: Mapping[str, Any]) -> tuple[float, float]:
    return seen["moved"], -seen["surprise"]


def _scan(
    trying: SteeredGeneration, plan: SweepPlan, method: str, places: Sequence[tuple[int, ...]]
) -> list[dict[str, Any]]:
    prompts, sizes = _spread(plan.choose_on, SCAN_QUESTIONS), signed(SCAN_COEFFICIENTS)
    pushes = [Condition("trait", "add", place, size) for place in places for size in sizes]
    answers = answer_all(trying, prompts, plan.candidates[method], [UNSTEERED, *pushes], 1)
    figures = {key: figures_of(rows, trying.threshold, seed=trying.seed) for key, rows in answers.items()}
    coherent = {key: is_coherent(each, figures[UNSTEERED]) for key, each in figures.items()}
    return [{"method": method, "layers": list(place), **_moved(place, sizes, figures, coherent)} for place in places]


def window_of(layer: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """A layer and its neighbours, as many as there are."""
    index = layers.index(layer)
    return layers[max(index - WINDOW // 2, 0) : index + WINDOW // 2 + 1]


def counterpart(place: tuple[int, ...], layers: tuple[int, ...]) -> tuple[int, ...]:
    """What a place is set beside: the window around a single layer, the middle of a window."""
    return window_of(place[0], layers) if len(place) == 1 else (place[len(place) // 2],)


def _moved(
    place: tuple[int, ...], sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """The largest coherent push each way, how far apart the trait's rates are there, and their answers' surprise."""
    largest = largest_coherent(place, sizes, coherent)
    up, down = (_rate("trait", place, largest[side], figures) for side in ("positive", "negative"))
    pushes = [Condition("trait", "add", place, size) for size in largest.values() if size is not None]
    surprise = sum(math.log(figures[push]["perplexity"]) for push in pushes)
    moved = 0.0 if up is None or down is None else up - down
    return {"largest_coherent": largest, "moved": moved, "surprise": surprise}


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _shifts(
    trying: SteeredGeneration,
    plan: SweepPlan,
    directions: LayerDirections,
    conditions: Sequence[Condition],
    unsteered: Sequence[SteeredAnswer],
) -> dict[Condition, float | None]:
    """Each condition's KL to the unsteered next-token distribution, over one unsteered answer to each prompt."""
    found: dict[Condition, list[float]] = {condition: [] for condition in conditions}
    for i, prompt in enumerate(plan.report_on):
        token_ids = unsteered[i * plan.repeats].token_ids
        if not token_ids:
            continue
        steerings = [directions.steering(condition, i) or Steering() for condition in conditions]
        text = (str(i), prompt.token_ids, token_ids)
        for condition, shift in zip(
            conditions, divergences(trying.lm, text, steerings, batch_size=trying.batch_size), strict=True
        ):
            found[condition].append(shift)
    return {condition: statistics.fmean(shifts) if shifts else None for condition, shifts in found.items()}


def _named(condition: Condition) -> dict[str, Any]:
    return {
        "direction": condition.direction,
        "kind": condition.kind,
        "layers": list(condition.layers),
        "coefficient": condition.coefficient,
    }


def _samples(answers: Sequence[SteeredAnswer]) -> list[dict[str, Any]]:
    """The first answer to each of the first questions."""
    first: dict[str, SteeredAnswer] = {}
    for answer in answers:
        first.setdefault(answer.question, answer)
    return [
        {"question": question, "response": answer.text, "score": answer.score}
        for question, answer in list(first.items())[:SAMPLES]
    ]


def reach(
    place: tuple[int, ...], sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """The largest coefficient each way up to which answers stay coherent, and the trait's rate there.

    The coefficient is chosen by coherence, not by the rate that is reported; random directions are read at the same.
    """
    largest = largest_coherent(place, sizes, coherent)
    reached: dict[str, Any] = {side: _rate("trait", place, size, figures) for side, size in largest.items()}
    random = {side: _rate("random", place, size, figures) for side, size in largest.items()}
    return {"largest_coherent": largest, "reached": {**reached, "random": random}}


def largest_coherent(
    place: tuple[int, ...], sizes: Sequence[float], coherent: Mapping[Condition, bool]
) -> dict[str, float | None]:
    """Each way, the last coefficient before the first whose answers are not coherent; None where that is the first."""
    found: dict[str, float | None] = {"positive": None, "negative": None}
    for side, sign in (("positive", 1), ("negative", -1)):
        for size in sorted((size for size in sizes if size * sign > 0), key=abs):
            if not coherent[Condition("trait", "add", place, size)]:
                break
            found[side] = size
    return found


def _rate(direction: str, place: tuple[int, ...], size: float | None, figures: Mapping[Condition, Any]) -> float | None:
    """The rate of a push; a random direction that was not tried at so small a one is read at none."""
    if size is None:
        return None
    tried = figures.get(Condition(direction, "add", place, size), figures.get(UNSTEERED))
    found = None if tried is None else tried["rate"]["value"]
    return None if found is None else float(found)


def strong(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The larger ones, for which controls and several layers are tried: all from the median up."""
    return tuple(sorted(coefficients)[(len(coefficients) - 1) // 2 :])


def signed(coefficients: Iterable[float]) -> list[float]:
    """Both signs, from the most negative up."""
    sizes = sorted(coefficients)
    return [-size for size in reversed(sizes)] + sizes
