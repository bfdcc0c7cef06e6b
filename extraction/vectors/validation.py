"""What a direction is worth on questions that it has never seen.

n rows, L layers, D hidden. Directions and thresholds are fitted on one part of the questions, method and layer chosen
on a second, and the figures that count are read on a third. Splits live in `splits`, figures in `figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from extraction.vectors.figures import accuracy_at_train_threshold, auroc, cohens_d, energy_in_top, project
from extraction.vectors.methods import CONTROL, DEFAULT_METHODS, Method, find_method
from extraction.vectors.sides import check_sides
from extraction.vectors.splits import TEST_FRACTION, Parts, Rows, check_both_sides, split_by_question, split_in_three

LAYER_CONVENTION = "layer k is the output of decoder block k, counted from 0"


@dataclass(frozen=True)
class Separation:
    """How far one method's directions hold the sides apart, float64 [L] each; NaN where a figure is undefined.

    `accuracy` is the mean of the two sides' accuracies, so a trait with many rows on one side gains nothing by it.
    """

    auroc_L: Tensor
    cohens_d_L: Tensor
    accuracy_L: Tensor


@dataclass(frozen=True)
class Trial:
    """One method's directions [L, D] from the fit part, and how they separate each part."""

    direction_LD: Tensor
    fit: Separation
    validation: Separation
    test: Separation


def separation(direction_LD: Tensor, train: Rows, test: Rows) -> Separation:
    """Read `test` along directions and thresholds of `train`."""
    train_scores, test_scores = (
        (project(positive, direction_LD), project(negative, direction_LD))
        for positive, negative in (train.sides, test.sides)
    )
    return Separation(
        auroc(*test_scores), cohens_d(*test_scores), accuracy_at_train_threshold(train_scores, test_scores)
    )


def held_out(
    method: Method,
    activations_nLD: Tensor,
    labels: Sequence[bool] | Tensor,
    question_ids: Sequence[Any],
    seed: int,
    *,
    fraction: float = TEST_FRACTION,
) -> Separation:
    """Fit on some questions, read on the others. `labels`: True is positive. Choose no layer by what this returns."""
    positive_n = torch.as_tensor(labels, dtype=torch.bool)
    rows = Rows(activations_nLD, positive_n, tuple(question_ids))
    train_questions, test_questions = split_by_question(question_ids, fraction=fraction, seed=seed, positive=positive_n)
    train, test = rows.about(train_questions), rows.about(test_questions)
    check_both_sides("train", train)
    check_both_sides("test", test)
    return separation(method(*train.sides, seed=seed), train, test)


def try_method(method: Method, parts: Parts, *, seed: int) -> Trial:
    """Fit on the fit part, read all three."""
    direction_LD = method(*parts.fit.sides, seed=seed)
    fit, validation, test = (separation(direction_LD, parts.fit, part) for part in vars(parts).values())
    return Trial(direction_LD, fit, validation, test)


def best_layer(validation: Separation) -> int:
    """Index of the layer with the highest AUROC; among equals the largest Cohen's d, then the lowest layer."""
    figures = zip(validation.auroc_L.tolist(), validation.cohens_d_L.nan_to_num(nan=-torch.inf).tolist(), strict=True)
    ranked = [(area, effect, -index) for index, (area, effect) in enumerate(figures)]
    return -max(ranked)[2]


def choose(trials: Mapping[str, Trial]) -> tuple[str, int]:
    """Method and layer index, by the validation part alone; the earlier method among equals."""

    def merit(name: str) -> tuple[float, float]:
        figures = _at(trials[name].validation, best_layer(trials[name].validation))
        effect = figures["cohens_d"]
        return figures["auroc"] or 0.0, -torch.inf if effect is None else effect

    method = max(trials, key=merit)
    return method, best_layer(trials[method].validation)


def build_card(
    activations_nLD: Tensor,
    labels: Sequence[bool] | Tensor,
    question_ids: Sequence[Any],
    *,
    layers: Sequence[int],
    seed: int,
    methods: Sequence[str] = DEFAULT_METHODS,
    example_ids: Sequence[str] | None = None,
    placebos: int = 3,
) -> dict[str, Any]:
    """What the vectors of one trait are worth, JSON-ready: plain numbers, None where a figure is undefined.

    `labels`: True is positive; `layers`: the absolute number of each of the L layers; `question_ids` as
    `question_keys` gives them. `methods.<name>` holds the fit and validation figures of every layer, and the test
    figures of the layer that validation chose; `chosen` is the best of these by validation. The controls go the same
    way: `random` directions, and the methods on labels shuffled within each part, `placebos` times.
    """
    rows = Rows(activations_nLD, torch.as_tensor(labels, dtype=torch.bool), tuple(question_ids))
    _check_rows(rows, layers, example_ids)
    parts = split_in_three(rows, seed=seed)
    trials = {name: try_method(find_method(name), parts, seed=seed) for name in methods}
    method, _ = choose({name: trial for name, trial in trials.items() if name != CONTROL} or trials)
    return {
        "layer_convention": LAYER_CONVENTION,
        "layers": [int(layer) for layer in layers],
        "hidden_size": activations_nLD.shape[2],
        "seed": seed,
        "split": {name: _counts(part) for name, part in vars(parts).items()},
        "methods": {name: _trial_figures(trial, layers) for name, trial in trials.items()},
        "chosen": {"method": method, **_summary(trials[method], layers)},
        "controls": {
            "random": _summary(try_method(find_method(CONTROL), parts, seed=seed), layers),
            "shuffled_labels": [_placebo(parts, methods, layers, seed=seed + 1 + index) for index in range(placebos)],
        },
    }


def _check_rows(rows: Rows, layers: Sequence[int], example_ids: Sequence[str] | None) -> None:
    n, n_layers = rows.activations_nLD.shape[:2]
    if not n == len(rows.positive_n) == len(rows.question_ids) or len(layers) != n_layers:
        raise ValueError(
            f"activations of {n} rows and {n_layers} layers, {len(rows.positive_n)} labels,"
            f" {len(rows.question_ids)} question ids, {len(layers)} layer numbers"
        )
    check_sides(
        *rows.sides,
        layers=layers,
        positive_ids=_ids(rows, example_ids, True),
        negative_ids=_ids(rows, example_ids, False),
    )


def _ids(rows: Rows, example_ids: Sequence[str] | None, side: bool) -> list[str] | None:
    if example_ids is None:
        return None
    return [name for name, positive in zip(example_ids, rows.positive_n.tolist(), strict=True) if positive is side]


def _placebo(parts: Parts, methods: Sequence[str], layers: Sequence[int], *, seed: int) -> dict[str, Any]:
    shuffled = Parts(*(part.shuffled(seed) for part in vars(parts).values()))
    trials = {name: try_method(find_method(name), shuffled, seed=seed) for name in methods}
    method, _ = choose(trials)
    return {"method": method, **_summary(trials[method], layers)}


def _counts(part: Rows) -> dict[str, int]:
    n_positive = int(part.positive_n.sum())
    n_negative = len(part.positive_n) - n_positive
    return {"questions": len(set(part.question_ids)), "positive": n_positive, "negative": n_negative}


def _trial_figures(trial: Trial, layers: Sequence[int]) -> dict[str, Any]:
    return {
        **_summary(trial, layers),
        "per_layer": {
            "norm": _plain(trial.direction_LD.double().norm(dim=-1)),
            "energy_in_top_3": _plain(energy_in_top(trial.direction_LD)),
            "fit": {name: _plain(values) for name, values in _figures(trial.fit).items()},
            "validation": {name: _plain(values) for name, values in _figures(trial.validation).items()},
        },
    }


def _summary(trial: Trial, layers: Sequence[int]) -> dict[str, Any]:
    index = best_layer(trial.validation)
    return {
        "layer": int(layers[index]),
        "fit": _at(trial.fit, index),
        "validation": _at(trial.validation, index),
        "test": _at(trial.test, index),
    }


def _figures(separation: Separation) -> dict[str, Tensor]:
    return {name.removesuffix("_L"): values for name, values in vars(separation).items()}


def _at(separation: Separation, index: int) -> dict[str, float | None]:
    return {name: _plain(values[index : index + 1])[0] for name, values in _figures(separation).items()}


def _plain(values_L: Tensor) -> list[float | None]:
    finite_L = torch.isfinite(values_L).tolist()
    return [value if finite else None for value, finite in zip(values_L.tolist(), finite_L, strict=True)]
