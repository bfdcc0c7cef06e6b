"""Quantise projections to 16 or 8 bits for a page's data blocks.

Every trajectory (one trait, layer and point) has its own lowest value and step, so the error is half a step of that
trajectory. Outliers, such as the projection of token 0 often is, would stretch the steps; they are stored exactly.
T tokens, L layers, P points, J = P x L trajectories, S prompts, K traits.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extraction.monitoring.colour_scale import LEVELS_AT
from extraction.monitoring.page_data import CaptureSetData

MAX_BYTES = 40_000_000
OUTLIER_DISTANCE = 20.0  # times the median distance from the median
MAX_OUTLIERS = 8  # of a trajectory, besides values that are not finite
_TRAJECTORY_BYTES = 40  # of a trajectory, beside its codes


@dataclass(frozen=True)
class QuantizationPlan:
    """The indices of the layers and points that a page holds, and the bits of a value."""

    layers: tuple[int, ...]
    points: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class QuantizedArrays:
    """One prompt and trait: the block that the page unpacks, and the largest error of its values."""

    block: dict[str, Any]
    error: float


def choose_plan(data: CaptureSetData, max_bytes: int = MAX_BYTES) -> QuantizationPlan:
    """Return the first plan whose projections fit: all of them, else fewer points, fewer bits, then fewer layers."""
    tokens = [len(reading.token_ids) for reading in data.readings]
    plans = list(_plans(data))
    return next((plan for plan in plans if _size(plan, tokens, len(data.traits)) <= max_bytes), plans[-1])


def _plans(data: CaptureSetData) -> Iterator[QuantizationPlan]:
    every, points = tuple(range(len(data.layers))), tuple(range(len(data.points)))
    out = (data.points.index(LEVELS_AT),) if LEVELS_AT in data.points else points[-1:]
    yield QuantizationPlan(every, points, 16)
    yield QuantizationPlan(every, out, 16)
    yield QuantizationPlan(every, out, 8)
    for count in range(len(every) - 1, 0, -1):
        yield QuantizationPlan(spaced_layers(data, count), out, 8)


def spaced_layers(data: CaptureSetData, count: int) -> tuple[int, ...]:
    """Return the indices of about `count` evenly spaced layers, and of the layers that traits are shown at first."""
    first = {data.layers.index(trait.layer) for trait in data.traits if trait.layer in data.layers}
    evenly = {round(float(index)) for index in np.linspace(0, len(data.layers) - 1, count)}
    return tuple(sorted(first | evenly))


def _size(plan: QuantizationPlan, tokens: Sequence[int], n_traits: int) -> float:
    trajectories = len(plan.layers) * len(plan.points)
    codes = sum(tokens) * trajectories * plan.bits / 8 * 4 / 3
    return n_traits * (codes + len(tokens) * trajectories * _TRAJECTORY_BYTES)


def pack(values_TLP: np.ndarray, bits: int) -> QuantizedArrays:
    """Quantise values to codes [P, L, T], with the scale of every trajectory.

    A value is low + code x step. The highest code marks an outlier, whose value is in `far` as [index, value], with
    null for a value that is not finite.
    """
    n_tokens, n_layers, n_points = values_TLP.shape
    values_JT = values_TLP.transpose(2, 1, 0).reshape(n_points * n_layers, n_tokens).astype(np.float64)
    is_far_JT = find_outliers(values_JT)
    near_JT = np.where(is_far_JT, np.nan, values_JT)
    low_J, step_J = (_as_written(values_J) for values_J in _grid(near_JT, 2**bits - 2))
    with np.errstate(invalid="ignore"):
        codes_JT = np.rint((near_JT - low_J[:, None]) / step_J[:, None])
        error_JT = np.abs(low_J[:, None] + codes_JT * step_J[:, None] - near_JT)
    codes = np.where(is_far_JT, 2**bits - 1, np.nan_to_num(codes_JT)).astype("u2" if bits == 16 else "u1")
    places = np.flatnonzero(is_far_JT)
    block = {
        "low": low_J.tolist(),
        "step": step_J.tolist(),
        "far": [[int(place), nullable(values_JT.flat[place])] for place in places],
        "codes": encode_base64(codes),
    }
    return QuantizedArrays(block, float(np.nan_to_num(error_JT).max(initial=0.0)))


def find_outliers(values_JT: np.ndarray) -> np.ndarray:
    """Return a mask of the values that are not finite, or too far from their trajectory's median for its scale."""
    is_far_JT: np.ndarray = ~np.isfinite(values_JT)
    if not values_JT.shape[1]:
        return is_far_JT
    finite_JT = np.where(is_far_JT, 0.0, values_JT)
    distance_JT = np.abs(finite_JT - np.median(finite_JT, axis=1, keepdims=True))
    is_out_JT = distance_JT > OUTLIER_DISTANCE * np.median(distance_JT, axis=1, keepdims=True)
    rank_JT = np.argsort(np.argsort(-distance_JT, axis=1, kind="stable"), axis=1, kind="stable")
    found_JT: np.ndarray = is_far_JT | (is_out_JT & (rank_JT < MAX_OUTLIERS))
    return found_JT


def _grid(near_JT: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest value and the step of every trajectory; a step is never 0."""
    low_J = np.where(np.isnan(near_JT), np.inf, near_JT).min(axis=1, initial=np.inf)
    high_J = np.where(np.isnan(near_JT), -np.inf, near_JT).max(axis=1, initial=-np.inf)
    is_empty_J = ~np.isfinite(low_J)
    low_J, high_J = np.where(is_empty_J, 0.0, low_J), np.where(is_empty_J, 0.0, high_J)
    step_J: np.ndarray = (high_J - low_J) / n_steps
    return low_J, np.where(step_J > 0, step_J, 1.0)


def _as_written(values_J: np.ndarray) -> np.ndarray:
    return np.array(rounded(values_J, 9), dtype=np.float64)


def encode_base64(values: np.ndarray) -> str:
    """Return the little-endian bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def rounded(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """Return numbers for JSON with `digits` significant digits; None for a value that is not finite."""
    return [nullable(float(f"{value:.{digits}g}")) for value in values.ravel()]


def nullable(value: float) -> float | None:
    """Return a number for JSON; None for a value that is not finite."""
    return float(value) if np.isfinite(value) else None
