"""How a trait's projection moves over the tokens of a response, in a few numbers that have a definition and a source.

Everything is pure. A trajectory holds one projection a token; token 0 is the response's first. Projections have the
unit of the hidden states (the direction has length 1), so a velocity is in that unit per token, an acceleration in it
per token squared. All differences look BACK: the value at token t needs no token after t.

Shapes: T tokens of a response, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 5  # tokens of the trailing mean, and the fewest for which a side must be held
CLEARANCE = 3.0  # standard errors between the threshold and the mean of the tokens since the commitment
_MAD_OF_NORMAL = 0.6745  # the median absolute deviation of a standard normal variable

Summary = dict[str, float | int | None]


def velocity(x_T: Any) -> np.ndarray:
    """v[t] = x[t] - x[t-1], per token; v[0] is NaN, for nothing came before.

    The backward difference (Box, Jenkins and Reinsel, Time Series Analysis, section 1.2.1). Independent noise of
    deviation s on every token gives a velocity the deviation 1.41 s, an acceleration 2.45 s: read a single token's
    value as a jump, not as a trend.
    """
    trajectory_T = _checked(x_T)
    return np.diff(trajectory_T, prepend=np.nan)


def acceleration(x_T: Any) -> np.ndarray:
    """a[t] = v[t] - v[t-1] = x[t] - 2 x[t-1] + x[t-2], per token squared; a[0] and a[1] are NaN. Source: `velocity`."""
    return velocity(velocity(x_T))


def smoothed(x_T: Any) -> np.ndarray:
    """The mean over the last WINDOW tokens, of those that there are: s[0] = x[0], s[1] = (x[0] + x[1]) / 2."""
    trajectory_T = _checked(x_T)
    counts_T = np.minimum(np.arange(len(trajectory_T)) + 1, WINDOW)
    return _trailing_sums(trajectory_T) / counts_T


def noise(x_T: Any) -> float:
    """The deviation of what differs from token to token, from the median size of a velocity; 0.0 below 2 tokens.

    The median absolute deviation of the finest differences (Donoho and Johnstone 1994, Ideal spatial adaptation by
    wavelet shrinkage, Biometrika 81(3), their estimate of the noise level): a step, or a few, leave it alone. It sees
    white noise whole, and of an autocorrelated wander only the part that is new at every token.
    """
    speeds = np.abs(np.diff(_checked(x_T)))
    return float(np.median(speeds)) / (_MAD_OF_NORMAL * math.sqrt(2)) if speeds.size else 0.0


def commitment_point(x_T: Any, threshold: float) -> int | None:
    """The first token from which on the smoothed projection stays on the side of the threshold where it ends.

    The analogue over tokens of prediction depth over layers (Baldock, Maennel and Neyshabur 2021, Deep Learning Through
    the Lens of Example Difficulty, arXiv:2106.09647). The mean trails, so a sharp step is seen up to WINDOW - 1 tokens
    late: 2 where the threshold is half way. Being ON the threshold is being on neither side.

    None where there is no commitment to speak of: the response ends on the threshold; its last side was held for fewer
    than WINDOW tokens (so any response shorter than that); or the mean of those tokens is not beyond the threshold by
    CLEARANCE standard errors (`noise` over the root of their number). Without that last rule, 44% of trajectories of
    white noise around the threshold would commit; with it, 2% at 50 tokens and 4% at 20. A slow wander is no noise: of
    AR(1) trajectories around it with a coefficient of 0.3, 12% commit, so read `persistence` beside it.
    """
    excess_T = _checked(x_T) - threshold
    if len(excess_T) < WINDOW:
        return None
    side_T = np.sign(_trailing_sums(excess_T))
    elsewhere = np.flatnonzero(side_T != side_T[-1])
    first = int(elsewhere[-1]) + 1 if elsewhere.size else 0
    held = excess_T[first:]
    if side_T[-1] == 0 or len(held) < WINDOW:
        return None
    is_clear = side_T[-1] * held.mean() > CLEARANCE * noise(excess_T) / math.sqrt(len(held))
    return first if is_clear else None


def persistence(x_T: Any) -> float | None:
    """The autocorrelation of neighbouring tokens, r = sum of d[t] d[t-1] over sum of d[t]**2, d = x - mean.

    Box, Jenkins and Reinsel, Time Series Analysis, section 2.1 (the estimate r_1) and section 3.2 (AR(1), in which a
    deviation from the mean shrinks by the factor r each token; `half_life` says that in tokens). 0 is white noise;
    negative values swing to and fro; a drift or a step raises it as well. It comes out too low by about (1 + 4 r) / T
    (Marriott and Pope 1954, Biometrika 41), so don't compare responses of very different lengths. None for fewer than
    3 tokens, and for a constant trajectory.
    """
    trajectory_T = _checked(x_T)
    if len(trajectory_T) < 3 or np.ptp(trajectory_T) == 0:
        return None
    d_T = trajectory_T - trajectory_T.mean()
    d_T /= np.abs(d_T).max()  # squares of tiny numbers would vanish
    return float(d_T[1:] @ d_T[:-1] / (d_T @ d_T))


def half_life(persistence: float | None) -> float | None:
    """Tokens in which a deviation halves, ln(1/2) / ln(r); None where r is not between 0 and 1: none decays so."""
    if persistence is None or not 0 < persistence < 1:
        return None
    return math.log(0.5) / math.log(persistence)


def dynamics(x_TL: Any, threshold_L: Any) -> list[Summary]:
    """A response's summary at every layer, ready for JSON: Python numbers, and None for what there is not.

    `mean`, `first`, `last`; `peak`, the largest projection, at `peak_token`; `peak_velocity` at `peak_velocity_token`
    and `peak_acceleration`: the largest in size, with their signs, the earliest of equals; `mean_speed`, the mean size
    of a velocity; `commitment` (`commitment_point`) and `committed_to`, 1 above the threshold and -1 below;
    `persistence`. A trajectory that is not finite, or a threshold, has None everywhere.
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
    """Where the largest size is; None where all are NaN."""
    return None if np.isnan(values_T).all() else int(np.nanargmax(np.abs(values_T)))


def _at(values_T: np.ndarray, token: int | None) -> float | None:
    return None if token is None else float(values_T[token])


def _trailing_sums(x_T: np.ndarray) -> np.ndarray:
    """Sums over the last WINDOW values; added up anew each, so that equal values give equal sums."""
    return np.convolve(x_T, np.ones(WINDOW))[: len(x_T)] if len(x_T) else x_T


def _checked(x_T: Any) -> np.ndarray:
    """One trajectory, in float64."""
    trajectory_T = np.asarray(x_T, dtype=np.float64)
    assert trajectory_T.ndim == 1, trajectory_T.shape
    return trajectory_T
