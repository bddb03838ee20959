"""How many CPUs this process may use."""

import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1 = Path("/sys/fs/cgroup/cpu")


def available_cpus() -> int:
    """Return the CPUs this process may use: its affinity, or its container's CPU quota where that is less."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota())))


def _quota(v2: Path = _CGROUP_V2, v1: Path = _CGROUP_V1) -> float:
    """Return the CPUs that the control group allows; infinity if it sets no limit."""
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()
        else:
            quota = (v1 / "cpu.cfs_quota_us").read_text().strip()
            period = (v1 / "cpu.cfs_period_us").read_text().strip()
        return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")
