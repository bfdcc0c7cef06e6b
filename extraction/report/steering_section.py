"""The steering part of a report: the sweep, its numbers, and what the model wrote at each strength."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from extraction.report import formatting
from extraction.report.data import ReportData
from extraction.report.markup import Html, join, table, tag
from extraction.report.plot_style import Picture
from extraction.report.sections import figure, section

Condition = Mapping[str, Any]


def steering(facts: ReportData, pictures: Mapping[str, Picture], remedy: str) -> Html:
    """What adding the direction to the model's activations does; `remedy` is the command that measures it."""
    sweep = facts.steering
    if sweep is None or not sweep["conditions"]:
        said = "Not measured in this run: the figures above say that the direction can be read, not that it acts. "
        return section("steering", "What steering does", tag("p", said, "To measure it: ", tag("code", remedy)))
    return section(
        "steering",
        "What steering does",
        tag("p", _design(sweep), _where(sweep, facts.card["chosen"]["layer"])),
        figure(pictures["steering"], "The steering sweep", formatting.of_steering(sweep), EXPLAINED),
        tag("details", tag("summary", "The numbers of the sweep as a table"), _numbers(sweep)),
        _samples(sweep),
    )


EXPLAINED = (
    "Top: the share of answers that the judge puts on the positive side, against the coefficient, which is how much of "
    "the direction is added; the shade is the 95% interval. The direction acts if its line climbs and that of a random "
    "direction of the same length stays flat. Below, what it costs: perplexity (how surprising the text is to the "
    "unsteered model; low is fluent) and KL (how far the next-token probabilities move, in nats; 0 is not at all)."
)


def _design(sweep: Mapping[str, Any]) -> str:
    judge = "no judge" if sweep["judge"] == "none" else f"the {sweep['judge']} judge"
    return (
        f"The {sweep['method']} direction was added to the output of {formatting.layer_words(sweep['layers'])} at "
        f"{sweep['positions']} positions while the model answered {formatting.counted(sweep['questions'], 'question')} with "
        f"no instruction, in at most {sweep['max_new_tokens']} tokens, scored by {judge}. The "
        f"coefficient's unit is the {sweep['unit']}: at 1, what is added is as long as what is there."
    )


def _where(sweep: Mapping[str, Any], layer: int) -> str:
    if sweep["layers"] == [layer]:
        return ""
    return " Where to steer is chosen apart: a trait need not act best at the layer where it is read best."


def _numbers(sweep: Mapping[str, Any]) -> Html:
    heads = ("Condition", "Answers that show the trait", "Mean score (0 to 100)", "Perplexity", "KL (nats per token)",
             "Repeated 4-grams", "Coherent", "Scored")  # fmt: skip
    rows = [
        [
            condition_words(c, sweep["method"]),
            formatting.with_interval("rate", c["rate"]),
            formatting.number(c["score"], 0),
            formatting.perplexity(c["perplexity"]),
            formatting.number(c["kl"], 3),
            formatting.percent(c["repetition"]),
            "yes" if c["coherent"] else "no",
            f"{c['n'] - c['missing']} of {c['n']}",
        ]
        for c in sweep["conditions"]
    ]
    caption = "Every condition of the sweep; rates with their 95% intervals"
    return table(heads, rows, caption=caption, class_="figures dense")


def condition_words(condition: Condition, method: str) -> str:
    """`mean_diff, +0.5, layer 3`; `unsteered`."""
    if condition["kind"] == "none":
        return "unsteered"
    direction = method if condition["direction"] == "trait" else "random direction"
    strength = "removed" if condition["kind"] == "ablate" else formatting.coefficient(condition["coefficient"])
    return f"{direction}, {strength}, {formatting.layer_words(condition['layers'])}"


# --- sample texts ---------------------------------------------------------------------------------------------------


def _samples(sweep: Mapping[str, Any]) -> Html | None:
    """Columns by coefficient, rows by question."""
    columns = _spread(sorted(_with_samples(sweep), key=_place), sweep["largest_coherent"].values())
    questions = list(dict.fromkeys(sample["question"] for c in columns for sample in c["samples"]))
    if not questions:
        return None
    head = tag("tr", (tag("th", *_column_head(c, i), scope="col", id=f"c{i}") for i, c in enumerate(columns)))
    body = [row for n, question in enumerate(questions) for row in _rows(n, question, columns)]
    return join(
        [
            tag("h3", "What the model wrote"),
            tag("p", "The same questions at each strength, from the negative end to the positive."),
            tag(
                "div",
                tag("table", tag("caption", "Sample answers by coefficient"), tag("thead", head), tag("tbody", body)),
                class_="scroller",
                tabindex=0,
                role="region",
                aria_label="Sample answers by coefficient; scrolls sideways",
            ),
        ]
    )


def _with_samples(sweep: Mapping[str, Any]) -> Iterator[Condition]:
    """The unsteered condition, and the vector's own: added where the sweep was made, and removed."""
    for condition in sweep["conditions"]:
        added = condition["kind"] == "add" and condition["layers"] == sweep["layers"]
        mine = condition["direction"] == "trait" and (added or condition["kind"] == "ablate")
        if condition["samples"] and (mine or condition["kind"] == "none"):
            yield condition


def _spread(columns: Sequence[Condition], wanted: Iterable[float | None]) -> list[Condition]:
    """Few enough to be read: of the strengths of each sign, up to four from weak to strong, and the `wanted` ones."""
    kept = set(wanted)
    for sign in (-1, 1):
        strengths = sorted({c["coefficient"] for c in columns if c["coefficient"] * sign > 0}, key=abs)
        last = len(strengths) - 1
        kept |= {strengths[round(last * step / 3)] for step in range(4)} if strengths else set()
    return [c for c in columns if c["coefficient"] in kept or c["coefficient"] == 0]


def _place(condition: Condition) -> tuple[bool, float]:
    return condition["kind"] == "ablate", condition["coefficient"]


def _column_head(condition: Condition, index: int) -> Iterator[Any]:
    yield _strength(condition)
    yield tag("small", f"{formatting.percent(condition['rate']['value'])} show the trait")
    if not condition["coherent"]:
        yield tag("small", "not coherent", class_="broken")


def _strength(condition: Condition) -> str:
    titles = {"none": "0 (unsteered)", "ablate": "direction removed"}
    return titles.get(condition["kind"], formatting.coefficient(condition["coefficient"]))


def _rows(number: int, question: str, columns: Sequence[Condition]) -> Iterator[Html]:
    name = f"q{number}"
    heading = tag("th", tag("span", question), scope="rowgroup", colspan=len(columns), id=name)
    yield tag("tr", heading, class_="question")
    cells = (
        tag("td", *_cell(c, question), headers=f"{name} c{i}", data_label=_strength(c)) for i, c in enumerate(columns)
    )
    yield tag("tr", cells)


def _cell(condition: Condition, question: str) -> Iterator[Any]:
    found = next((sample for sample in condition["samples"] if sample["question"] == question), None)
    if found is None:
        yield tag("em", "no sample")
        return
    yield tag("p", found["response"]) if found["response"].strip() else tag("p", tag("em", "empty answer"))
    yield tag("small", "no score" if found["score"] is None else f"score {formatting.number(found['score'], 0)} of 100")
