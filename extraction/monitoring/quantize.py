"""Projections in few bytes, for a page to unpack: whole numbers of 16 or 8 bits on a scale of their own.

Every trajectory (one trait, layer and point) has its own lowest value and step, so the error is half a step of that
trajectory. Values far outside, such as token 0's often is, would stretch the steps; they are kept apart, as they are.
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

MOST_BYTES = 40_000_000
FAR = 20.0  # times the middle distance from the median
FEW = 8  # most values kept apart of a trajectory, besides what is not a number
_A_TRAJECTORY = 40  # bytes, beside its codes


@dataclass(frozen=True)
class QuantizationPlan:
    """What of a set is kept: indices of layers and points, and the bits of a value."""

    layers: tuple[int, ...]
    points: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class QuantizedArrays:
    """One prompt and trait: what the page unpacks, and how far its values are off at most."""

    block: dict[str, Any]
    error: float


def plan_of(facts: CaptureSetData, most_bytes: int = MOST_BYTES) -> QuantizationPlan:
    """The first of the plans, from everything downwards, whose projections fit."""
    tokens = [len(reading.token_ids) for reading in facts.readings]
    plans = list(_plans(facts))
    return next((plan for plan in plans if _size(plan, tokens, len(facts.traits)) <= most_bytes), plans[-1])


def _plans(facts: CaptureSetData) -> Iterator[QuantizationPlan]:
    every, points = tuple(range(len(facts.layers))), tuple(range(len(facts.points)))
    out = (facts.points.index(LEVELS_AT),) if LEVELS_AT in facts.points else points[-1:]
    yield QuantizationPlan(every, points, 16)
    yield QuantizationPlan(every, out, 16)
    yield QuantizationPlan(every, out, 8)
    for count in range(len(every) - 1, 0, -1):
        yield QuantizationPlan(spread(facts, count), out, 8)


def spread(facts: CaptureSetData, count: int) -> tuple[int, ...]:
    """Indices of about `count` layers, evenly spread, and of those that traits are shown at first."""
    first = {facts.layers.index(trait.layer) for trait in facts.traits if trait.layer in facts.layers}
    evenly = {round(float(index)) for index in np.linspace(0, len(facts.layers) - 1, count)}
    return tuple(sorted(first | evenly))


def _size(plan: QuantizationPlan, tokens: Sequence[int], n_traits: int) -> float:
    trajectories = len(plan.layers) * len(plan.points)
    codes = sum(tokens) * trajectories * plan.bits / 8 * 4 / 3
    return n_traits * (codes + len(tokens) * trajectories * _A_TRAJECTORY)


def pack(values_TLP: np.ndarray, bits: int) -> QuantizedArrays:
    """Values as codes, trajectory by trajectory, layer after layer within a point: [P, L, T], and how to read them.

    A value is low + code x step; the highest code says that the value stands in `far`, as [place, value], with null
    for what is not a number.
    """
    n_tokens, n_layers, n_points = values_TLP.shape
    values_JT = values_TLP.transpose(2, 1, 0).reshape(n_points * n_layers, n_tokens).astype(np.float64)
    is_far_JT = far_from_the_others(values_JT)
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
        "codes": encoded(codes),
    }
    return QuantizedArrays(block, float(np.nan_to_num(error_JT).max(initial=0.0)))


def far_from_the_others(values_JT: np.ndarray) -> np.ndarray:
    """Which values are no numbers, or so far from the trajectory's median that they would stretch its scale."""
    is_far_JT: np.ndarray = ~np.isfinite(values_JT)
    if not values_JT.shape[1]:
        return is_far_JT
    finite_JT = np.where(is_far_JT, 0.0, values_JT)
    distance_JT = np.abs(finite_JT - np.median(finite_JT, axis=1, keepdims=True))
    is_out_JT = distance_JT > FAR * np.median(distance_JT, axis=1, keepdims=True)
    rank_JT = np.argsort(np.argsort(-distance_JT, axis=1, kind="stable"), axis=1, kind="stable")
    found_JT: np.ndarray = is_far_JT | (is_out_JT & (rank_JT < FEW))
    return found_JT


def _grid(near_JT: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each trajectory begins and what a step is; never a step of 0."""
    low_J = np.where(np.isnan(near_JT), np.inf, near_JT).min(axis=1, initial=np.inf)
    high_J = np.where(np.isnan(near_JT), -np.inf, near_JT).max(axis=1, initial=-np.inf)
    is_empty_J = ~np.isfinite(low_J)
    low_J, high_J = np.where(is_empty_J, 0.0, low_J), np.where(is_empty_J, 0.0, high_J)
    step_J: np.ndarray = (high_J - low_J) / n_steps
    return low_J, np.where(step_J > 0, step_J, 1.0)


def _as_written(values_J: np.ndarray) -> np.ndarray:
    return np.array(rounded(values_J, 9), dtype=np.float64)


def encoded(values: np.ndarray) -> str:
    """The bytes of numbers, least significant first, as base64."""
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def rounded(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """Numbers for JSON with so many significant digits; None for what is not a number."""
    return [nullable(float(f"{value:.{digits}g}")) for value in values.ravel()]


def nullable(value: float) -> float | None:
    """A number for JSON: None for what is not one."""
    return float(value) if np.isfinite(value) else None
