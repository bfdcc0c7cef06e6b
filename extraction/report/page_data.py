"""The values that a report's templates show, computed from what a caller has read of one trait's run.

Pure functions: plain values in, strings and numbers out. The sentences around them are in `templates/`.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.core.records import Trait
from extraction.report import formatting
from extraction.report.formatting import with_interval

Row = Mapping[str, Any]
FIGURES = ("auroc", "accuracy", "cohens_d")
VERDICT_CLASSES = {"usable": "usable", "weak": "weak"}  # CSS class of a verdict; any other has `not-shown`
CONTENTS = {
    "verdict": "Verdict",
    "figures": "Key figures",
    "layers": "Layers",
    "projections": "The two sides",
    "steering": "Steering",
    "responses": "Responses",
    "made": "How it was made",
}


@dataclass(frozen=True)
class ReportData:
    """One trait's run as its files have it.

    Attributes:
        steering: The steering sweep, or None without one.
        kept: Ids of the responses that the filter kept; only these are in the vector and its scores.
        judge: The judge whose score decided: a key of every row's `scores`.
        files: Paths below the run's folder: `vectors` (of the chosen method), `steering` (of the method that the sweep
            chose), and `pos` and `neg` (responses).
        hashes: sha256 by the name of what was hashed.
        made_with: Versions and hardware, from the receipts.
    """

    trait: Trait
    card: Mapping[str, Any]
    steering: Mapping[str, Any] | None
    rows: Sequence[Row]
    kept: Collection[str]
    judge: str
    config: Mapping[str, Any]
    files: Mapping[str, str]
    hashes: Mapping[str, str]
    made_with: Mapping[str, Any]


def run_options(data: ReportData) -> str:
    """Return the options by which commands find the run: `--experiment E --traits T`, quoted for a shell."""
    return f"--experiment {shlex.quote(str(data.config['name']))} --traits {shlex.quote(data.trait.name)}"


def example_prompts(trait: Trait) -> dict[str, str]:
    """Return the first instruction of each side, or the first prompt for a trait of natural prompts."""
    if trait.instructions:
        pair = trait.instructions[0]
        return {"Positive side": pair.positive, "Negative side": pair.negative}
    prompts = {"Positive side": trait.positive_prompts, "Negative side": trait.negative_prompts}
    return {side: found[0].prompt for side, found in prompts.items() if found}


def verdict_values(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdict's word, its explanation, its CSS class and its reasons."""
    word = verdict["word"]
    return {
        "word": word,
        "css_class": verdict_class(word),
        "explanation": formatting.VERDICTS.get(word, ""),
        "reasons": verdict["reasons"],
    }


def verdict_class(word: str) -> str:
    """Return the CSS class of a verdict's word."""
    return VERDICT_CLASSES.get(word, "not-shown")


def steering_vector(data: ReportData) -> dict[str, Any] | None:
    """Return which rows of which file the sweep steered with; None without a sweep."""
    steering, layers = data.steering, data.card["layers"]
    if steering is None or not steering["conditions"]:
        return None
    rows = [f"direction[{layers.index(layer)}]" for layer in steering["layers"] if layer in layers]
    return {
        "method": steering["method"],
        "layers": steering["layers"],
        "rows": formatting.listed(rows),
        "file": data.files["steering"],
    }


# --- key figures ----------------------------------------------------------------------------------------------------


def key_figures(card: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each figure of the chosen vector on the test questions, beside the same figure of every control.

    A control that was not measured is None.
    """
    chosen, controls = card["chosen"], card["controls"]
    for name in FIGURES:
        without_instruction = chosen["stripped"]
        yield {
            "title": formatting.FIGURES[name],
            "explanation": formatting.EXPLANATIONS[name],
            "test": bounded_values(name, chosen["test"][name]),
            "without_instruction": bounded_values(name, without_instruction[name]) if without_instruction else None,
            "random": random_directions(controls["random"], name),
            "shuffled": shuffled_labels(controls["shuffled_labels"], name),
        }


def bounded_values(figure: str, bounded: Mapping[str, Any]) -> dict[str, str]:
    """Return a figure and its interval as strings."""
    return {
        "value": formatting.figure_text(figure, bounded["value"]),
        "interval": formatting.interval(figure, bounded),
    }


def random_directions(random: Mapping[str, Any], name: str) -> dict[str, str] | None:
    """Return the median and the 95th percentile of a figure over random directions; None where not measured."""
    values = sorted(value for value in random.get(f"test_{name}") or () if value is not None)
    high = random["high"] if name == "auroc" else random.get(f"high_{name}")
    if not values or high is None:
        return None
    median = random["median"] if name == "auroc" else statistics.median(values)
    return {"median": formatting.figure_text(name, median), "high": formatting.figure_text(name, high)}


def shuffled_labels(runs: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Return the range of a figure over the runs on shuffled labels; None where not measured."""
    values = [run["test"][name]["value"] for run in runs]
    known = sorted(value for value in values if value is not None)
    if not known:
        return formatting.UNDEFINED if values else None
    low, high = (formatting.figure_text(name, value) for value in (known[0], known[-1]))
    return low if low == high else f"{low} to {high}"


def further_figures(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and explanation of every other figure of the chosen vector."""
    card, chosen = data.card, data.card["chosen"]
    yield (
        "AUROC on validation questions",
        with_interval("auroc", chosen["validation"]["auroc"]),
        "The layer and the method were chosen by it, so it is too optimistic: it is the best of many.",
    )
    yield (
        "Wrong side",
        formatting.percent(chosen["wrong_side"]),
        "Share of the test responses on the wrong side of the threshold.",
    )
    yield (
        "Agreement of halves",
        formatting.number(chosen["split_half_cosine"]),
        "Cosine between the directions fitted on two halves of the data: 1 is the same direction, 0 is unrelated.",
    )
    yield (
        "In the top 1% of dimensions",
        formatting.percent(chosen["top_1_percent"]),
        "Share of the squared norm in the largest 1% of the dimensions. Near 100%, few dimensions make it up.",
    )
    yield ("Length", *vector_norm(card))
    if card["token_0"] is not None:
        yield (
            "First token",
            f"{formatting.number(card['token_0']['ratio'][chosen['index']], 1)} times",
            "Norm of the activation at the first token, over the median norm of the other tokens at this layer. Large "
            "values are usual (attention sinks).",
        )
    if data.steering is not None:
        yield steering_reach(data.steering)


def vector_norm(card: Mapping[str, Any]) -> tuple[str, str]:
    """Return the norm of the chosen vector and its explanation."""
    chosen = card["chosen"]
    norm = card["methods"][chosen["method"]]["per_layer"]["norm"][chosen["index"]]
    typical = formatting.number(card["typical_norm"][chosen["index"]])
    return (
        formatting.number(norm),
        f"Euclidean norm as stored. The typical activation norm at this layer is {typical}: a coefficient of 1.",
    )


def steering_reach(steering: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the range of the rates that coherent steering reaches, and its explanation."""
    random = steering["reached"]["random"]
    return (
        "Steering reach",
        reach_text(steering),
        "Lowest and highest share of responses that show the trait under steering, while the text stays coherent. "
        "Random directions of the same norm, at the same coefficients: "
        f"{formatting.percent(random['negative'])} and {formatting.percent(random['positive'])}.",
    )


def reach_text(steering: Mapping[str, Any]) -> str:
    """Return the lowest and the highest rate that coherent steering reaches."""
    reached = steering["reached"]
    return f"{formatting.percent(reached['negative'])} to {formatting.percent(reached['positive'])}"


def layer_rows(card: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the AUROC of every method and layer on the validation and on the test questions."""
    for name, method in card["methods"].items():
        for index, layer in enumerate(card["layers"]):
            curves = (method["per_layer"][part]["auroc"] for part in ("validation", "test"))
            validation, test = (
                with_interval("auroc", {end: curve[end][index] for end in ("value", "low", "high")}) for curve in curves
            )
            yield f"{name}, layer {layer}", validation, test
