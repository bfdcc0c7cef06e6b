"""The page of a capture set: every response token by token, coloured by its projection onto a trait's direction.

One HTML file that needs nothing else. The projections are in data blocks, one for each prompt and trait, which the
page's script unpacks when they are first shown; without a script there is a table of summaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction import __version__
from extraction.monitoring.colour_scale import (
    COLOURS,
    LEVELS_AT,
    QUANTILE,
    ColourScales,
    colour_scales,
    levels_or_nan,
)
from extraction.monitoring.page_data import CaptureSetData, TextReading
from extraction.monitoring.quantize import (
    MAX_BYTES,
    QuantizationPlan,
    choose_plan,
    encode_base64,
    pack,
    rounded,
)
from extraction.monitoring.summary_table import (
    BINS,
    FIGURES,
    SIDES,
    bars,
    figure_text,
    n_response,
    number,
    summaries,
    summary_at,
)
from extraction.report import formatting, rendering
from extraction.report.formatting import MINUS, layer_words, listed
from extraction.report.provenance import flatten
from extraction.report.rendering import data_block, visible
from extraction.report.response_browser import shorten

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
STYLES = (*rendering.STYLES, TEMPLATES / "captures.css")
SCRIPTS = (TEMPLATES / "charts.js", TEMPLATES / "captures.js")
SEARCH_FROM = 20  # prompts: a longer list has a search box
POINT_LABELS = {
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
TIERS = {2: "2: projections", 3: "3: one layer's internals"}


@dataclass(frozen=True)
class DataBlocks:
    """The data of a page, and the largest error of a value in it."""

    blocks: list[Markup]
    error: float


@dataclass(frozen=True)
class SetRow:
    """A capture set in the index: `n_done` of `n_prompts` prompts are captured; `link` is its page's path, or None."""

    experiment: str
    name: str
    tier: int
    model: str
    traits: Sequence[str]
    layers: Sequence[int]
    n_done: int
    n_prompts: int
    link: str | None


def set_page(data: CaptureSetData, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Render the page of a capture set.

    Projections that take more than `max_bytes` are reduced (points of a layer, bits, layers), and the page states it.
    """
    plan, scales = choose_plan(data, max_bytes), colour_scales(data)
    blocks = data_blocks(data, plan, scales)
    points = [data.points[index] for index in plan.points]
    return rendering.render_page(
        "captures.html.j2",
        folders=(TEMPLATES,),
        styles=STYLES,
        scripts=SCRIPTS,
        title=f"{data.title}: Traitline captures",
        heading=data.title,
        experiment=data.experiment,
        name=data.name,
        model=data.model,
        n_prompts=len(data.readings),
        traits=data.traits,
        has_search=len(data.readings) > SEARCH_FROM,
        n_layers=len(plan.layers),
        points=[POINT_LABELS.get(point, point) for point in points],
        keys=KEYS,
        table=summary_values(data) if data.traits else response_values(data),
        quantile=f"{QUANTILE:.0%}",
        precision=precision_text(data, plan, blocks.error),
        trait_rows=[
            (trait.name, trait.method, trait.layer, levels_text(data, k), trait.description)
            for k, trait in enumerate(data.traits)
        ],
        set_rows=flatten(
            {
                "model": data.model,
                "experiment": data.experiment,
                "capture set": data.name,
                "layers read": layer_words(data.layers),
                "prompts": len(data.readings),
                "page made by traitline": __version__,
            }
        ),
        settings_rows=flatten(data.settings),
        blocks=blocks.blocks,
    )


def sets_index(rows: Sequence[SetRow]) -> bytes:
    """Render the index of an experiment's capture sets, in the given order."""
    experiment = rows[0].experiment if rows else "No capture set"
    return rendering.render_page(
        "captures_index.html.j2",
        folders=(TEMPLATES,),
        title=f"{experiment}: Traitline captures",
        experiment=experiment,
        rows=[{"name": row.name, "link": row.link, "cells": index_cells(row)} for row in rows],
    )


def index_cells(row: SetRow) -> tuple[str, ...]:
    """Return the columns of a set in the index, after its name."""
    return (
        TIERS.get(row.tier, str(row.tier)),
        listed(list(row.traits)),
        formatting.ranges(row.layers) if row.layers else "none",
        f"{row.n_done:,}" if row.n_done == row.n_prompts else f"{row.n_done:,} of {row.n_prompts:,}",
        row.model,
    )


# --- the tables and sentences ---------------------------------------------------------------------------------------


def summary_values(data: CaptureSetData) -> dict[str, Any]:
    """Return the table of all prompts: the summaries of the first trait at the layer that it is shown at first."""
    trait = data.traits[0]
    layer = data.layers.index(trait.layer) if trait.layer in data.layers else 0
    return {
        "caption": f"{trait.name} at layer {data.layers[layer]}, residual out; of the response",
        "heads": ["Prompt", "Tokens", *(head for head, _ in FIGURES.values())],
        "rows": [_prompt_row(reading, summary_cells(reading, trait.name, layer)) for reading in data.readings],
        "meanings": list(FIGURES.values()),
    }


def summary_cells(reading: TextReading, trait: str, layer: int) -> Iterator[str]:
    """Yield the number of response tokens, and the response's summary."""
    yield figure_text("tokens", n_response(reading))
    summary = summary_at(reading, trait, layer)
    yield from (figure_text(figure, summary.get(figure)) for figure in FIGURES)


def response_values(data: CaptureSetData) -> dict[str, Any]:
    """Return the table of all prompts where no trait was read: the responses."""
    return {
        "caption": "All prompts",
        "heads": ["Prompt", "Tokens", "Response"],
        "rows": [
            _prompt_row(reading, [figure_text("tokens", n_response(reading)), reading.response])
            for reading in data.readings
        ],
    }


def _prompt_row(reading: TextReading, cells: Any) -> dict[str, Any]:
    return {"id": reading.id, "prompt": shorten(" ".join(reading.prompt.split()), 120), "cells": list(cells)}


def precision_text(data: CaptureSetData, plan: QuantizationPlan, error: float) -> str:
    """Describe the largest error of the page's values, and which layers and points the page leaves out."""
    near = f"The values on this page are those of the capture files to within {f'{error:.2g}'.replace('-', MINUS)}"
    reductions = []
    if len(plan.points) < len(data.points):
        points = listed([data.points[index] for index in plan.points])
        reductions.append(f"of the points of a layer it holds only {points}")
    if len(plan.layers) < len(data.layers):
        reductions.append(f"of the layers it holds only {layer_words([data.layers[index] for index in plan.layers])}")
    if plan.bits < 16:
        reductions.append(f"values are kept in {plan.bits} bits")
    return f"{near}. The whole set would make it too large: {'; '.join(reductions)}." if reductions else f"{near}."


def levels_text(data: CaptureSetData, k: int) -> str:
    """Return the two levels of the k-th trait at the layer that it is shown at first."""
    trait = data.traits[k]
    if trait.levels_L2 is None or trait.layer not in data.layers:
        return "not known"
    negative, positive = trait.levels_L2[data.layers.index(trait.layer)]
    return f"{number(float(negative))} and {number(float(positive))}"


# --- the data blocks of the script ----------------------------------------------------------------------------------


def data_blocks(data: CaptureSetData, plan: QuantizationPlan, scales: ColourScales) -> DataBlocks:
    """Return the blocks `set`, `trait-<k>`, and for each prompt `text-<s>` and `values-<s>-<k>`."""
    layers = list(plan.layers)
    blocks = [data_block("set", _set_block(data, plan, scales))]
    for k, trait in enumerate(data.traits):
        dynamics = encode_base64(summaries(data.readings, trait.name, layers))
        blocks.append(
            data_block(f"trait-{k}", {"dynamics": dynamics, "bars": encode_base64(bars(data, scales, k, layers))})
        )
    error = 0.0
    for s, reading in enumerate(data.readings):
        blocks.append(data_block(f"text-{s}", _text_block(reading)))
        projections_TLPK = reading.projections_TLPK[:, layers][:, :, list(plan.points)]
        for k in range(len(data.traits)):
            packed = pack(projections_TLPK[..., k], plan.bits)
            error = max(error, packed.error)
            blocks.append(data_block(f"values-{s}-{k}", packed.block))
    return DataBlocks(blocks, error)


def _set_block(data: CaptureSetData, plan: QuantizationPlan, scales: ColourScales) -> dict[str, Any]:
    layers, points = list(plan.layers), list(plan.points)
    return {
        "layers": [data.layers[index] for index in layers],
        "points": [visible(data.points[index]) for index in points],
        "levelsAt": LEVELS_AT,
        "bits": plan.bits,
        "bins": BINS,
        "figures": list(FIGURES),
        "sides": {str(side): name for side, name in SIDES.items()},
        "colours": COLOURS,
        "traits": [_trait_block(data, k, layers, points, scales) for k in range(len(data.traits))],
        "prompts": [
            {
                "id": visible(reading.id),
                "prompt": visible(reading.prompt),
                "prompted": reading.n_prompt,
                "tokens": len(reading.token_ids),
                "answered": n_response(reading),
                "finish": visible(str(reading.finish_reason)),
            }
            for reading in data.readings
        ],
    }


def _trait_block(
    data: CaptureSetData, k: int, layers: list[int], points: list[int], scales: ColourScales
) -> dict[str, Any]:
    trait = data.traits[k]
    shown = [data.layers[index] for index in layers]
    levels_L2 = levels_or_nan(trait, len(data.layers))[layers]
    square = np.ix_(layers, points)
    return {
        "name": visible(trait.name),
        "description": visible(trait.description),
        "method": visible(trait.method),
        "layer": shown.index(trait.layer) if trait.layer in shown else len(shown) // 2,
        "levels": [rounded(level_2) for level_2 in levels_L2],
        "centre": [rounded(row) for row in scales.centre_KLP[k][square]],
        "half": [rounded(row) for row in scales.half_KLP[k][square]],
    }


def _text_block(reading: TextReading) -> Mapping[str, Any]:
    return {
        "pieces": [visible(piece) for piece in reading.pieces],
        "tokens": [visible(token) for token in reading.tokens],
        "ids": [int(number) for number in reading.token_ids],
    }
