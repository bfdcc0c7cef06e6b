"""The parts of a capture set's page: what the script fills, the table over all prompts, and how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extraction import __version__
from extraction.monitoring.colour_scale import QUANTILE
from extraction.monitoring.page_data import CaptureSetData, TextReading
from extraction.monitoring.quantize import QuantizationPlan
from extraction.monitoring.summary_table import FIGURES, n_response, number, said, summary_at
from extraction.report.formatting import MINUS, counted, layer_words, listed
from extraction.report.markup import Html, join, table, tag
from extraction.report.provenance import flat
from extraction.report.sections import section

SEARCHED_ABOVE = 20  # prompts: from here on the list has a search box
POINT_NAMES = {  # of a layer, as the page says them
    "residual_in": "residual in (the block's input)",
    "after_attention": "after attention (before the MLP)",
    "residual_out": "residual out (the block's output)",
}
KEYS = {
    "Tab": "to the text, the heat map and the controls",
    "\u2190 \u2192": "in the text or the heat map: the token before or after",
    "\u2191 \u2193": "in the text or the heat map: one layer up or down",
    "Home End": "in the text or the heat map: the first or the last token",
    "n p": "the next or the previous prompt",
    "t": "the next trait",
    "a": "the next point of the layer",
    "?": "this list",
    "Esc": "closes it",
}
CONVENTIONS = (
    "Row i of the projections is the state where token i is the input. Layer k is the output of decoder block k, "
    "counted from 0. Tokens are counted from 0, those of the response anew.",
    "A projection is the hidden state along the trait's direction, whose length is 1: positive is the trait's positive "
    "side. It has the unit of the model's hidden states, so compare it within a layer, not between layers.",
    "Points of a layer: residual in is the block's input; after attention is the residual stream with what attention "
    "added, before the MLP's norm; residual out is the block's output. Summaries, bars and levels are of residual out.",
)


def frame(facts: CaptureSetData, plan: QuantizationPlan, error: float, blocks: Sequence[Html]) -> Html:
    """The body of the page, in the order in which it is read, and its data."""
    shown = (reader(facts, plan), every_prompt(facts)) if facts.traits else (every_text(facts),)
    parts = (heading(facts), *shown, made(facts, plan, error))
    skip = tag("a", "Skip to the text", href="#text" if facts.traits else "#all", class_="skip")
    status = tag("p", id="status", role="status", aria_live="polite", aria_atomic="true", hidden=True)
    return join([skip, tag("main", parts, class_="wide"), status, keys(), blocks])


def heading(facts: CaptureSetData) -> Html:
    """What set this is, and how to read it in two sentences."""
    traits = listed([trait.name for trait in facts.traits])
    read = (
        f"read token by token along {traits}. Blue tokens lie towards the trait's positive side, orange ones towards "
        "its negative side."
    )
    return tag(
        "header",
        tag("p", f"Traitline captures: experiment {facts.experiment}, set {facts.name}", class_="kicker"),
        tag("h1", facts.title),
        tag(
            "p",
            f"{counted(len(facts.readings), 'prompt')} answered by {facts.model}"
            f"{', ' + read if facts.traits else '. No trait was read.'}",
            class_="lead",
        ),
        tag(
            "noscript",
            tag(
                "p",
                "The coloured text, the heat map and the choice of layer need JavaScript. Without it, the table below "
                "shows the summaries for the first trait and its layer.",
            ),
        ),
    )


# --- what the script fills ------------------------------------------------------------------------------------------


def reader(facts: CaptureSetData, plan: QuantizationPlan) -> Html:
    """The list of prompts beside the chosen one; hidden until the script has filled it."""
    return tag(
        "div", prompts(facts), tag("div", controls(facts, plan), chosen(), class_="stage"), id="app", hidden=True
    )


def prompts(facts: CaptureSetData) -> Html:
    """The list, with a search box where it is long."""
    is_long = len(facts.readings) > SEARCHED_ABOVE
    box = tag("input", type="search", id="find", autocomplete="off", spellcheck="false")
    return tag(
        "nav",
        tag("h2", "Prompts", id="prompts-title"),
        tag("p", "Mean over the response; the bar runs from its first token to its last.", class_="hint"),
        tag("label", "Find", box) if is_long else None,
        tag("p", id="found", role="status", class_="hint", hidden=True),
        tag("ol", id="prompts"),
        id="list",
        aria_labelledby="prompts-title",
    )


def controls(facts: CaptureSetData, plan: QuantizationPlan) -> Html:
    """Layer, trait and point, and what the colours mean."""
    slider = tag("input", type="range", id="layer", min=0, max=len(plan.layers) - 1, step=1, value=0)
    traits = [tag("option", trait.name, value=k) for k, trait in enumerate(facts.traits)]
    points = [facts.points[index] for index in plan.points]
    names = [tag("option", POINT_NAMES.get(point, point), value=p) for p, point in enumerate(points)]
    return tag(
        "div",
        tag("label", tag("span", "Layer ", tag("output", id="layer-said", for_="layer")), slider, class_="slide"),
        tag("label", "Trait", tag("select", traits, id="trait"), hidden=len(traits) < 2),
        tag("label", "Point of the layer", tag("select", names, id="point"), hidden=len(names) < 2),
        tag("button", "Keys (?)", type="button", id="show-keys"),
        legend(),
        class_="controls-bar",
    )


def legend() -> Html:
    """The colour scale, with its values."""
    ends = [tag("span", id=f"legend-{name}") for name in ("low", "centre", "high")]
    return tag(
        "div",
        tag("div", id="legend-bar", aria_hidden="true"),
        tag("div", ends, class_="ends"),
        tag("p", id="legend-said", class_="hint"),
        class_="legend",
    )


def chosen() -> Html:
    """The chosen prompt: its text, the heat map with the line below it, and its summary."""
    return tag(
        "article",
        tag("h2", id="chosen-title"),
        tag("p", id="chosen-facts", class_="hint"),
        tag("p", id="trait-said", class_="hint"),
        tag("div", id="text", tabindex=0, role="listbox", aria_label="Tokens", aria_describedby="text-keys"),
        tag("p", "A bar before a token: from here on the response is committed.", id="commits-said", class_="hint"),
        tag("p", "Arrow keys: left and right by token, up and down by layer.", id="text-keys", class_="hint"),
        tag("h3", "Layers by tokens"),
        tag("p", id="map-said", class_="hint"),
        tag("div", _canvas("map", "Heat map"), _canvas("line", "Line"), class_="plots", id="plots"),
        tag("p", id="line-said", class_="hint"),
        tag("h3", id="dynamics-title"),
        tag("dl", id="dynamics", class_="pair"),
        aria_labelledby="chosen-title",
    )


def _canvas(name: str, label: str) -> Html:
    is_map = name == "map"
    role = "application" if is_map else "img"
    return tag("canvas", id=name, tabindex=0 if is_map else None, role=role, aria_label=label)


def keys() -> Html:
    """The keys, in a dialogue."""
    rows = [tag("div", tag("dt", tag("kbd", key)), tag("dd", what)) for key, what in KEYS.items()]
    close = tag("form", tag("button", "Close", type="submit"), method="dialog")
    return tag(
        "dialog", tag("h2", "Keys", id="keys-title"), tag("dl", rows), close, id="keys", aria_labelledby="keys-title"
    )


# --- in plain HTML --------------------------------------------------------------------------------------------------


def every_prompt(facts: CaptureSetData) -> Html:
    """The summaries of all prompts: for the first trait and layer as it stands, for the chosen ones with a script."""
    trait = facts.traits[0]
    layer = facts.layers.index(trait.layer) if trait.layer in facts.layers else 0
    heads = ["Prompt", "Tokens", *(head for head, _ in FIGURES.values())]
    rows = [[_prompt(reading), *_cells(reading, trait.name, layer)] for reading in facts.readings]
    caption = f"{trait.name} at layer {facts.layers[layer]}, residual out; of the response"
    return section(
        "all",
        "All prompts",
        tag("div", table(heads, rows, caption=caption, class_="every"), class_="sideways", tabindex=0, role="group",
            aria_label="All prompts"),
        tag("details", tag("summary", "What the columns mean"), tag("dl", _meanings(), class_="controls")),
    )  # fmt: skip


def every_text(facts: CaptureSetData) -> Html:
    """Prompts and responses, where no trait was read."""
    rows = [[_prompt(reading), said("tokens", n_response(reading)), reading.response] for reading in facts.readings]
    return section("all", "All prompts", table(("Prompt", "Tokens", "Response"), rows, caption="All prompts"))


def _prompt(reading: TextReading) -> Html:
    words = " ".join(reading.prompt.split())
    return join([reading.id, " ", tag("small", words if len(words) <= 120 else f"{words[:119]}\u2026")])


def _cells(reading: TextReading, trait: str, layer: int) -> Iterator[str]:
    yield said("tokens", n_response(reading))
    summary = summary_at(reading, trait, layer)
    yield from (said(figure, summary.get(figure)) for figure in FIGURES)


def _meanings() -> list[Html]:
    return [tag("div", tag("dt", head), tag("dd", meaning)) for head, meaning in FIGURES.values()]


def made(facts: CaptureSetData, plan: QuantizationPlan, error: float) -> Html:
    """Model, traits, settings, conventions, and what the page left out."""
    traits = [[t.name, t.method, t.layer, _levels(facts, k), t.description] for k, t in enumerate(facts.traits)]
    known: Mapping[str, Any] = {
        "model": facts.model,
        "experiment": facts.experiment,
        "capture set": facts.name,
        "layers read": layer_words(facts.layers),
        "prompts": len(facts.readings),
        "page made by traitline": __version__,
    }
    return section(
        "made",
        "How this was made",
        tag("ul", (tag("li", sentence) for sentence in (*CONVENTIONS, colours_said(), precision(facts, plan, error)))),
        table(
            ("Trait", "Method", "Layer first shown", "Levels there", "What it is"),
            traits,
            caption="Traits; levels are the mean projections of the run's negative and positive responses",
            class_="figures",
        ),
        table(("What", "Value"), flat(known), caption="The set", class_="figures plain"),
        table(("Setting", "Value"), flat(facts.settings), caption="Settings", class_="figures plain")
        if facts.settings
        else None,
    )


def colours_said() -> str:
    """How the colours are chosen."""
    return (
        "The middle of the colours is half way between the trait's two levels where they are known (at residual out), "
        "else the median over the response tokens of the whole set at that layer and point. They reach as far to both "
        f"sides: to the {QUANTILE:.0%} quantile of the distances from the middle, and at least to the levels. What "
        "lies further out, as the first token often does, has the colour of the end; its value is the true one."
    )


def precision(facts: CaptureSetData, plan: QuantizationPlan, error: float) -> str:
    """How near the page's values are to those of the files, and what it does not hold."""
    near = f"The values on this page are those of the capture files to within {f'{error:.2g}'.replace('-', MINUS)}"
    left = []
    if len(plan.points) < len(facts.points):
        left.append(f"of the points of a layer it holds {listed([facts.points[p] for p in plan.points])} alone")
    if len(plan.layers) < len(facts.layers):
        kept = layer_words([facts.layers[index] for index in plan.layers])
        left.append(f"of the layers it holds {kept}")
    if plan.bits < 16:
        left.append(f"values are kept in {plan.bits} bits")
    return f"{near}." if not left else f"{near}. The whole set would make it too large: {'; '.join(left)}."


def _levels(facts: CaptureSetData, k: int) -> str:
    trait = facts.traits[k]
    if trait.levels_L2 is None or trait.layer not in facts.layers:
        return "not known"
    negative, positive = trait.levels_L2[facts.layers.index(trait.layer)]
    return f"{number(float(negative))} and {number(float(positive))}"
