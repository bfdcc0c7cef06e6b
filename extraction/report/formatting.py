"""Format numbers for people, and describe in words what each plot shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNDEFINED = "not defined"
MINUS = "\u2212"
FIGURES = {"auroc": "AUROC", "accuracy": "Accuracy", "cohens_d": "Cohen's d"}
EXPLANATIONS = {
    "auroc": "Probability that a random positive response projects further along the direction than a random negative "
    "one. 1 is perfect, 0.5 is chance.",
    "accuracy": "Share of responses on the right side of a threshold that was set on other questions, mean of both "
    "sides. 50% is chance.",
    "cohens_d": "Difference between the means of the two sides, in pooled standard deviations. 0 is none; above 0.8 is "
    "usually called large.",
}
VERDICTS = {
    "usable": "The direction separates the two sides of the trait on held-out test questions, better than the controls "
    "do.",
    "weak": "There is a signal, but it fails at least one control. Read the reasons before you use the vector.",
    "not shown": "This run does not show that the direction carries the trait. The cause may be the data, the trait or "
    "the model.",
}


def number(value: float | None, digits: int = 2) -> str:
    """Return `0.97`, with a typographic minus sign; UNDEFINED for None."""
    if value is None:
        return UNDEFINED
    shown = f"{value:.{digits}f}"
    return shown.replace("-", MINUS) if float(shown) else f"{0:.{digits}f}"


def percent(value: float | None) -> str:
    """Return a share as a percentage: 0.5 is `50%`."""
    return UNDEFINED if value is None else f"{number(100 * value, 0)}%"


def coefficient(value: float) -> str:
    """Return a steering coefficient with its sign: `+0.5`."""
    return "0" if value == 0 else f"{'+' if value > 0 else MINUS}{abs(value):g}"


def perplexity(value: float | None) -> str:
    """Return a perplexity with about three significant digits."""
    if value is None:
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 else number(value, 1 if value >= 10 else 2)


def figure_text(figure: str, value: float | None) -> str:
    """Return a figure in its unit."""
    units = {"accuracy": percent, "rate": percent}
    return units.get(figure, number)(value)


def interval(figure: str, bounded: Mapping[str, Any]) -> str:
    """Return an interval as `0.93 to 1.00`; empty where there is none."""
    low, high = bounded["low"], bounded["high"]
    return "" if low is None or high is None else f"{figure_text(figure, low)} to {figure_text(figure, high)}"


def with_interval(figure: str, bounded: Mapping[str, Any]) -> str:
    """Return a figure with its interval: `0.97 (0.93 to 1.00)`."""
    around = interval(figure, bounded)
    return figure_text(figure, bounded["value"]) + (f" ({around})" if around else "")


def counted(n: int, noun: str) -> str:
    """Return a count with its noun: `1 response`, `2,000 responses`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """Join names: `a`, `a and b`, `a, b and c`; `none` for none."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def ranges(layers: Sequence[int]) -> str:
    """Return layers as `0 to 5` where they are contiguous, else one by one."""
    is_contiguous = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if is_contiguous else listed([str(layer) for layer in layers])


def layer_words(layers: Sequence[int]) -> str:
    """Return `layer 3` or `layers 2 to 4`."""
    return f"layer{'' if len(layers) == 1 else 's'} {ranges(layers)}"


def index_of_largest(values: Sequence[float | None]) -> int | None:
    """Return the index of the largest value; None where none is defined."""
    known = [index for index, value in enumerate(values) if value is not None]
    return max(known, key=lambda index: values[index] or 0.0) if known else None


# --- plots in words: figure captions and text alternatives ------------------------------------------------------------


def describe_layers(card: Mapping[str, Any]) -> str:
    """Describe the AUROC curves: the chosen vector, and each method's best layer on the test questions."""
    return _describe_curves(card, "auroc", "AUROC ")


def describe_distances(card: Mapping[str, Any]) -> str:
    """Describe the curves of Cohen's d, as `describe_layers` does."""
    return _describe_curves(card, "cohens_d", "Cohen's d ")


def _describe_curves(card: Mapping[str, Any], name: str, title: str) -> str:
    chosen = card["chosen"]
    best = [_describe_best(method, figures, card["layers"], name) for method, figures in card["methods"].items()]
    return (
        f"Chosen: {chosen['method']} at layer {chosen['layer']}, {title}"
        f"{with_interval(name, chosen['validation'][name])} on the validation questions and "
        f"{with_interval(name, chosen['test'][name])} on the test questions. "
        f"Best layer of each method on the test questions: {'; '.join(best)}."
    )


def _describe_best(method: str, figures: Mapping[str, Any], layers: Sequence[int], name: str) -> str:
    values = figures["per_layer"]["test"][name]["value"]
    best = index_of_largest(values)
    if best is None:
        return f"{method} {UNDEFINED}"
    same = len(values) > 1 and len({number(value) for value in values}) == 1
    return f"{method} {number(values[best])} at {'every layer' if same else f'layer {layers[best]}'}"


def describe_methods(card: Mapping[str, Any]) -> str:
    """Describe the heat map: each method's range over the layers."""
    spans = []
    for name, method in card["methods"].items():
        known = [value for value in method["per_layer"]["test"]["auroc"]["value"] if value is not None]
        spans.append(f"{name} {number(min(known))} to {number(max(known))}" if known else f"{name} {UNDEFINED}")
    return f"Test AUROC from the weakest to the strongest layer: {'; '.join(spans)}."


def describe_projections(card: Mapping[str, Any]) -> str:
    """Describe the histograms: how many test responses of each side lie on the right side of the threshold."""
    projections, without_instruction = card["projections"], card["projections"].get("stripped")
    words = f"Test responses, as generated: {_describe_sides(projections, projections['threshold'])}."
    if without_instruction:
        words += f" With the instruction removed: {_describe_sides(without_instruction, projections['threshold'])}."
    return words


def _describe_sides(projections: Mapping[str, Any], threshold: float) -> str:
    positive, negative = projections["positive"], projections["negative"]
    right = sum(value > threshold for value in positive)
    left = sum(value <= threshold for value in negative)
    return (
        f"{right} of {counted(len(positive), 'positive response')} above the threshold, "
        f"{left} of {counted(len(negative), 'negative response')} at or below it"
    )


def describe_steering(steering: Mapping[str, Any]) -> str:
    """Describe the sweep: the unsteered rate, the rates reached in both directions, and those of random directions."""
    reached, limit = steering["reached"], steering["largest_coherent"]
    plain = next((c for c in steering["conditions"] if c["kind"] == "none"), None)
    start = "" if plain is None else f"Unsteered, {percent(plain['rate']['value'])} of the responses show the trait. "
    ends = [
        f"{side} steering reaches {percent(reached[side])}"
        + (f" (coherent up to {coefficient(limit[side])})" if limit[side] is not None else " (no coherent coefficient)")
        for side in ("positive", "negative")
    ]
    random = reached["random"]
    return (
        f"{start}While the text stays coherent, {listed(ends)}. Random directions of the same norm, at the same "
        f"coefficients: {percent(random['positive'])} and {percent(random['negative'])}."
    )
