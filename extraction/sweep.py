"""The steering sweep: choose a layer on some prompts, try all coefficients on others, against random directions.

All prompts are without an instruction. What is reported is JSON-ready.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction.likelihood import divergences
from extraction.steered import UNSTEERED, Answer, Condition, Directions, Trying, answer_all, figures_of, is_coherent
from extraction.steering import Steering

if TYPE_CHECKING:
    from extraction.records import Prompt

COEFFICIENTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ANSWERS = 24  # of every condition
SCAN_COEFFICIENTS = (0.25, 0.5, 1.0, 1.5)
SCAN_QUESTIONS, SCAN_LAYERS = 8, 8
SAMPLES = 4  # answers of a condition that are kept as text


@dataclass(frozen=True)
class Plan:
    """What is tried: prompts to choose a layer by, prompts to report on, and candidates by method."""

    choose_on: Sequence[Prompt]
    report_on: Sequence[Prompt]
    candidates: Mapping[str, Directions]
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
        scan = 1 + 2 * len(SCAN_COEFFICIENTS) * min(len(self.layers), SCAN_LAYERS)
        n_scanned = len(self.candidates) * scan * min(len(self.choose_on), SCAN_QUESTIONS)
        n_strong = len(strong(self.coefficients))
        return n_scanned + (3 + 2 * len(self.coefficients) + 4 * n_strong) * len(self.report_on) * self.repeats


def evaluate(trying: Trying, plan: Plan) -> dict[str, Any]:
    """Choose method and layer on some prompts, sweep the coefficients on the others. JSON-ready.

    The layer that is chosen moves the trait furthest while answers stay coherent. At several layers (the chosen one and
    its neighbours) each gets its share of the coefficient. Ablation removes the direction at every layer of the plan.
    """
    method, layer, scan = choose_place(trying, plan)
    directions = plan.candidates[method]
    place = plan.layers.index(layer)
    several = plan.layers[max(place - 1, 0) : place + 2]
    sizes, larger = signed(plan.coefficients), signed(strong(plan.coefficients))
    conditions = [
        UNSTEERED,
        *(Condition("trait", "add", (layer,), size) for size in sizes),
        *(Condition("random", "add", (layer,), size) for size in larger),
        *(Condition("trait", "add", several, size) for size in larger if len(several) > 1),
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
        "layers": [layer],
        "several_layers": list(several),
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
        **reach(layer, sizes, figures, coherent),
    }


def choose_place(trying: Trying, plan: Plan) -> tuple[str, int, list[dict[str, Any]]]:
    """The method and layer to steer at, and what was seen of all.

    Each is tried at a few coefficients, and counts by how far the trait's rate lies apart between the largest coherent
    push each way.
    """
    layers = _spread(plan.layers, SCAN_LAYERS)
    prompts = _spread(plan.choose_on, SCAN_QUESTIONS)
    sizes = signed(SCAN_COEFFICIENTS)
    scan: list[dict[str, Any]] = []
    for method, directions in plan.candidates.items():
        pushes = [Condition("trait", "add", (layer,), size) for layer in layers for size in sizes]
        answers = answer_all(trying, prompts, directions, [UNSTEERED, *pushes], 1)
        figures = {key: figures_of(rows, trying.threshold, seed=trying.seed) for key, rows in answers.items()}
        coherent = {key: is_coherent(each, figures[UNSTEERED]) for key, each in figures.items()}
        scan += [{"method": method, "layer": layer, **_moved(layer, sizes, figures, coherent)} for layer in layers]
    best = max(scan, key=lambda each: each["moved"])  # the first of equals
    return best["method"], best["layer"], scan


def _moved(
    layer: int, sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """The largest coherent push each way, and how far apart the trait's rates are there; 0 where one is not known."""
    largest = largest_coherent(layer, sizes, coherent)
    rates = {side: _rate("trait", layer, size, figures) for side, size in largest.items()}
    up, down = rates["positive"], rates["negative"]
    return {"largest_coherent": largest, "moved": 0.0 if up is None or down is None else up - down}


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _shifts(
    trying: Trying,
    plan: Plan,
    directions: Directions,
    conditions: Sequence[Condition],
    unsteered: Sequence[Answer],
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


def _samples(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The first answer to each of the first questions."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.question, answer)
    return [
        {"question": question, "response": answer.text, "score": answer.score}
        for question, answer in list(first.items())[:SAMPLES]
    ]


def reach(
    layer: int, sizes: Sequence[float], figures: Mapping[Condition, Any], coherent: Mapping[Condition, bool]
) -> dict[str, Any]:
    """The largest coefficient each way up to which answers stay coherent, and the trait's rate there.

    The coefficient is chosen by coherence, not by the rate that is reported; random directions are read at the same.
    """
    largest = largest_coherent(layer, sizes, coherent)
    reached: dict[str, Any] = {side: _rate("trait", layer, size, figures) for side, size in largest.items()}
    random = {side: _rate("random", layer, size, figures) for side, size in largest.items()}
    return {"largest_coherent": largest, "reached": {**reached, "random": random}}


def largest_coherent(layer: int, sizes: Sequence[float], coherent: Mapping[Condition, bool]) -> dict[str, float | None]:
    """Each way, the last coefficient before the first whose answers are not coherent; None where that is the first."""
    found: dict[str, float | None] = {"positive": None, "negative": None}
    for side, sign in (("positive", 1), ("negative", -1)):
        for size in sorted((size for size in sizes if size * sign > 0), key=abs):
            if not coherent[Condition("trait", "add", (layer,), size)]:
                break
            found[side] = size
    return found


def _rate(direction: str, layer: int, size: float | None, figures: Mapping[Condition, Any]) -> float | None:
    """The rate of a push; a random direction that was not tried at so small a one is read at none."""
    if size is None:
        return None
    tried = figures.get(Condition(direction, "add", (layer,), size), figures.get(UNSTEERED))
    found = None if tried is None else tried["rate"]["value"]
    return None if found is None else float(found)


def strong(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The larger ones, for which controls and several layers are tried: all from the median up."""
    return tuple(sorted(coefficients)[(len(coefficients) - 1) // 2 :])


def signed(coefficients: Iterable[float]) -> list[float]:
    """Both signs, from the most negative up."""
    sizes = sorted(coefficients)
    return [-size for size in reversed(sizes)] + sizes
