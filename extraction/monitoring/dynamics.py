"""Summarise how a trait's projection changes over the tokens of a response: velocity, commitment, persistence.

Pure functions. A trajectory holds one projection per token; token 0 is the response's first. Projections have the unit
of the hidden states (the direction has norm 1), so a velocity is in that unit per token, an acceleration in it per
token squared. All differences are backward: the value at token t needs no token after t.

Shapes: T tokens of a response, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 5  # tokens of the trailing mean, and the fewest tokens of a commitment
CLEARANCE = 3.0  # standard errors between the threshold and the mean of the tokens since the commitment
_MAD_OF_NORMAL = 0.6745  # the median absolute deviation of a standard normal variable

Summary = dict[str, float | int | None]


def velocity(x_T: Any) -> np.ndarray:
    """Return v[t] = x[t] - x[t-1], per token; v[0] is NaN.

    The backward difference (Box, Jenkins and Reinsel, Time Series Analysis, section 1.2.1). Independent noise of
    deviation s on every token gives velocities the deviation 1.41 s and accelerations 2.45 s: a single
    token's value is a jump, not a trend.
    """
    trajectory_T = _checked(x_T)
    return np.diff(trajectory_T, prepend=np.nan)


def acceleration(x_T: Any) -> np.ndarray:
    """Return a[t] = v[t] - v[t-1], per token squared; a[0] and a[1] are NaN. Source: as for `velocity`."""
    return velocity(velocity(x_T))


def smoothed(x_T: Any) -> np.ndarray:
    """Return the trailing mean over WINDOW tokens, fewer at the start: s[0] = x[0], s[1] = (x[0] + x[1]) / 2."""
    trajectory_T = _checked(x_T)
    counts_T = np.minimum(np.arange(len(trajectory_T)) + 1, WINDOW)
    return _trailing_sums(trajectory_T) / counts_T


def noise(x_T: Any) -> float:
    """Estimate the standard deviation of token-to-token noise from the median absolute velocity; 0.0 below 2 tokens.

    The median absolute deviation of the finest differences (Donoho and Johnstone 1994, Ideal spatial adaptation by
    wavelet shrinkage, Biometrika 81(3), their estimate of the noise level): a few steps do not change it. It
    measures all of white noise, and of an autocorrelated series only the innovations.
    """
    speeds = np.abs(np.diff(_checked(x_T)))
    return float(np.median(speeds)) / (_MAD_OF_NORMAL * math.sqrt(2)) if speeds.size else 0.0


def commitment_point(x_T: Any, threshold: float) -> int | None:
    """Return the first token from which on the smoothed projection stays on the side of the threshold where it ends.

    The analogue over tokens of prediction depth over layers (Baldock, Maennel and Neyshabur 2021, Deep Learning Through
    the Lens of Example Difficulty, arXiv:2106.09647). The mean trails, so a sharp step is seen up to WINDOW - 1 tokens
    late: 2 where the threshold is half way. A value ON the threshold is on neither side.

    None without a commitment: the response ends on the threshold; its last side was kept for fewer
    than WINDOW tokens (so any response shorter than that); or the mean of those tokens is not beyond the threshold by
    CLEARANCE standard errors (`noise` over the root of their number). Without that last rule, 44% of trajectories of
    white noise around the threshold would commit; with it, 2% at 50 tokens and 4% at 20. Autocorrelated series commit
    more often: of AR(1) trajectories around the threshold with a coefficient of 0.3, 12% do, so read `persistence` too.
    """
    excess_T = _checked(x_T) - threshold
    if len(excess_T) < WINDOW:
        return None
    side_T = np.sign(_trailing_sums(excess_T))
    other_side = np.flatnonzero(side_T != side_T[-1])
    first = int(other_side[-1]) + 1 if other_side.size else 0
    committed = excess_T[first:]
    if side_T[-1] == 0 or len(committed) < WINDOW:
        return None
    is_clear = side_T[-1] * committed.mean() > CLEARANCE * noise(excess_T) / math.sqrt(len(committed))
    return first if is_clear else None


def persistence(x_T: Any) -> float | None:
    """Return the lag-1 autocorrelation, r = sum of d[t] d[t-1] over sum of d[t]**2, with d = x - mean.

    Box, Jenkins and Reinsel, Time Series Analysis, section 2.1 (the estimate r_1) and section 3.2 (AR(1), in which a
    deviation from the mean shrinks by the factor r each token). 0 is white noise;
    negative values alternate; a drift or a step raises it as well. It is biased low by about (1 + 4 r) / T
    (Marriott and Pope 1954, Biometrika 41), so don't compare responses of very different lengths. None for fewer than
    3 tokens, and for a constant trajectory.
    """
    trajectory_T = _checked(x_T)
    if len(trajectory_T) < 3 or np.ptp(trajectory_T) == 0:
        return None
    d_T = trajectory_T - trajectory_T.mean()
    d_T /= np.abs(d_T).max()  # squares of tiny numbers would vanish
    return float(d_T[1:] @ d_T[:-1] / (d_T @ d_T))


def dynamics(x_TL: Any, threshold_L: Any) -> list[Summary]:
    """Summarise a response at every layer, as plain numbers for JSON; None for a figure that is not defined.

    `mean`, `first`, `last`; `peak`, the largest projection, at `peak_token`; `peak_velocity` at `peak_velocity_token`
    and `peak_acceleration`: the largest in absolute value, signed, the first of equals; `mean_speed`, the mean
    absolute velocity; `commitment` (`commitment_point`) and `committed_to`, 1 above the threshold and -1 below;
    `persistence`. A trajectory or a threshold that is not finite gives None everywhere.
    """
    x_TL, threshold_L = np.asarray(x_TL, dtype=np.float64), np.asarray(threshold_L, dtype=np.float64)
    assert x_TL.ndim == 2, x_TL.shape
    assert threshold_L.shape == x_TL.shape[1:], (threshold_L.shape, x_TL.shape)
    return [_summary(x_T, float(threshold)) for x_T, threshold in zip(x_TL.T, threshold_L, strict=True)]


def _summary(x_T: np.ndarray, threshold: float) -> Summary:
    if not len(x_T) or not np.isfinite([*x_T, threshold]).all():
        return dict.fromkeys(SUMMARY)
    v_T, a_T = velocity(x_T), acceleration(x_T)
    commitment = commitment_point(x_T, threshold)
    jump = _largest(v_T)
    values: Sequence[float | int | None] = (
        float(x_T.mean()),
        float(x_T[0]),
        float(x_T[-1]),
        float(x_T.max()),
        int(x_T.argmax()),
        _at(v_T, jump),
        jump,
        float(np.abs(v_T[1:]).mean()) if len(x_T) > 1 else None,
        _at(a_T, _largest(a_T)),
        commitment,
        None if commitment is None else int(np.sign(x_T[commitment:].mean() - threshold)),
        persistence(x_T),
    )
    return dict(zip(SUMMARY, values, strict=True))


SUMMARY = (
    *("mean", "first", "last", "peak", "peak_token", "peak_velocity", "peak_velocity_token"),
    *("mean_speed", "peak_acceleration", "commitment", "committed_to", "persistence"),
)


def _largest(values_T: np.ndarray) -> int | None:
    """Return the index of the largest absolute value; None where all are NaN."""
    return None if np.isnan(values_T).all() else int(np.nanargmax(np.abs(values_T)))


def _at(values_T: np.ndarray, token: int | None) -> float | None:
    return None if token is None else float(values_T[token])


def _trailing_sums(x_T: np.ndarray) -> np.ndarray:
    """Return the sums over the last WINDOW values, each computed anew so that equal values give equal sums."""
    return np.convolve(x_T, np.ones(WINDOW))[: len(x_T)] if len(x_T) else x_T


def _checked(x_T: Any) -> np.ndarray:
    """Return one trajectory in float64."""
    trajectory_T = np.asarray(x_T, dtype=np.float64)
    assert trajectory_T.ndim == 1, trajectory_T.shape
    return trajectory_T
