"""The page of a capture set: every response token by token, in colours, for a trait, a layer and a point of it.

One file that needs nothing else. What it shows stands in blocks of data, one for each prompt and trait, that the
page's script unpacks when they are looked at; without a script there is a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extraction.monitoring.colour_scale import COLOURS, LEVELS_AT, ColourScales, colour_scales, levels_of
from extraction.monitoring.page_data import CaptureSetData
from extraction.monitoring.page_sections import frame
from extraction.monitoring.quantize import MOST_BYTES, QuantizationPlan, encoded, pack, plan_of, rounded
from extraction.monitoring.summary_table import BINS, FIGURES, SIDES, bars, n_response, summaries
from extraction.report.markup import STYLE, Html, data_block, document, visible

HERE = Path(__file__).parent
STYLES = (STYLE, HERE / "reading.css")
SCRIPTS = (HERE / "charts.js", HERE / "reading.js")


@dataclass(frozen=True)
class Blocks:
    """The data of a page, and how far a value in it may be off."""

    blocks: list[Html]
    error: float


def set_page(facts: CaptureSetData, *, most_bytes: int = MOST_BYTES) -> bytes:
    """The whole page. Where the projections would take more than `most_bytes`, less of them, and the page says so."""
    plan, scales = plan_of(facts, most_bytes), colour_scales(facts)
    data = data_of(facts, plan, scales)
    body = frame(facts, plan, data.error, data.blocks)
    return document(f"{facts.title}: Traitline captures", body, styles=STYLES, scripts=SCRIPTS)


def data_of(facts: CaptureSetData, plan: QuantizationPlan, scales: ColourScales) -> Blocks:
    """The blocks: `set`, `trait-<k>`, and of each prompt `text-<s>` and `values-<s>-<k>`."""
    layers = list(plan.layers)
    blocks = [data_block("set", _set(facts, plan, scales))]
    for k, trait in enumerate(facts.traits):
        dynamics = encoded(summaries(facts.readings, trait.name, layers))
        drawn = encoded(bars(facts, scales, k, layers))
        blocks.append(data_block(f"trait-{k}", {"dynamics": dynamics, "bars": drawn}))
    error = 0.0
    for s, reading in enumerate(facts.readings):
        blocks.append(data_block(f"text-{s}", _text(reading)))
        kept_TLPK = reading.projections_TLPK[:, layers][:, :, list(plan.points)]
        for k in range(len(facts.traits)):
            packed = pack(kept_TLPK[..., k], plan.bits)
            error = max(error, packed.error)
            blocks.append(data_block(f"values-{s}-{k}", packed.block))
    return Blocks(blocks, error)


def _set(facts: CaptureSetData, plan: QuantizationPlan, scales: ColourScales) -> dict[str, Any]:
    layers, points = list(plan.layers), list(plan.points)
    return {
        "layers": [facts.layers[index] for index in layers],
        "points": [visible(facts.points[index]) for index in points],
        "levelsAt": LEVELS_AT,
        "bits": plan.bits,
        "bins": BINS,
        "figures": list(FIGURES),
        "sides": {str(side): name for side, name in SIDES.items()},
        "colours": COLOURS,
        "traits": [_trait(facts, k, layers, points, scales) for k in range(len(facts.traits))],
        "prompts": [
            {
                "id": visible(reading.id),
                "prompt": visible(reading.prompt),
                "prompted": reading.n_prompt,
                "tokens": len(reading.token_ids),
                "answered": n_response(reading),
                "finish": visible(str(reading.finish_reason)),
            }
            for reading in facts.readings
        ],
    }


def _trait(facts: CaptureSetData, k: int, layers: list[int], points: list[int], scales: ColourScales) -> dict[str, Any]:
    trait = facts.traits[k]
    kept = [facts.layers[index] for index in layers]
    levels_L2 = levels_of(trait, len(facts.layers))[layers]
    square = np.ix_(layers, points)
    return {
        "name": visible(trait.name),
        "description": visible(trait.description),
        "method": visible(trait.method),
        "layer": kept.index(trait.layer) if trait.layer in kept else len(kept) // 2,
        "levels": [rounded(level_2) for level_2 in levels_L2],
        "centre": [rounded(row) for row in scales.centre_KLP[k][square]],
        "half": [rounded(row) for row in scales.half_KLP[k][square]],
    }


def _text(reading: Any) -> Mapping[str, Any]:
    return {
        "pieces": [visible(piece) for piece in reading.pieces],
        "tokens": [visible(token) for token in reading.tokens],
        "ids": [int(number) for number in reading.token_ids],
    }
