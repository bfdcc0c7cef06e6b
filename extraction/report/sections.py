"""The first half of a report: what the trait is, the verdict, key figures beside their controls, and the plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extraction.core.records import Trait
from extraction.report import formatting
from extraction.report.data import ReportData
from extraction.report.markup import Html, image, join, table, tag
from extraction.report.plot_style import Picture

WORDS = {"usable": "usable", "weak": "weak"}  # the word of a verdict: its class; any other is `not-shown`


def section(name: str, title: str, *children: Any) -> Html:
    """A part of the page, with a heading that it is named by."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def figure(picture: Picture, title: str, said: str, explained: str) -> Html:
    """A plot in two renderings on a white card; what it shows is said in words, in sight and as its alternative."""
    (width, height), (narrow_width, narrow_height) = picture.wide_size, picture.narrow_size
    return tag(
        "figure",
        tag("h3", title),
        tag("p", explained),
        tag(
            "picture",
            tag(
                "source",
                media="(max-width: 700px)",
                srcset=image(picture.narrow),
                width=narrow_width,
                height=narrow_height,
            ),
            tag("img", src=image(picture.wide), width=width, height=height, alt=f"{title}. {said}"),
        ),
        tag("figcaption", tag("strong", "In words: "), said),
    )


# --- the trait ------------------------------------------------------------------------------------------------------


def heading(facts: ReportData) -> Html:
    """The trait's name and what it is, with an example of what the two sides were asked."""
    config = facts.config
    return tag(
        "header",
        tag("p", f"Traitline report: experiment {config['name']}, model {config['model']['name']}", class_="kicker"),
        tag("h1", facts.trait.name),
        tag("p", facts.trait.description, class_="lead"),
        _example(facts.trait),
    )


def _example(trait: Trait) -> Html:
    if trait.instructions:
        pair = trait.instructions[0]
        said = f"The model answered the same questions under opposite instructions, {_pairs(trait)}"
        sides = {"Positive side": pair.positive, "Negative side": pair.negative}
    else:
        said = "The model answered natural prompts of two kinds, for example:"
        prompts = {"Positive side": trait.positive_prompts, "Negative side": trait.negative_prompts}
        sides = {side: found[0].prompt for side, found in prompts.items() if found}
    quotes = [tag("div", tag("dt", side), tag("dd", what)) for side, what in sides.items()]
    return join([tag("p", said), tag("dl", quotes, class_="pair")])


def _pairs(trait: Trait) -> str:
    if len(trait.instructions) == 1:
        return f"to {formatting.counted(len(trait.questions), 'question')}:"
    return (
        f"{len(trait.instructions)} pairs of them to {formatting.counted(len(trait.questions), 'question')}; the first:"
    )


# --- the verdict ----------------------------------------------------------------------------------------------------


def verdict(facts: ReportData) -> Html:
    """The word, its reasons, and which vector it is about."""
    card = facts.card
    word = card["verdict"]["word"]
    reasons = tag("ul", (tag("li", reason) for reason in card["verdict"]["reasons"]))
    return section(
        "verdict",
        "Verdict",
        tag("p", tag("span", word, class_=f"word {WORDS.get(word, 'not-shown')}"), class_="verdict"),
        tag("p", formatting.VERDICTS.get(word)) if word in formatting.VERDICTS else None,
        tag("h3", "Why"),
        reasons if card["verdict"]["reasons"] else tag("p", "No reason was recorded."),
        tag("h3", "The vector"),
        tag("p", *_vector(facts)),
    )


def _vector(facts: ReportData) -> Iterator[Any]:
    card, chosen = facts.card, facts.card["chosen"]
    yield f"Method {chosen['method']}, layer {chosen['layer']}"
    if len(card["layers"]) > 1:
        yield f" of {len(card['layers'])} examined ({formatting.ranges(card['layers'])})"
    yield ". It is row "
    yield tag("code", f"direction[{chosen['index']}]")
    yield " of the file "
    yield tag("code", facts.files["vectors"])
    yield f", {card['hidden_size']:,} numbers. Here, {card['layer_convention']}."
    if facts.steering is not None and facts.steering["conditions"]:
        yield from _to_steer(facts.steering, facts.files["steering"], card["layers"])


def _to_steer(steering: Mapping[str, Any], file: str, layers: Sequence[int]) -> Iterator[Any]:
    """Where to steer, which the sweep has chosen apart."""
    rows = formatting.listed([f"direction[{layers.index(layer)}]" for layer in steering["layers"] if layer in layers])
    yield f" To steer with, the sweep chose {steering['method']} at {formatting.layer_words(steering['layers'])} ("
    yield tag("code", rows)
    yield " of "
    yield tag("code", file)
    yield ")."


# --- key figures ----------------------------------------------------------------------------------------------------


def key_figures(facts: ReportData) -> Html:
    """Held-out figures with their intervals, beside what the same procedure makes of nothing."""
    card = facts.card
    test = card["split"]["test"]
    rows = formatting.counted(test["positive"] + test["negative"], "response")
    return section(
        "figures",
        "Key figures",
        tag(
            "p",
            f"All are read on {rows} to {formatting.counted(test['questions'], 'question')} that played no part in making "
            "or choosing the vector. In brackets is the range that would hold the figure 95 times in 100 if other "
            "questions had been drawn. Beside them stand controls: a figure that a control reaches too shows nothing.",
        ),
        table(
            ("Figure", "This vector", "Instruction removed", "Random directions", "Shuffled labels"),
            [_beside_controls(card, name) for name in formatting.FIGURES],
            caption="The chosen vector beside its controls, on test questions",
            class_="figures",
        ),
        _explained_controls(card),
        table(
            ("Also", "Value", "What it means"),
            list(_further(facts)),
            caption="More about the chosen vector",
            class_="figures further",
        ),
    )


def _beside_controls(card: Mapping[str, Any], name: str) -> list[Any]:
    chosen, controls = card["chosen"], card["controls"]
    stripped = _bounded(name, chosen["stripped"][name]) if chosen["stripped"] else "not measured"
    random = _random(controls["random"], name)
    title = join([tag("strong", formatting.FIGURES[name]), tag("small", formatting.EXPLAINED[name])])
    return [title, tag("b", _bounded(name, chosen["test"][name])), stripped, random, _shuffled(card, name)]


def _bounded(figure: str, bounded: Mapping[str, Any]) -> Html:
    """A figure over its interval."""
    around = formatting.interval(figure, bounded)
    return join([formatting.shown(figure, bounded["value"]), tag("small", f"({around})") if around else None])


def _random(random: Mapping[str, Any], name: str) -> str | Html:
    """The median and the 95th percentile of a figure over random directions; the card may have it of AUROC alone."""
    values = sorted(value for value in random.get(f"test_{name}") or () if value is not None)
    high = random["high"] if name == "auroc" else random.get(f"high_{name}")
    if not values or high is None:
        return "not measured"
    middle = random["median"] if name == "auroc" else statistics.median(values)
    return join(
        [f"{formatting.shown(name, middle)} (median)", tag("small", f"95% are below {formatting.shown(name, high)}")]
    )


def _shuffled(card: Mapping[str, Any], name: str) -> str:
    values = [each["test"][name]["value"] for each in card["controls"]["shuffled_labels"]]
    known = sorted(value for value in values if value is not None)
    if not known:
        return formatting.UNDEFINED if values else "not measured"
    low, high = formatting.shown(name, known[0]), formatting.shown(name, known[-1])
    return low if low == high else f"{low} to {high}"


def _explained_controls(card: Mapping[str, Any]) -> Html:
    random, shuffled = card["controls"]["random"], card["controls"]["shuffled_labels"]
    said = {
        "Instruction removed": "the same responses, read again with the instruction taken out of the prompt. What is "
        "left is in the answer itself, and not an echo of being told.",
        "Random directions": f"{formatting.counted(random['draws'], 'direction')} drawn at random, turned the right way "
        "round, and each read at its best layer, as a method is.",
        "Shuffled labels": f"the whole procedure on data whose sides were mixed up, {len(shuffled)} times; lowest to "
        "highest.",
    }
    return tag("dl", [tag("div", tag("dt", name), tag("dd", what)) for name, what in said.items()], class_="controls")


def _further(facts: ReportData) -> Iterator[list[Any]]:
    card, chosen = facts.card, facts.card["chosen"]
    yield [
        "AUROC on validation questions",
        formatting.with_interval("auroc", chosen["validation"]["auroc"]),
        "What layer and method were chosen by. It flatters, since it was picked as the best.",
    ]
    yield [
        "Wrong side",
        formatting.percent(chosen["wrong_side"]),
        "Share of the test responses on the wrong side of the threshold.",
    ]
    yield [
        "Agreement of halves",
        formatting.number(chosen["split_half_cosine"]),
        "Cosine between directions made from two halves of the data: 1 is the same direction, 0 unrelated ones.",
    ]
    yield [
        "In the top 1% of dimensions",
        formatting.percent(chosen["top_1_percent"]),
        "Share of the squared length in the largest 1% of the numbers. Near 100%, a few dimensions make the direction.",
    ]
    yield ["Length", *_length(card)]
    if card["token_0"] is not None:
        yield [
            "First token",
            f"{formatting.number(card['token_0']['ratio'][chosen['index']], 1)} times",
            "Length of the activation at the first token, over the median of the others at this layer. Outliers there "
            "are usual.",
        ]
    if facts.steering is not None:
        yield list(_reach(facts.steering))


def _length(card: Mapping[str, Any]) -> list[str]:
    chosen = card["chosen"]
    norm = card["methods"][chosen["method"]]["per_layer"]["norm"][chosen["index"]]
    typical = card["typical_norm"][chosen["index"]]
    said = f"Euclidean, as stored. A typical activation at this layer has {formatting.number(typical)}: the unit of steering."
    return [formatting.number(norm), said]


def _reach(steering: Mapping[str, Any]) -> Iterator[str]:
    reached = steering["reached"]
    yield "Steering reach"
    yield f"{formatting.percent(reached['negative'])} to {formatting.percent(reached['positive'])}"
    yield (
        "Lowest and highest share of answers that show the trait under steering, while the text stays coherent. "
        "A random direction of the same length, at the same ends: "
        f"{formatting.percent(reached['random']['negative'])} and {formatting.percent(reached['random']['positive'])}."
    )


# --- plots ----------------------------------------------------------------------------------------------------------


def layers(facts: ReportData, pictures: Mapping[str, Picture]) -> Html:
    """Curves and heat map over the layers, and the numbers behind them."""
    card = facts.card
    return section(
        "layers",
        "Where in the model the trait is",
        figure(
            pictures["layers"],
            "How well each layer tells the sides apart",
            formatting.of_layers(card),
            "Each line is a method of making a direction; the shade around it is its 95% interval. The ring is the "
            "chosen vector. The grey line at 0.5 is guessing; 95% of random directions stay under the dashed one. "
            "Where the test curve falls far below the validation curve, the choice was luck.",
        ),
        figure(
            pictures["distances"],
            "How far apart each layer holds the sides",
            formatting.of_distances(card),
            "The same in standard deviations, which has no upper end: where every AUROC is near 1, it still tells "
            "methods and layers apart.",
        ),
        figure(
            pictures["methods"],
            "Every method at every layer",
            formatting.of_methods(card),
            "AUROC on the test questions. Yellow is good, dark blue is guessing; the frame is the chosen vector. If "
            "several methods agree over neighbouring layers, the finding is solid.",
        ),
        tag("details", tag("summary", "The numbers of both plots as a table"), _numbers(card)),
    )


def _numbers(card: Mapping[str, Any]) -> Html:
    rows = [
        [f"{name}, layer {layer}", *(_at(method["per_layer"][part]["auroc"], index) for part in ("validation", "test"))]
        for name, method in card["methods"].items()
        for index, layer in enumerate(card["layers"])
    ]
    heads = ("Vector", "AUROC, validation questions", "AUROC, test questions")
    return table(heads, rows, caption="AUROC of every method and layer, with its 95% interval", class_="figures dense")


def _at(curve: Mapping[str, Sequence[float | None]], index: int) -> str:
    return formatting.with_interval("auroc", {end: curve[end][index] for end in ("value", "low", "high")})


def projections(facts: ReportData, pictures: Mapping[str, Picture]) -> Html:
    """Where held-out responses lie along the direction."""
    return section(
        "projections",
        "How far the two sides lie apart",
        figure(
            pictures["projections"],
            "Held-out responses along the direction",
            formatting.of_projections(facts.card),
            "Each response is one point on the direction; the bars count them. The further apart the two hills, the "
            "better the direction reads the trait. The dashed line is the threshold, set on other questions.",
        ),
    )
