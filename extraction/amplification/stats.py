"""Statistics of proportions: confidence intervals, and tests of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95
TIES = 1 + 1e-7  # tables this close in probability count as equally likely


def wilson(hits: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927). It stays within 0 and 1, and is valid at 0 of n."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} of {count} is not a proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    proportion, weight = hits / count, z * z / count
    middle = proportion + weight / 2
    spread = z * math.sqrt((proportion * (1 - proportion) + weight / 4) / count)
    low, high = (middle - spread) / (1 + weight), (middle + spread) / (1 + weight)
    return (0.0 if hits == 0 else max(low, 0.0)), (1.0 if hits == count else min(high, 1.0))


def fisher_exact(hits: int, count: int, other_hits: int, other_count: int) -> float:
    """Return the two-sided p-value for equal proportions (Fisher 1922).

    The margins are held fixed, so the hits are hypergeometric; the p-value sums the tables at most as likely as the
    observed one.
    """
    if not (0 <= hits <= count and 0 <= other_hits <= other_count):
        raise ValueError(f"{hits} of {count} and {other_hits} of {other_count} are not proportions")
    total = hits + other_hits
    least, most = max(0, total - other_count), min(total, count)
    weights = [_log_choose(count, k) + _log_choose(other_count, total - k) for k in range(least, most + 1)]
    log_total = _log_choose(count + other_count, total)
    probabilities = [math.exp(weight - log_total) for weight in weights]
    observed = probabilities[hits - least]
    return min(1.0, math.fsum(p for p in probabilities if p <= observed * TIES))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that the family-wise error rate is that of one test (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
