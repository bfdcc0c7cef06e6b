"""Count the processor cores that this process may use: those of its container, not of the machine.

A library that starts one thread for each core of the machine, in a container with two of them, spends most of its time
waiting.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000", or "max 100000"
QUOTA_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cores() -> int:
    """Return the number of cores in this process's affinity and its control group's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota() -> float | None:
    """Return the control group's quota in cores; None without a limit, or if it can't be read."""
    for paths in ((QUOTA_V2,), QUOTA_V1):
        try:
            quota, period = " ".join(path.read_text(encoding="utf-8") for path in paths).split()
            if float(quota) > 0 and float(period) > 0:  # "max" is no number, -1 no limit
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return None
