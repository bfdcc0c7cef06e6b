"""Numbers as the page says them, and the summaries of the responses: what both the table and the script show.

S prompts, L layers, F figures of a summary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extraction.monitoring.colour_scale import LEVELS_AT, ColourScales
from extraction.monitoring.page_data import CaptureSetData, Dynamics, TextReading
from extraction.report.formatting import MINUS

NONE = "\u2013"
BINS = 24  # of a prompt's colour bar
FIGURES = {  # of a summary: its head in the table, what it is
    "mean": ("Mean", "mean projection over the response"),
    "peak": ("Peak", "largest projection of a response token"),
    "peak_token": ("Peak at", "the token of the peak, counted from 0 in the response"),
    "commitment": (
        "Commits at",
        "the first response token from which on the smoothed projection stays on the side of the threshold where it "
        "ends; none where that is not clear of the noise",
    ),
    "committed_to": (
        "Commits to",
        "the side of the threshold: positive is above it, negative below. The threshold is half way between the "
        "trait's levels where they are known, else the mean over the set's response tokens",
    ),
    "persistence": (
        "Persistence",
        "autocorrelation of neighbouring tokens: near 1 it drifts slowly, 0 is noise, below 0 it swings to and fro",
    ),
    "mean_speed": ("Mean speed", "mean size of the change from one token to the next"),
}
SIDES = {1: "positive", -1: "negative"}


def said(figure: str, value: float | int | None) -> str:
    """A figure of a summary, in words."""
    if value is None or not math.isfinite(value):
        return NONE
    if figure == "committed_to":
        return SIDES.get(int(value), NONE)
    return f"{int(value):,}" if figure in ("peak_token", "commitment", "tokens") else number(value)


def number(value: float) -> str:
    """Four significant digits, a real minus sign."""
    if value and not 1e-4 <= abs(value) < 1e6:
        shown = f"{value:.3e}"
    else:
        shown = f"{value:#.4g}".rstrip(".") if 0 < abs(value) < 1e4 else f"{float(f'{value:.4g}'):.0f}"
    return shown.replace("-", MINUS)


def n_response(reading: TextReading) -> int:
    """Tokens of the response."""
    return len(reading.token_ids) - reading.n_prompt


def summary_at(reading: TextReading, trait: str, layer: int) -> Dynamics:
    """A response's summary at one of the set's layers (an index); empty where none was made."""
    rows = reading.dynamics.get(trait, ())
    return rows[layer] if layer < len(rows) else {}


def summaries(readings: Sequence[TextReading], trait: str, layers: Sequence[int]) -> np.ndarray:
    """FIGURES of every response and layer: [S, L, F] float32, NaN for none."""
    rows = [[_row(summary_at(reading, trait, layer)) for layer in layers] for reading in readings]
    return np.array(rows, dtype=np.float32).reshape(len(readings), len(layers), len(FIGURES))


def _row(summary: Mapping[str, Any]) -> list[float]:
    values = (summary.get(name) for name in FIGURES)
    return [math.nan if value is None else float(value) for value in values]


def bars(facts: CaptureSetData, scales: ColourScales, trait: int, layers: Sequence[int]) -> np.ndarray:
    """The response in BINS equal parts at residual_out, as places on the colour scale: [S, L, BINS] uint8.

    0 is the negative end, 127 the middle, 254 the positive end; 255 where there is no response.
    """
    point = facts.points.index(LEVELS_AT) if LEVELS_AT in facts.points else len(facts.points) - 1
    centre_L, half_L = scales.centre_KLP[trait, layers, point], scales.half_KLP[trait, layers, point]
    found = np.full((len(facts.readings), len(layers), BINS), 255, dtype=np.uint8)
    for index, reading in enumerate(facts.readings):
        x_RL = reading.projections_TLPK[reading.n_prompt :, layers, point, trait]
        if len(x_RL):
            place_BL = np.clip((binned(x_RL) - centre_L) / half_L, -1, 1)
            found[index] = np.rint(127 + 127 * np.nan_to_num(place_BL)).T
    return found


def binned(x_RL: np.ndarray) -> np.ndarray:
    """Means over BINS equal parts of the rows, [BINS, L]; rows are repeated where there are fewer."""
    edges = np.arange(BINS + 1) * len(x_RL) // BINS
    counts = np.maximum(np.diff(edges), 1)[:, None]
    result: np.ndarray = np.add.reduceat(x_RL.astype(np.float64), edges[:-1], axis=0) / counts
    return result
