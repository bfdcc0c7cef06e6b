"""What a trait's directions are worth, on questions and instructions that they have never seen: the card.

n rows, K methods, L layers, D hidden, C = K L columns. Directions, thresholds and units are fitted on one part of the
questions (and, in folds, on all instructions but those that are read), method and layer chosen on a second part, and
the figures that count are read on a third. Splits live in `splits`, scores in `reading`, figures in `figures`,
intervals in `bootstrap`, what must be beaten in `controls`, the words in `verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from extraction.vectors.bootstrap import Bounded, Resamples, bounded_figures, resample_questions
from extraction.vectors.chunked import Block, ChunkedRows, RowsInMemory, blocks_of, row_pieces
from extraction.vectors.controls import (
    best,
    draws_of,
    half_cosines,
    is_fast,
    placebo,
    placebo_scores,
    random_directions,
    random_figures,
    split_half_cosine,
)
from extraction.vectors.held_out import by_methods, held_out_scores
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import auroc, top_1_percent, wrong_side
from extraction.vectors.names import CONTROL, DEFAULT_METHODS
from extraction.vectors.prepare import check_finite, check_sides, one_thread
from extraction.vectors.splits import LabelledRows, Split, shuffled_labels, split_rows
from extraction.vectors.verdict import verdict

LAYER_CONVENTION = "layer k is the output of decoder block k, counted from 0"
UNIT = "pooled standard deviations within a side of the fitted rows; 0 is the threshold fitted on them"
CONTROL_QUANTILE = 0.95

Figures = dict[str, Bounded]


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
    stripped_nLD: Tensor | ChunkedRows | None = None,
    token_0_ratio_L: Sequence[float] | None = None,
    placebos: int = 3,
    random_draws: int = 20,
    bootstraps: int = 1000,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the vectors of one trait are worth, JSON-ready: plain numbers, None where a figure is undefined.

    `labels`: True is positive; `layers`: the absolute number of each of the L layers; `question_ids` as
    `question_keys` gives them; `instruction_ids`: the instruction pair of each row, None for natural prompts;
    `stripped_nLD`: the same rows, captured again without the instruction in the context; `facts`: how the judge
    decided (`Kept.facts`), kept in the card under `judge`. Rows that are `Layered` are read once, some layers at a
    time, and what is kept of them doesn't grow with the hidden size.

    Every validation and test row is scored by a direction that saw neither its question nor its instruction
    (`split_rows`). Layer and method are chosen on validation, and reported on test. The controls go the same way:
    `random_draws` random directions, and `placebos` shuffles of the labels.
    """
    positive_n = torch.as_tensor(labels, dtype=torch.bool)
    instructions = (0,) * len(positive_n) if instruction_ids is None else tuple(instruction_ids)
    bare = LabelledRows(torch.empty(len(positive_n), 0, 0), positive_n, tuple(question_ids), instructions)
    given = _Given(bare, _layered(activations_nLD), _layered(stripped_nLD), tuple(layers), example_ids)
    _check_shapes(given)
    counts = {"placebos": placebos, "random_draws": random_draws, "bootstraps": bootstraps}
    with one_thread():
        card = _card(given, tuple(methods), counts, seed)
    card["token_0"] = None if token_0_ratio_L is None else {"ratio": [float(ratio) for ratio in token_0_ratio_L]}
    if facts is not None:
        card["judge"] = dict(facts)
    return {**card, "verdict": verdict(card)}


# --- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What a card is made of: rows without their activations, and those, to be had some layers at a time."""

    bare: LabelledRows
    activations: ChunkedRows
    stripped: ChunkedRows | None
    layers: tuple[int, ...]
    example_ids: Sequence[str] | None

    def at(self, block: Block) -> tuple[LabelledRows, Tensor | None]:
        """The rows and the stripped rows of some layers, checked."""
        rows = self.bare.at(self.activations.at(block.layers))
        stripped_nkD = None if self.stripped is None else self.stripped.at(block.layers)
        _check_rows(rows, self.layers[block.layers], self.example_ids, stripped_nkD)
        return rows, stripped_nkD


def _layered(rows: Any) -> Any:
    return RowsInMemory(rows) if isinstance(rows, Tensor) else rows


def _card(given: _Given, methods: tuple[str, ...], counts: Mapping[str, int], seed: int) -> dict[str, Any]:
    """All of the card that is worked out."""
    split, found = _measure(given, methods, counts, seed)
    trial = _try_methods(given.bare, split, methods, found, bootstraps=counts["bootstraps"], seed=seed)
    layers = given.layers
    own = {name: _method_card(trial, way, layers) for way, name in enumerate(methods)}
    ways = [way for way, name in enumerate(methods) if name != CONTROL] or [0]
    way = ways[choose_method([own[methods[way]]["validation"] for way in ways])]
    return {
        "layer_convention": LAYER_CONVENTION,
        "layers": [int(layer) for layer in layers],
        "hidden_size": given.activations.shape[2],
        "seed": seed,
        "bootstraps": counts["bootstraps"],
        "split": _split_card(given.bare, split),
        "typical_norm": _plain(found["norms"].mean(0)),
        "methods": own,
        "chosen": _chosen_card(trial, way, own),
        "controls": _controls_card(trial, layers, seed),
        "projections": _projections(trial, way, own[methods[way]]["index"]),
    }


Found = dict[str, Tensor]
"""What rows are read for, by name; in every tensor the layers come last."""


def _measure(
    given: _Given, methods: tuple[str, ...], counts: Mapping[str, int], seed: int
) -> tuple[Split, dict[str, Tensor]]:
    """All that is read off the rows, in one pass over their layers."""
    _, n_layers, hidden_size = given.activations.shape
    unit_KLD = random_directions((counts["random_draws"], n_layers, hidden_size), seed=seed)
    found: list[Found] = []
    split: Split | None = None
    for block in blocks_of(given.activations.shape):
        rows, stripped_nkD = given.at(block)
        split = split or split_rows(given.bare, seed=seed)
        found.append(
            {
                **_measure_methods(rows, split, stripped_nkD, methods, block, seed),
                **_measure_placebos(rows, split, methods, block, [seed + 1 + i for i in range(counts["placebos"])]),
                "random": random_figures(rows, split, unit_KLD[:, block.layers]),
                "norms": torch.cat([piece.double().norm(dim=-1) for piece in row_pieces(rows.activations_nLD)]),
            }
        )
        del rows, stripped_nkD  # before the next ones are read
    assert split is not None
    everywhere = [name for name in found[0] if all(name in here for here in found)]
    return split, {name: torch.cat([here[name] for here in found], -1) for name in everywhere}


def _measure_methods(
    rows: LabelledRows, split: Split, stripped_nLD: Tensor | None, methods: tuple[str, ...], block: Block, seed: int
) -> Found:
    """Held-out scores; and of each method's direction of all kept rows, which is the one that stage 3 writes."""
    others = [] if stripped_nLD is None else [stripped_nLD]
    fit = by_methods(methods, seed=seed, block=block)
    found = dict(zip(("scores", "stripped"), held_out_scores(rows, split, fit, *others), strict=False))
    for name in methods:
        direction_LD = fit_block(name, *rows.sides, block, seed=seed).double()
        found[f"norm {name}"] = direction_LD.norm(dim=-1)
        found[f"top_1_percent {name}"] = top_1_percent(direction_LD)
        found[f"cosines {name}"] = half_cosines(rows, name, block, seed=seed)
    return found


def _measure_placebos(
    rows: LabelledRows, split: Split, methods: tuple[str, ...], block: Block, seeds: Sequence[int]
) -> Found:
    """Each shuffle's scores, where it has any."""
    found = {}
    for seed in seeds:
        shuffled = rows.relabelled(shuffled_labels(rows, split, seed=seed))
        scores_nKL = placebo_scores(shuffled, split, methods, block, seed=seed)
        if scores_nKL is not None:
            found[f"placebo {seed}"] = scores_nKL
    return found


@dataclass(frozen=True)
class _Trial:
    """All methods' held-out scores [n, K, L] and figures [C]; `stripped`, where given, are of the test part.

    Removing the instruction moves all rows, and each fold's direction reads that as another shift: so the stripped
    AUROC compares rows of the same fold only, while its accuracy stays at the threshold of the fitted rows.
    """

    rows: LabelledRows
    split: Split
    methods: tuple[str, ...]
    bootstraps: int
    seed: int
    found: Found
    figures: Mapping[str, Figures]

    @property
    def scores_nKL(self) -> Tensor:
        """Held-out scores of the rows."""
        return self.found["scores"]

    def at(self, part: str, way: int) -> Figures:
        """One method's figures [L]."""
        n_layers = self.scores_nKL.shape[2]
        own = slice(way * n_layers, (way + 1) * n_layers)
        return {
            name: Bounded(*(ends_C[own] for ends_C in vars(figure).values()))
            for name, figure in self.figures[part].items()
        }


def _try_methods(
    rows: LabelledRows, split: Split, methods: tuple[str, ...], found: Found, *, bootstraps: int, seed: int
) -> _Trial:
    resamples = {part: _resamples(rows, split, part, bootstraps, seed) for part in ("validation", "test")}
    scores = {part: found["scores"][split.part_n[part]] for part in resamples}
    if "stripped" in found:
        test_n = split.part_n["test"]
        resamples["stripped"] = replace(resamples["test"], stratum_n=split.fold_n()[test_n])
        scores["stripped"] = found["stripped"][test_n]
    figures = {part: bounded_figures(scores[part].flatten(1), resamples[part]) for part in resamples}
    return _Trial(rows, split, methods, bootstraps, seed, found, figures)


def _resamples(rows: LabelledRows, split: Split, part: str, count: int, seed: int) -> Resamples:
    own = rows.pick(split.part_n[part])
    return resample_questions(own.positive_n, own.question_ids, count=count, seed=seed)


def _layer(trial: _Trial, way: int) -> int:
    """Index of a method's best layer, by the validation part alone."""
    figures = trial.at("validation", way)
    return best(*(figures[name].value_C.unsqueeze(0) for name in ("auroc", "cohens_d")))[1]


def choose_method(figures: Sequence[Mapping[str, Any]]) -> int:
    """Which of several methods' validation figures, each at its own best layer, is the one to take.

    The highest AUROC. Where several have that, as strong traits make them, the first whose interval of Cohen's d
    reaches that of the largest: validation has few questions, and what they can't tell apart is left to the order, in
    which simpler methods come first (the one-standard-error rule of Breiman et al. 1984, section 3.4.3, with
    intervals).
    """
    area = max(each["auroc"]["value"] or 0.0 for each in figures)
    equals = [place for place, each in enumerate(figures) if (each["auroc"]["value"] or 0.0) == area]
    effects = {place: figures[place]["cohens_d"] for place in equals if figures[place]["cohens_d"]["value"] is not None}
    if not effects:
        return equals[0]
    low = _end(max(effects.values(), key=lambda effect: float(effect["value"] or 0.0)), "low")
    return next(place for place, effect in effects.items() if _end(effect, "high") >= low)


def _end(figure: Mapping[str, float | None], name: str) -> float:
    """An end of a figure's interval; the figure itself where it has none."""
    value = figure["value"] if figure[name] is None else figure[name]
    return float("nan") if value is None else value


def _check_shapes(given: _Given) -> None:
    bare, shape = given.bare, given.activations.shape
    n, n_layers = shape[:2]
    if not n == len(bare.positive_n) == len(bare.question_ids) == len(bare.instruction_ids) or n_layers != len(
        given.layers
    ):
        raise ValueError(
            f"activations of {n} rows and {n_layers} layers, {len(bare.positive_n)} labels, {len(bare.question_ids)}"
            f" question ids, {len(bare.instruction_ids)} instruction ids, {len(given.layers)} layer numbers"
        )
    if given.stripped is not None and given.stripped.shape != shape:
        raise ValueError(f"stripped rows {given.stripped.shape}, rows {shape}")


def _check_rows(
    rows: LabelledRows, layers: Sequence[int], example_ids: Sequence[str] | None, stripped_nLD: Tensor | None
) -> None:
    ids = {side: _ids(rows, example_ids, side) for side in (True, False)}
    check_sides(*rows.sides, layers=layers, positive_ids=ids[True], negative_ids=ids[False])
    if stripped_nLD is not None:
        check_finite("positive", stripped_nLD[rows.positive_n], layers, ids[True])
        check_finite("negative", stripped_nLD[~rows.positive_n], layers, ids[False])


def _ids(rows: LabelledRows, example_ids: Sequence[str] | None, side: bool) -> list[str] | None:
    if example_ids is None:
        return None
    return [name for name, positive in zip(example_ids, rows.positive_n.tolist(), strict=True) if positive is side]


# --- the words ------------------------------------------------------------------------------------------------------


def _split_card(rows: LabelledRows, split: Split) -> dict[str, Any]:
    parts = {name: rows.pick(here_n) for name, here_n in split.part_n.items()}
    counts = {
        name: {"questions": len(set(part.question_ids)), "positive": part.counts[0], "negative": part.counts[1]}
        for name, part in parts.items()
    }
    return {**counts, "instruction_folds": len(split.folds)}


def _method_card(trial: _Trial, way: int, layers: Sequence[int]) -> dict[str, Any]:
    """`norm` and `top_1_percent` are of the direction of all kept rows, which is the one that stage 3 writes."""
    name, index = trial.methods[way], _layer(trial, way)
    test_n = trial.split.part_n["test"]
    wrong_L = wrong_side(trial.scores_nKL[test_n, way], trial.rows.positive_n[test_n])
    return {
        "layer": int(layers[index]),
        "index": index,
        **{part: _bounded_at(trial.at(part, way), index) for part in ("validation", "test")},
        "wrong_side": float(wrong_L[index]),
        "per_layer": {
            **{part: _per_layer(trial.at(part, way)) for part in ("validation", "test")},
            "norm": _plain(trial.found[f"norm {name}"]),
            "top_1_percent": _plain(trial.found[f"top_1_percent {name}"]),
            "split_half_cosine": _plain(split_half_cosine(trial.found[f"cosines {name}"])),
            "wrong_side": _plain(wrong_L),
            "stripped": _per_layer(trial.at("stripped", way)) if "stripped" in trial.figures else None,
        },
    }


def _chosen_card(trial: _Trial, way: int, own: Mapping[str, Any]) -> dict[str, Any]:
    name = trial.methods[way]
    index = own[name]["index"]
    return {
        "method": name,
        **{key: own[name][key] for key in ("layer", "index", "validation", "test", "wrong_side")},
        **{key: own[name]["per_layer"][key][index] for key in ("split_half_cosine", "top_1_percent")},
        "test_auroc_by_fold": _auroc_by_fold(trial, way, index),
        "stripped": _bounded_at(trial.at("stripped", way), index) if "stripped" in trial.figures else None,
    }


def _auroc_by_fold(trial: _Trial, way: int, index: int) -> list[float | None]:
    """The test AUROC of each fold's held-out instructions alone; empty where none were held out."""
    if len(trial.split.folds) == 1:
        return []
    test_n, positive_n = trial.split.part_n["test"], trial.rows.positive_n
    found = []
    for fold in trial.split.folds:
        own = (test_n & fold.held_n & (positive_n == side) for side in (True, False))
        found.append(auroc(*(trial.scores_nKL[own_n, way, index].unsqueeze(-1) for own_n in own)))
    return _plain(torch.cat(found))


def _controls_card(trial: _Trial, layers: Sequence[int], seed: int) -> dict[str, Any]:
    found = draws_of(trial.found["random"])
    effect_K = found.cohens_d_K[found.cohens_d_K.isfinite()]
    return {
        "random": {
            "draws": len(found.auroc_K),
            "test_auroc": _plain(found.auroc_K),
            "median": _quantile(found.auroc_K, 0.5),
            "high": _quantile(found.auroc_K, CONTROL_QUANTILE),
            "test_cohens_d": _plain(found.cohens_d_K),
            "high_cohens_d": _quantile(effect_K, CONTROL_QUANTILE),
        },
        "placebo_methods": is_fast(trial.methods),
        "shuffled_labels": [
            _placebo_card(trial, layers, int(name.split()[1])) for name in trial.found if name.startswith("placebo ")
        ],
    }


def _placebo_card(trial: _Trial, layers: Sequence[int], seed: int) -> dict[str, Any]:
    relabelled = trial.rows.relabelled(shuffled_labels(trial.rows, trial.split, seed=seed))
    found = placebo(relabelled, trial.split, trial.methods, trial.found[f"placebo {seed}"])
    resamples = _resamples(relabelled, trial.split, "test", trial.bootstraps, trial.seed)
    figures = bounded_figures(found.scores_n[trial.split.part_n["test"]].unsqueeze(-1), resamples)
    return {"method": found.method, "layer": int(layers[found.index]), "test": _bounded_at(figures, 0)}


def _projections(trial: _Trial, way: int, index: int) -> dict[str, Any]:
    """The held-out test rows themselves, at the chosen method and layer."""

    def sides(scores_nKL: Tensor) -> dict[str, list[float]]:
        test_n, positive_n = trial.split.part_n["test"], trial.rows.positive_n
        scores_n = scores_nKL[:, way, index]
        return {"positive": scores_n[test_n & positive_n].tolist(), "negative": scores_n[test_n & ~positive_n].tolist()}

    stripped = sides(trial.found["stripped"]) if "stripped" in trial.found else None
    return {"threshold": 0.0, **sides(trial.scores_nKL), "unit": UNIT, "stripped": stripped}


def _bounded_at(figures: Figures, index: int) -> dict[str, dict[str, float | None]]:
    layers = {name: _ends(figure) for name, figure in figures.items()}
    return {name: {end: values[index] for end, values in ends.items()} for name, ends in layers.items()}


def _per_layer(figures: Figures) -> dict[str, dict[str, list[float | None]]]:
    return {name: _ends(figure) for name, figure in figures.items()}


def _ends(figure: Bounded) -> dict[str, list[float | None]]:
    return {name.removesuffix("_C"): _plain(values_C) for name, values_C in vars(figure).items()}


def _quantile(values_K: Tensor, share: float) -> float | None:
    return float(values_K.quantile(share)) if len(values_K) else None


def _plain(values_L: Tensor) -> list[float | None]:
    finite_L = torch.isfinite(values_L).tolist()
    return [value if finite else None for value, finite in zip(values_L.tolist(), finite_L, strict=True)]
