"""The values of a report's steering section: the sweep's table, and sample responses by steering coefficient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from extraction.report import formatting

Condition = Mapping[str, Any]
SWEEP_HEADS = (
    "Condition",
    "Responses that show the trait",
    "Mean score (0 to 100)",
    "Perplexity",
    "KL (nats per token)",
    "Repeated 4-grams",
    "Coherent",
    "Scored",
)


def steering_values(sweep: Mapping[str, Any] | None, read_layer: int) -> dict[str, Any] | None:
    """Return what the steering section shows; None without a sweep. `read_layer`: the layer of the chosen vector."""
    if sweep is None or not sweep["conditions"]:
        return None
    return {
        "sweep": sweep,
        "steers_elsewhere": sweep["layers"] != [read_layer],
        "words": formatting.describe_steering(sweep),
        "heads": SWEEP_HEADS,
        "rows": [condition_row(condition, sweep["method"]) for condition in sweep["conditions"]],
        "samples": sample_values(sweep),
    }


def condition_row(condition: Condition, method: str) -> tuple[str, ...]:
    """Return one condition of the sweep as a row below SWEEP_HEADS."""
    return (
        condition_name(condition, method),
        formatting.with_interval("rate", condition["rate"]),
        formatting.number(condition["score"], 0),
        formatting.perplexity(condition["perplexity"]),
        formatting.number(condition["kl"], 3),
        formatting.percent(condition["repetition"]),
        "yes" if condition["coherent"] else "no",
        f"{condition['n'] - condition['missing']} of {condition['n']}",
    )


def condition_name(condition: Condition, method: str) -> str:
    """Return a condition's name: `mean_diff, +0.5, layer 3`, or `unsteered`."""
    if condition["kind"] == "none":
        return "unsteered"
    direction = method if condition["direction"] == "trait" else "random direction"
    strength = "removed" if condition["kind"] == "ablate" else formatting.coefficient(condition["coefficient"])
    return f"{direction}, {strength}, {formatting.layer_words(condition['layers'])}"


# --- sample responses -----------------------------------------------------------------------------------------------


def sample_values(sweep: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return sample responses, a column a condition and a row a question; None where none were kept."""
    columns = pick_columns(
        sorted(conditions_with_samples(sweep), key=lambda c: (c["kind"] == "ablate", c["coefficient"])),
        sweep["largest_coherent"].values(),
    )
    questions = list(dict.fromkeys(sample["question"] for column in columns for sample in column["samples"]))
    if not questions:
        return None
    return {
        "columns": [
            {"name": column_name(c), "rate": formatting.percent(c["rate"]["value"]), "coherent": c["coherent"]}
            for c in columns
        ],
        "questions": [
            {"question": question, "samples": [find_sample(c, question) for c in columns]} for question in questions
        ],
    }


def conditions_with_samples(sweep: Mapping[str, Any]) -> Iterator[Condition]:
    """Yield the unsteered condition, and the vector's own: added at the sweep's layers, and removed."""
    for condition in sweep["conditions"]:
        is_added = condition["kind"] == "add" and condition["layers"] == sweep["layers"]
        is_trait = condition["direction"] == "trait" and (is_added or condition["kind"] == "ablate")
        if condition["samples"] and (is_trait or condition["kind"] == "none"):
            yield condition


def pick_columns(conditions: Sequence[Condition], wanted: Iterable[float | None]) -> list[Condition]:
    """Pick few enough conditions to read: up to four coefficients of each sign, weak to strong, and those `wanted`."""
    coefficients = set(wanted)
    for sign in (-1, 1):
        strengths = sorted({c["coefficient"] for c in conditions if c["coefficient"] * sign > 0}, key=abs)
        last = len(strengths) - 1
        coefficients |= {strengths[round(last * step / 3)] for step in range(4)} if strengths else set()
    return [c for c in conditions if c["coefficient"] in coefficients or c["coefficient"] == 0]


def column_name(condition: Condition) -> str:
    """Return the heading of a condition's column."""
    names = {"none": "0 (unsteered)", "ablate": "direction removed"}
    return names.get(condition["kind"], formatting.coefficient(condition["coefficient"]))


def find_sample(condition: Condition, question: str) -> dict[str, Any] | None:
    """Return a condition's sample response to a question, with its score as text; None where there is none."""
    sample = next((sample for sample in condition["samples"] if sample["question"] == question), None)
    if sample is None:
        return None
    score = "no score" if sample["score"] is None else f"score {formatting.number(sample['score'], 0)} of 100"
    return {"response": sample["response"], "score": score}
