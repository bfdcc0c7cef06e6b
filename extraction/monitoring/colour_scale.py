"""Colour scales: the middle and the half-width of each, and the colours, the same for every prompt of a set.

L layers, P points of a layer, K traits, N tokens of responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extraction.monitoring.page_data import CaptureSetData, TextReading, TraitData

LEVELS_AT = "residual_out"  # the point at which the reference levels are measured
MAX_TOKENS = 20_000  # that a scale is computed from, evenly spaced
QUANTILE = 0.98  # of the distances from the middle; values beyond it have the colour of the end
COLOURS = {  # from the trait's negative side over the middle to the positive one; lightness falls or rises evenly
    "light": ("#8a3000", "#cc5a12", "#ee9a5b", "#fbd3b0", "#f4f4f4", "#bfdcef", "#74b2da", "#2a7fb8", "#004a78"),
    "dark": ("#ffb98a", "#e98440", "#b35a1e", "#63371a", "#262a31", "#1b4460", "#2a73a6", "#58a5dc", "#a8d8ff"),
}


@dataclass(frozen=True)
class ColourScales:
    """Colours run from centre - half to centre + half: both [K, L, P] float64, half above 0."""

    centre_KLP: np.ndarray
    half_KLP: np.ndarray


def colour_scales(data: CaptureSetData) -> ColourScales:
    """Compute the scale of every trait, layer and point over the response tokens of the whole set.

    The middle is half way between the trait's two levels where they are known, else the median. The half-width is a
    quantile of the distances from it, so that a few huge values do not flatten the colours, and at least the distance
    to the levels.
    """
    sample_NLPK = response_sample(data.readings, (len(data.layers), len(data.points), len(data.traits)))
    centre_LPK = _median(sample_NLPK)
    levels = [levels_or_nan(trait, len(data.layers)) for trait in data.traits]
    levels_KL2 = np.array(levels).reshape(-1, len(data.layers), 2)
    point = data.points.index(LEVELS_AT) if LEVELS_AT in data.points else None
    known_LK = np.isfinite(levels_KL2).all(-1).T
    if point is not None:
        centre_LPK[:, point][known_LK] = levels_KL2.mean(-1).T[known_LK]
    half_LPK = _reach(sample_NLPK, centre_LPK)
    if point is not None:
        reach_LK = np.abs(levels_KL2[..., 1] - levels_KL2[..., 0]).T / 2
        half_LPK[:, point][known_LK] = np.maximum(half_LPK[:, point], reach_LK)[known_LK]
    half_LPK[half_LPK <= 0] = 1.0
    return ColourScales(np.moveaxis(centre_LPK, -1, 0), np.moveaxis(half_LPK, -1, 0))


def response_sample(readings: Sequence[TextReading], shape: tuple[int, int, int]) -> np.ndarray:
    """Return the projections of response tokens, [N, L, P, K]: all, or evenly spaced tokens of a large set."""
    total = sum(len(reading.token_ids) - reading.n_prompt for reading in readings)
    step = -(-total // MAX_TOKENS) or 1
    parts = [reading.projections_TLPK[reading.n_prompt :: step] for reading in readings]
    return np.concatenate(parts) if parts else np.zeros((0, *shape), dtype=np.float32)


def levels_or_nan(trait: TraitData, n_layers: int) -> np.ndarray:
    """Return the trait's levels [L, 2]; NaN where they are not known."""
    return np.full((n_layers, 2), np.nan) if trait.levels_L2 is None else np.asarray(trait.levels_L2, dtype=np.float64)


def _median(sample_NLPK: np.ndarray) -> np.ndarray:
    if not len(sample_NLPK):
        return np.zeros(sample_NLPK.shape[1:])
    return _finite(np.median(sample_NLPK, axis=0).astype(np.float64))


def _reach(sample_NLPK: np.ndarray, centre_LPK: np.ndarray) -> np.ndarray:
    if not len(sample_NLPK):
        return np.ones(centre_LPK.shape)
    distances = np.abs(sample_NLPK - centre_LPK.astype(np.float32))
    return _finite(np.quantile(distances, QUANTILE, axis=0).astype(np.float64))


def _finite(values: np.ndarray) -> np.ndarray:
    finite: np.ndarray = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return finite
