"""Shares of yes-or-no outcomes: their intervals, and whether two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95
TIES = 1 + 1e-7  # tables as likely as the one seen, up to rounding


def wilson(hits: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share, which stays within 0 and 1 and holds at 0 of n (Wilson 1927)."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} of {count} is no share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / count, z * z / count
    middle = share + weight / 2
    spread = z * math.sqrt((share * (1 - share) + weight / 4) / count)
    low, high = (middle - spread) / (1 + weight), (middle + spread) / (1 + weight)
    return (0.0 if hits == 0 else max(low, 0.0)), (1.0 if hits == count else min(high, 1.0))


def fisher_exact(hits: int, count: int, other_hits: int, other_count: int) -> float:
    """The two-sided p-value that two shares are one: the tables at most as likely as the one seen (Fisher 1922).

    The margins are held fixed, so the hits are hypergeometric.
    """
    if not (0 <= hits <= count and 0 <= other_hits <= other_count):
        raise ValueError(f"{hits} of {count} and {other_hits} of {other_count} are no shares")
    total = hits + other_hits
    least, most = max(0, total - other_count), min(total, count)
    weights = [_log_choose(count, k) + _log_choose(other_count, total - k) for k in range(least, most + 1)]
    whole = _log_choose(count + other_count, total)
    seen = math.exp(weights[hits - least] - whole)
    chances = [math.exp(weight - whole) for weight in weights]
    return min(1.0, math.fsum(chance for chance in chances if chance <= seen * TIES))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests that keep the chance of any false finding at that of one (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
