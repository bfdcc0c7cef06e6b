"""Numbers as people read them, and what the pictures show in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNDEFINED = "not defined"
MINUS = "\u2212"
FIGURES = {"auroc": "AUROC", "accuracy": "Accuracy", "cohens_d": "Cohen's d"}
EXPLAINED = {
    "auroc": "Take one positive and one negative response at random: the chance that the positive one lies further "
    "along the direction. No unit; 1 is always, 0.5 is guessing.",
    "accuracy": "Share of responses on the right side of a threshold set on other questions, mean of both sides. "
    "50% is guessing.",
    "cohens_d": "Distance between the averages of the two sides, in standard deviations. 0 is none; above 0.8 is "
    "usually called large.",
}
VERDICTS = {
    "usable": "The direction carries the trait on questions that played no part in making it, and does better than "
    "the controls.",
    "weak": "There is a signal, but it falls short of the controls somewhere. Read the reasons before you build on it.",
    "not shown": "This run does not show that the direction carries the trait. That may be the data, the trait or "
    "the model.",
}


def number(value: float | None, digits: int = 2) -> str:
    """`0.97`, with a real minus sign; what has no value is said so."""
    if value is None:
        return UNDEFINED
    shown = f"{value:.{digits}f}"
    return shown.replace("-", MINUS) if float(shown) else f"{0:.{digits}f}"


def percent(value: float | None) -> str:
    """A share of 1 as a percentage."""
    return UNDEFINED if value is None else f"{number(100 * value, 0)}%"


def coefficient(value: float) -> str:
    """A steering coefficient, with its sign."""
    return "0" if value == 0 else f"{'+' if value > 0 else MINUS}{abs(value):g}"


def perplexity(value: float | None) -> str:
    """About three figures."""
    if value is None:
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 else number(value, 1 if value >= 10 else 2)


def shown(figure: str, value: float | None) -> str:
    """A figure in its unit."""
    units = {"accuracy": percent, "rate": percent}
    return units.get(figure, number)(value)


def interval(figure: str, bounded: Mapping[str, Any]) -> str:
    """`0.93 to 1.00`; empty where there is none."""
    low, high = bounded["low"], bounded["high"]
    return "" if low is None or high is None else f"{shown(figure, low)} to {shown(figure, high)}"


def with_interval(figure: str, bounded: Mapping[str, Any]) -> str:
    """`0.97 (0.93 to 1.00)`."""
    around = interval(figure, bounded)
    return shown(figure, bounded["value"]) + (f" ({around})" if around else "")


def counted(n: int, noun: str) -> str:
    """`1 response`, `2,000 responses`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def ranges(layers: Sequence[int]) -> str:
    """`0 to 5`, or the numbers."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else listed([str(layer) for layer in layers])


def layer_words(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 2 to 4`."""
    return f"layer{'' if len(layers) == 1 else 's'} {ranges(layers)}"


def best_of(values: Sequence[float | None]) -> int | None:
    """Where the largest value is; None where there is none."""
    known = [index for index, value in enumerate(values) if value is not None]
    return max(known, key=lambda index: values[index] or 0.0) if known else None


# --- what a picture shows -------------------------------------------------------------------------------------------


def of_layers(card: Mapping[str, Any]) -> str:
    """The AUROC curves in words: the chosen point, and each method's best layer on the test questions."""
    return _of_curves(card, "auroc", "AUROC ")


def of_distances(card: Mapping[str, Any]) -> str:
    """The same of Cohen's d."""
    return _of_curves(card, "cohens_d", "Cohen's d ")


def _of_curves(card: Mapping[str, Any], name: str, title: str) -> str:
    chosen = card["chosen"]
    best = [_best_layer(method, found, card["layers"], name) for method, found in card["methods"].items()]
    return (
        f"Chosen: {chosen['method']} at layer {chosen['layer']}, {title}"
        f"{with_interval(name, chosen['validation'][name])} on the validation questions and "
        f"{with_interval(name, chosen['test'][name])} on the test questions. "
        f"Highest on the test questions, method by method: {'; '.join(best)}."
    )


def _best_layer(method: str, found: Mapping[str, Any], layers: Sequence[int], name: str) -> str:
    values = found["per_layer"]["test"][name]["value"]
    best = best_of(values)
    if best is None:
        return f"{method} {UNDEFINED}"
    same = len(values) > 1 and len({number(value) for value in values}) == 1
    return f"{method} {number(values[best])} at {'every layer' if same else f'layer {layers[best]}'}"


def of_methods(card: Mapping[str, Any]) -> str:
    """The heat map in words: the range of each method over the layers."""
    spans = []
    for name, method in card["methods"].items():
        known = [value for value in method["per_layer"]["test"]["auroc"]["value"] if value is not None]
        spans.append(f"{name} {number(min(known))} to {number(max(known))}" if known else f"{name} {UNDEFINED}")
    return f"Test AUROC from the weakest to the strongest layer: {'; '.join(spans)}."


def of_projections(card: Mapping[str, Any]) -> str:
    """The histograms in words: how many of each side lie on the wrong side of the threshold."""
    held_out, stripped = card["projections"], card["projections"].get("stripped")
    said = f"Held-out responses, as generated: {_sides(held_out, held_out['threshold'])}."
    if stripped:
        said += f" Read again without the instruction: {_sides(stripped, held_out['threshold'])}."
    return said


def _sides(projections: Mapping[str, Any], threshold: float) -> str:
    positive, negative = projections["positive"], projections["negative"]
    right = sum(value > threshold for value in positive)
    left = sum(value <= threshold for value in negative)
    return (
        f"{right} of {counted(len(positive), 'positive response')} above the threshold, "
        f"{left} of {counted(len(negative), 'negative response')} at or below it"
    )


def of_steering(steering: Mapping[str, Any]) -> str:
    """The sweep in words: where it starts, how far it gets, what a random direction does."""
    reached, limit = steering["reached"], steering["largest_coherent"]
    plain = next((c for c in steering["conditions"] if c["kind"] == "none"), None)
    start = "" if plain is None else f"Unsteered, {percent(plain['rate']['value'])} of the answers show the trait. "
    ends = [
        f"{word} steering gets to {percent(reached[side])}"
        + (f" (coherent up to {coefficient(limit[side])})" if limit[side] is not None else " (no coherent strength)")
        for side, word in (("positive", "positive"), ("negative", "negative"))
    ]
    random = reached["random"]
    return (
        f"{start}Where answers stay coherent, {listed(ends)}. A random direction of the same length, at the same "
        f"ends: {percent(random['positive'])} and {percent(random['negative'])}."
    )
