import math
import os
import time
from pathlib import Path

import pytest
import torch

from tome_server.runtime import cpus
from tome_server.runtime.cpus import available_cpus
from tome_server.runtime.threads import fastest_threads


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 CPUs whose control group's files are in the folder returned: none, so far."""
    quota = cpus._quota
    monkeypatch.setattr(cpus, "_quota", lambda: quota(tmp_path / "cpu.max", tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def test_without_a_control_group_all_cpus_of_the_affinity_count(cgroup: Path) -> None:
    assert available_cpus() == 8


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("1600000 100000\n", 8),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("30000 10000\n", 3),
        ("\n", 8),
        ("max\n", 8),
        ("many 100000\n", 8),
    ],
)
def test_the_quota_of_cgroup_v2_counts_where_it_is_less(cgroup: Path, content: str, cpus: int) -> None:
    (cgroup / "cpu.max").write_text(content)
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [(-1, 100000, 8), (300000, 100000, 3), (150000, 100000, 1), (50000, 100000, 1), (5000000, 100000, 8)],
)
def test_the_quota_of_cgroup_v1_counts_where_it_is_less(cgroup: Path, quota: int, period: int, cpus: int) -> None:
    (cgroup / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (cgroup / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert available_cpus() == cpus


def test_half_of_cgroup_v1_is_no_limit(cgroup: Path) -> None:
    (cgroup / "cpu.cfs_quota_us").write_text("100000\n")
    assert available_cpus() == 8


def test_the_affinity_counts_where_it_is_less(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cgroup / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert available_cpus() == 2


def test_this_machine_has_a_cpu() -> None:
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))
    assert cpus._quota(Path("/nowhere"), Path("/nowhere")) == math.inf


@pytest.mark.parametrize(("slow", "best"), [(1, 2), (2, 1)])
def test_the_thread_count_that_runs_faster_is_chosen_and_none_is_set(
    slow: int, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += 2.0 if torch.get_num_threads() == slow else 1.0

    before = torch.get_num_threads()
    assert fastest_threads(run, most=2) == best
    assert torch.get_num_threads() == before


def test_a_single_cpu_is_not_measured() -> None:
    assert fastest_threads(lambda: pytest.fail("ran"), most=1) == 1
