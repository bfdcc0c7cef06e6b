"""How many processor cores this process may use: what a container is given, not what the machine has.

A library that starts a thread for every core of the machine, in a container that is given two of them, waits for
itself most of the time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000", or "max 100000"
QUOTA_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cores() -> int:
    """The cores that this process may run on, or fewer where its control group has less time than that. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota() -> float | None:
    """The cores that the control group's time amounts to; None without a limit, or where that can't be told."""
    for paths in ((QUOTA_V2,), QUOTA_V1):
        try:
            quota, period = " ".join(path.read_text(encoding="utf-8") for path in paths).split()
            if float(quota) > 0 and float(period) > 0:  # "max" is no number, -1 no limit
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return None
