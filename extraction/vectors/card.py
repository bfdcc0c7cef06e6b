"""Build a trait's card: metrics of its directions on questions and instructions that they were not fitted on.

Directions, thresholds and units are fitted on one part of the questions (and, in each fold, on all instructions but
those that are scored). Method and layer are chosen on a second part, and the reported metrics are computed on a third.
Splits are in `splits`, scores in `held_out`, metrics in `metrics`, intervals in `bootstrap`, controls in `controls`,
the verdict in `verdict`.

Shapes: n rows, K methods, L layers, k layers of a block, D hidden, C = K L columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from extraction.core.records import LAYER_CONVENTION
from extraction.vectors.bootstrap import Estimate, Resamples, estimate_metrics, resample_questions
from extraction.vectors.chunked import ChunkedRows, LayerBlock, RowsInMemory, layer_blocks, row_chunks
from extraction.vectors.controls import (
    choose_best,
    choose_for_shuffled_labels,
    fast_methods,
    half_direction_cosines,
    random_direction_metrics,
    random_directions,
    select_draw_layers,
    shuffled_label_scores,
    split_half_cosine,
)
from extraction.vectors.held_out import fit_with_methods, held_out_scores
from extraction.vectors.method_table import DEFAULT_METHODS, find_method
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import auroc, top_1_percent, wrong_side
from extraction.vectors.prepare import check_finite, check_sides, single_threaded
from extraction.vectors.splits import LabelledRows, Split, shuffled_labels, split_rows
from extraction.vectors.verdict import verdict

UNIT = "pooled standard deviations within a side of the fitted rows; 0 is the threshold fitted on them"
CONTROL_QUANTILE = 0.95

Metrics = dict[str, Estimate]


def build_card(  # noqa: PLR0913  # facts of one call, all named
    activations_nLD: Tensor | ChunkedRows,
    labels: Sequence[bool] | Tensor,
    question_ids: Sequence[Any],
    *,
    instruction_ids: Sequence[Any] | None = None,
    layers: Sequence[int],
    seed: int,
    methods: Sequence[str] = DEFAULT_METHODS,
    example_ids: Sequence[str] | None = None,
    without_instruction_nLD: Tensor | ChunkedRows | None = None,
    token_0_ratio_L: Sequence[float] | None = None,
    label_shuffles: int = 3,
    random_draws: int = 20,
    bootstraps: int = 1000,
    judge_facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the card of one trait's rows as JSON: plain numbers, None where a metric is undefined.

    Every validation and test row is scored by a direction that was fitted on neither its question nor its instruction
    (`split_rows`). Layer and method are chosen on validation and reported on test. The controls are chosen and reported
    in the same way. `ChunkedRows` are read once, a block of layers at a time; the measurements that are kept do not
    grow with the hidden size.

    Args:
        labels: True for a positive row.
        question_ids: the question of each row; rows of one question stay in one part.
        instruction_ids: the instruction pair of each row; None for natural prompts.
        layers: the number of each of the L layers in the model.
        example_ids: the rows' ids, for error messages.
        without_instruction_nLD: the same rows, captured again with the instruction removed from the context.
        token_0_ratio_L: norm at the first token over the median of the others.
        label_shuffles: how often to shuffle the labels.
        random_draws: number of random directions.
        bootstraps: number of resamples for the intervals.
        judge_facts: the judge's settings and counts, stored under `judge`.

    Raises:
        ActivationError: an activation is NaN or Inf.
        TraitError: too few questions or rows to split, or no difference between the sides.
    """
    positive_n = torch.as_tensor(labels, dtype=torch.bool)
    instructions = (0,) * len(positive_n) if instruction_ids is None else tuple(instruction_ids)
    rows = LabelledRows(torch.empty(len(positive_n), 0, 0), positive_n, tuple(question_ids), instructions)
    inputs = _CardInputs(
        rows, _as_chunked(activations_nLD), _as_chunked(without_instruction_nLD), tuple(layers), example_ids
    )
    _check_shapes(inputs)
    counts = {"label_shuffles": label_shuffles, "random_draws": random_draws, "bootstraps": bootstraps}
    with single_threaded():
        card = _compute_card(inputs, tuple(methods), counts, seed)
    card["token_0"] = None if token_0_ratio_L is None else {"ratio": [float(ratio) for ratio in token_0_ratio_L]}
    if judge_facts is not None:
        card["judge"] = dict(judge_facts)
    return {**card, "verdict": verdict(card)}


# --- measurements, a block of layers at a time ----------------------------------------------------------------------


@dataclass(frozen=True)
class _CardInputs:
    """Rows without activations, and their activations, to be read a block of layers at a time."""

    rows: LabelledRows
    activations: ChunkedRows
    without_instruction: ChunkedRows | None
    layers: tuple[int, ...]
    example_ids: Sequence[str] | None

    def read_block(self, block: LayerBlock) -> tuple[LabelledRows, Tensor | None]:
        """Read some layers of the rows, and of the rows without their instruction, and check them."""
        rows = self.rows.with_activations(self.activations.read_layers(block.layers))
        others = self.without_instruction
        without_instruction_nkD = None if others is None else others.read_layers(block.layers)
        _check_rows(rows, self.layers[block.layers], self.example_ids, without_instruction_nkD)
        return rows, without_instruction_nkD


def _as_chunked(rows: Any) -> Any:
    return RowsInMemory(rows) if isinstance(rows, Tensor) else rows


def _compute_card(
    inputs: _CardInputs, methods: tuple[str, ...], counts: Mapping[str, int], seed: int
) -> dict[str, Any]:
    split, measured = _measure(inputs, methods, counts, seed)
    results = _evaluate_methods(inputs.rows, split, methods, measured, bootstraps=counts["bootstraps"], seed=seed)
    layers = inputs.layers
    cards = {name: _method_card(results, index, layers) for index, name in enumerate(methods)}
    eligible = [index for index, name in enumerate(methods) if not find_method(name).is_control] or [0]
    chosen = eligible[choose_method([cards[methods[index]]["validation"] for index in eligible])]
    return {
        "layer_convention": LAYER_CONVENTION,
        "layers": [int(layer) for layer in layers],
        "hidden_size": inputs.activations.shape[2],
        "seed": seed,
        "bootstraps": counts["bootstraps"],
        "split": _split_card(inputs.rows, split),
        "typical_norm": _to_json(measured["norms"].mean(0)),
        "methods": cards,
        "chosen": _chosen_card(results, chosen, cards),
        "controls": _controls_card(results, layers),
        "projections": _projections(results, chosen, cards[methods[chosen]]["index"]),
    }


Measurements = dict[str, Tensor]
"""Tensors by name, with layers as the last dimension, so that blocks can be concatenated."""


def _measure(
    inputs: _CardInputs, methods: tuple[str, ...], counts: Mapping[str, int], seed: int
) -> tuple[Split, Measurements]:
    """Take all measurements in one pass over the layers."""
    _, n_layers, hidden_size = inputs.activations.shape
    unit_KLD = random_directions((counts["random_draws"], n_layers, hidden_size), seed=seed)
    of_blocks: list[Measurements] = []
    split: Split | None = None
    for block in layer_blocks(inputs.activations.shape):
        rows, without_instruction_nkD = inputs.read_block(block)
        split = split or split_rows(inputs.rows, seed=seed)
        shuffle_seeds = [seed + 1 + i for i in range(counts["label_shuffles"])]
        of_blocks.append(
            {
                **_measure_methods(rows, split, without_instruction_nkD, methods, block, seed),
                **_measure_shuffled_labels(rows, split, methods, block, shuffle_seeds),
                "random": random_direction_metrics(rows, split, unit_KLD[:, block.layers]),
                "norms": torch.cat([chunk.double().norm(dim=-1) for chunk in row_chunks(rows.activations_nLD)]),
            }
        )
        del rows, without_instruction_nkD  # freed before the next block is read
    assert split is not None
    at_all_layers = [name for name in of_blocks[0] if all(name in measured for measured in of_blocks)]
    return split, {name: torch.cat([measured[name] for measured in of_blocks], -1) for name in at_all_layers}


def _measure_methods(
    rows: LabelledRows,
    split: Split,
    without_instruction_nLD: Tensor | None,
    methods: tuple[str, ...],
    block: LayerBlock,
    seed: int,
) -> Measurements:
    """Measure held-out scores, and each method's direction fitted on all kept rows (the one that stage 3 writes)."""
    others = [] if without_instruction_nLD is None else [without_instruction_nLD]
    fit = fit_with_methods(methods, seed=seed, block=block)
    names = ("scores", "without instruction")
    measured = dict(zip(names, held_out_scores(rows, split, fit, *others), strict=False))
    for name in methods:
        direction_LD = fit_block(name, *rows.sides, block, seed=seed).double()
        measured[f"norm {name}"] = direction_LD.norm(dim=-1)
        measured[f"top_1_percent {name}"] = top_1_percent(direction_LD)
        measured[f"cosines {name}"] = half_direction_cosines(rows, name, block, seed=seed)
    return measured


def _measure_shuffled_labels(
    rows: LabelledRows, split: Split, methods: tuple[str, ...], block: LayerBlock, seeds: Sequence[int]
) -> Measurements:
    """Measure the held-out scores of each shuffle of the labels, where it has any."""
    measured = {}
    for seed in seeds:
        shuffled = rows.with_labels(shuffled_labels(rows, split, seed=seed))
        scores_nKL = shuffled_label_scores(shuffled, split, methods, block, seed=seed)
        if scores_nKL is not None:
            measured[f"shuffled {seed}"] = scores_nKL
    return measured


# --- metrics and choice ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CardResults:
    """Measurements of all methods, and metrics [C] of the parts `validation`, `test` and maybe `stripped`.

    `stripped` is the test part with the instruction removed. Removing it shifts all rows, and each fold's direction
    projects that shift differently: so its AUROC compares rows of the same fold only, while its accuracy stays at the
    threshold of the fitted rows.
    """

    rows: LabelledRows
    split: Split
    methods: tuple[str, ...]
    bootstraps: int
    seed: int
    measured: Measurements
    metrics: Mapping[str, Metrics]

    @property
    def scores_nKL(self) -> Tensor:
        """Held-out scores of the rows."""
        return self.measured["scores"]

    def method_metrics(self, part: str, method: int) -> Metrics:
        """Return the metrics [L] of one method on a part."""
        n_layers = self.scores_nKL.shape[2]
        columns = slice(method * n_layers, (method + 1) * n_layers)
        return {
            name: Estimate(*(values_C[columns] for values_C in vars(estimate).values()))
            for name, estimate in self.metrics[part].items()
        }


def _evaluate_methods(
    rows: LabelledRows, split: Split, methods: tuple[str, ...], measured: Measurements, *, bootstraps: int, seed: int
) -> _CardResults:
    resamples = {part: _resample_part(rows, split, part, bootstraps, seed) for part in ("validation", "test")}
    scores = {part: measured["scores"][split.part_n[part]] for part in resamples}
    if "without instruction" in measured:
        test_n = split.part_n["test"]
        resamples["stripped"] = replace(resamples["test"], stratum_n=split.fold_n()[test_n])
        scores["stripped"] = measured["without instruction"][test_n]
    metrics = {part: estimate_metrics(scores[part].flatten(1), resamples[part]) for part in resamples}
    return _CardResults(rows, split, methods, bootstraps, seed, measured, metrics)


def _resample_part(rows: LabelledRows, split: Split, part: str, count: int, seed: int) -> Resamples:
    of_part = rows.select(split.part_n[part])
    return resample_questions(of_part.positive_n, of_part.question_ids, count=count, seed=seed)


def _best_layer_index(results: _CardResults, method: int) -> int:
    """Return the index of a method's best layer, by the validation part alone."""
    metrics = results.method_metrics("validation", method)
    return choose_best(*(metrics[name].value_C.unsqueeze(0) for name in ("auroc", "cohens_d")))[1]


def choose_method(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the method to take, from each method's validation metrics at its own best layer.

    The highest AUROC. Where several methods share it, as on strong traits, the first whose interval of Cohen's d
    reaches that of the largest: validation has few questions, so ties are left to the order of METHODS, in which
    simpler methods are first (the one-standard-error rule of Breiman et al. 1984, section 3.4.3, with intervals).
    """
    area = max(each["auroc"]["value"] or 0.0 for each in metrics)
    equals = [index for index, each in enumerate(metrics) if (each["auroc"]["value"] or 0.0) == area]
    effects = {index: metrics[index]["cohens_d"] for index in equals if metrics[index]["cohens_d"]["value"] is not None}
    if not effects:
        return equals[0]
    low = _bound_or_value(max(effects.values(), key=lambda effect: float(effect["value"] or 0.0)), "low")
    return next(index for index, effect in effects.items() if _bound_or_value(effect, "high") >= low)


def _bound_or_value(estimate: Mapping[str, float | None], name: str) -> float:
    """Return a bound of an estimate's interval, or the value itself where there is no interval."""
    value = estimate["value"] if estimate[name] is None else estimate[name]
    return float("nan") if value is None else value


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_shapes(inputs: _CardInputs) -> None:
    rows, shape = inputs.rows, inputs.activations.shape
    n, n_layers = shape[:2]
    lengths = {len(rows.positive_n), len(rows.question_ids), len(rows.instruction_ids)}
    if lengths != {n} or n_layers != len(inputs.layers):
        raise ValueError(
            f"activations of {n} rows and {n_layers} layers, {len(rows.positive_n)} labels, {len(rows.question_ids)}"
            f" question ids, {len(rows.instruction_ids)} instruction ids, {len(inputs.layers)} layer numbers"
        )
    if inputs.without_instruction is not None and inputs.without_instruction.shape != shape:
        raise ValueError(f"rows without instruction {inputs.without_instruction.shape}, rows {shape}")


def _check_rows(
    rows: LabelledRows,
    layers: Sequence[int],
    example_ids: Sequence[str] | None,
    without_instruction_nLD: Tensor | None,
) -> None:
    ids = {side: _ids_of_side(rows, example_ids, side) for side in (True, False)}
    check_sides(*rows.sides, layers=layers, positive_ids=ids[True], negative_ids=ids[False])
    if without_instruction_nLD is not None:
        check_finite("positive", without_instruction_nLD[rows.positive_n], layers, ids[True])
        check_finite("negative", without_instruction_nLD[~rows.positive_n], layers, ids[False])


def _ids_of_side(rows: LabelledRows, example_ids: Sequence[str] | None, side: bool) -> list[str] | None:
    if example_ids is None:
        return None
    return [name for name, positive in zip(example_ids, rows.positive_n.tolist(), strict=True) if positive is side]


# --- JSON -----------------------------------------------------------------------------------------------------------


def _split_card(rows: LabelledRows, split: Split) -> dict[str, Any]:
    parts = {name: rows.select(part_n) for name, part_n in split.part_n.items()}
    counts = {
        name: {"questions": len(set(part.question_ids)), "positive": part.counts[0], "negative": part.counts[1]}
        for name, part in parts.items()
    }
    return {**counts, "instruction_folds": len(split.folds)}


def _method_card(results: _CardResults, method: int, layers: Sequence[int]) -> dict[str, Any]:
    """Describe one method. `norm` and `top_1_percent` are of the direction fitted on all kept rows."""
    name, index = results.methods[method], _best_layer_index(results, method)
    test_n = results.split.part_n["test"]
    wrong_L = wrong_side(results.scores_nKL[test_n, method], results.rows.positive_n[test_n])
    parts = {part: results.method_metrics(part, method) for part in results.metrics}
    return {
        "layer": int(layers[index]),
        "index": index,
        **{part: _metrics_at(parts[part], index) for part in ("validation", "test")},
        "wrong_side": float(wrong_L[index]),
        "per_layer": {
            **{part: _metrics_per_layer(parts[part]) for part in ("validation", "test")},
            "norm": _to_json(results.measured[f"norm {name}"]),
            "top_1_percent": _to_json(results.measured[f"top_1_percent {name}"]),
            "split_half_cosine": _to_json(split_half_cosine(results.measured[f"cosines {name}"])),
            "wrong_side": _to_json(wrong_L),
            "stripped": _metrics_per_layer(parts["stripped"]) if "stripped" in parts else None,
        },
    }


def _chosen_card(results: _CardResults, method: int, cards: Mapping[str, Any]) -> dict[str, Any]:
    name = results.methods[method]
    index = cards[name]["index"]
    stripped = "stripped" in results.metrics
    return {
        "method": name,
        **{key: cards[name][key] for key in ("layer", "index", "validation", "test", "wrong_side")},
        **{key: cards[name]["per_layer"][key][index] for key in ("split_half_cosine", "top_1_percent")},
        "test_auroc_by_fold": _auroc_by_fold(results, method, index),
        "stripped": _metrics_at(results.method_metrics("stripped", method), index) if stripped else None,
    }


def _auroc_by_fold(results: _CardResults, method: int, index: int) -> list[float | None]:
    """Compute the test AUROC of each fold's held-out instructions alone; empty where none were held out."""
    if len(results.split.folds) == 1:
        return []
    test_n, positive_n = results.split.part_n["test"], results.rows.positive_n
    areas = []
    for fold in results.split.folds:
        sides_n = (test_n & fold.held_n & (positive_n == side) for side in (True, False))
        areas.append(auroc(*(results.scores_nKL[side_n, method, index].unsqueeze(-1) for side_n in sides_n)))
    return _to_json(torch.cat(areas))


def _controls_card(results: _CardResults, layers: Sequence[int]) -> dict[str, Any]:
    draws = select_draw_layers(results.measured["random"])
    effect_K = draws.cohens_d_K[draws.cohens_d_K.isfinite()]
    shuffles = [int(name.split()[1]) for name in results.measured if name.startswith("shuffled ")]
    return {
        "random": {
            "draws": len(draws.auroc_K),
            "test_auroc": _to_json(draws.auroc_K),
            "median": _quantile(draws.auroc_K, 0.5),
            "high": _quantile(draws.auroc_K, CONTROL_QUANTILE),
            "test_cohens_d": _to_json(draws.cohens_d_K),
            "high_cohens_d": _quantile(effect_K, CONTROL_QUANTILE),
        },
        "placebo_methods": fast_methods(results.methods),
        "shuffled_labels": [_shuffled_labels_card(results, layers, seed) for seed in shuffles],
    }


def _shuffled_labels_card(results: _CardResults, layers: Sequence[int], seed: int) -> dict[str, Any]:
    relabelled = results.rows.with_labels(shuffled_labels(results.rows, results.split, seed=seed))
    scores_nKL = results.measured[f"shuffled {seed}"]
    chosen = choose_for_shuffled_labels(relabelled, results.split, results.methods, scores_nKL)
    resamples = _resample_part(relabelled, results.split, "test", results.bootstraps, results.seed)
    metrics = estimate_metrics(chosen.scores_n[results.split.part_n["test"]].unsqueeze(-1), resamples)
    return {"method": chosen.method, "layer": int(layers[chosen.index]), "test": _metrics_at(metrics, 0)}


def _projections(results: _CardResults, method: int, index: int) -> dict[str, Any]:
    """List the test rows' held-out scores at the chosen method and layer."""

    def by_side(scores_nKL: Tensor) -> dict[str, list[float]]:
        test_n, positive_n = results.split.part_n["test"], results.rows.positive_n
        scores_n = scores_nKL[:, method, index]
        return {"positive": scores_n[test_n & positive_n].tolist(), "negative": scores_n[test_n & ~positive_n].tolist()}

    others_nKL = results.measured.get("without instruction")
    stripped = None if others_nKL is None else by_side(others_nKL)
    return {"threshold": 0.0, **by_side(results.scores_nKL), "unit": UNIT, "stripped": stripped}


def _metrics_at(metrics: Metrics, index: int) -> dict[str, dict[str, float | None]]:
    per_layer = _metrics_per_layer(metrics)
    return {name: {bound: values[index] for bound, values in bounds.items()} for name, bounds in per_layer.items()}


def _metrics_per_layer(metrics: Metrics) -> dict[str, dict[str, list[float | None]]]:
    return {
        name: {bound.removesuffix("_C"): _to_json(values_C) for bound, values_C in vars(estimate).items()}
        for name, estimate in metrics.items()
    }


def _quantile(values_K: Tensor, share: float) -> float | None:
    return float(values_K.quantile(share)) if len(values_K) else None


def _to_json(values_L: Tensor) -> list[float | None]:
    finite_L = torch.isfinite(values_L).tolist()
    return [value if finite else None for value, finite in zip(values_L.tolist(), finite_L, strict=True)]
