"""Format the numbers of a capture set's page, and collect the responses' summaries for its table and its script.

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
BINS = 24  # parts of a prompt's colour bar
FIGURES = {  # figure of a summary -> heading in the table, explanation
    "mean": ("Mean", "mean projection over the response"),
    "peak": ("Peak", "largest projection of a response token"),
    "peak_token": ("Peak at", "the token of the peak, counted from 0 in the response"),
    "commitment": (
        "Commits at",
        "the first response token from which on the smoothed projection stays on the side of the threshold where it "
        "ends; none where that is not distinguishable from noise",
    ),
    "committed_to": (
        "Commits to",
        "the side of the threshold: positive is above it, negative below. The threshold is half way between the "
        "trait's levels where they are known, else the mean over the set's response tokens",
    ),
    "persistence": (
        "Persistence",
        "lag-1 autocorrelation over tokens: near 1 it drifts slowly, 0 is white noise, below 0 it alternates",
    ),
    "mean_speed": ("Mean speed", "mean absolute change from one token to the next"),
}
SIDES = {1: "positive", -1: "negative"}


def figure_text(figure: str, value: float | int | None) -> str:
    """Return a figure of a summary as text; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    if figure == "committed_to":
        return SIDES.get(int(value), NONE)
    return f"{int(value):,}" if figure in ("peak_token", "commitment", "tokens") else number(value)


def number(value: float) -> str:
    """Return a number with four significant digits and a typographic minus sign."""
    if value and not 1e-4 <= abs(value) < 1e6:
        shown = f"{value:.3e}"
    else:
        shown = f"{value:#.4g}".rstrip(".") if 0 < abs(value) < 1e4 else f"{float(f'{value:.4g}'):.0f}"
    return shown.replace("-", MINUS)


def n_response(reading: TextReading) -> int:
    """Return the number of response tokens."""
    return len(reading.token_ids) - reading.n_prompt


def summary_at(reading: TextReading, trait: str, layer: int) -> Dynamics:
    """Return a response's summary at one of the set's layers (an index); empty where there is none."""
    rows = reading.dynamics.get(trait, ())
    return rows[layer] if layer < len(rows) else {}


def summaries(readings: Sequence[TextReading], trait: str, layers: Sequence[int]) -> np.ndarray:
    """Return FIGURES of every response and layer: [S, L, F] float32, NaN for None."""
    rows = [[_row(summary_at(reading, trait, layer)) for layer in layers] for reading in readings]
    return np.array(rows, dtype=np.float32).reshape(len(readings), len(layers), len(FIGURES))


def _row(summary: Mapping[str, Any]) -> list[float]:
    values = (summary.get(name) for name in FIGURES)
    return [math.nan if value is None else float(value) for value in values]


def bars(data: CaptureSetData, scales: ColourScales, trait: int, layers: Sequence[int]) -> np.ndarray:
    """Average every response over BINS equal parts at residual_out, as codes of the colour scale: [S, L, BINS] uint8.

    0 is the negative end, 127 the middle, 254 the positive end; 255 where there is no response.
    """
    point = data.points.index(LEVELS_AT) if LEVELS_AT in data.points else len(data.points) - 1
    centre_L, half_L = scales.centre_KLP[trait, layers, point], scales.half_KLP[trait, layers, point]
    codes = np.full((len(data.readings), len(layers), BINS), 255, dtype=np.uint8)
    for index, reading in enumerate(data.readings):
        x_RL = reading.projections_TLPK[reading.n_prompt :, layers, point, trait]
        if len(x_RL):
            place_BL = np.clip((binned(x_RL) - centre_L) / half_L, -1, 1)
            codes[index] = np.rint(127 + 127 * np.nan_to_num(place_BL)).T
    return codes


def binned(x_RL: np.ndarray) -> np.ndarray:
    """Average rows [R, L] over BINS equal parts: [BINS, L]; rows are repeated where there are fewer."""
    edges = np.arange(BINS + 1) * len(x_RL) // BINS
    counts = np.maximum(np.diff(edges), 1)[:, None]
    result: np.ndarray = np.add.reduceat(x_RL.astype(np.float64), edges[:-1], axis=0) / counts
    return result
