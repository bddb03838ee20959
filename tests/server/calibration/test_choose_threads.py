import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
import torch
from safetensors.torch import save_file

from tome_server.calibration import choose_threads as threads
from tome_server.calibration.choose_threads import choose_threads, seconds_on
from tome_server.errors import ModelLoadError
from tome_server.execution import cpus
from tome_server.execution.cpus import available_cpus
from tome_server.models.spec import ModelSpec

# What was measured is kept for good.
pytestmark = pytest.mark.usefixtures("quiet")


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


def test_thread_counts_are_measured_in_turn_and_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], list[int]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run() -> None:
        order.append(torch.get_num_threads())
        # The first of all sets up what later ones have.
        clock[0] += {1: 1.0, 2: 2.0}[order[-1]] + (10.0 if len(order) < 3 else 0.0)

    before = torch.get_num_threads()
    assert seconds_on((1, 2), run) == {1: 1.0, 2: 2.0}
    assert torch.get_num_threads() == before
    assert order == [1, 2] * 3


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Return a function that says how many CPUs there are, and what a model takes on one thread and on all.

    Its list grows by the dtype of each model that is measured.
    """
    before = torch.get_num_threads()

    def stand_in(cpus: int, *seconds: tuple[float, float]) -> list[str]:
        asked: list[str] = []

        def measure(counts: tuple[int, int], run: Callable[[], None]) -> dict[int, float]:
            assert torch.get_num_threads() == cpus  # what the model was made for
            run()
            asked.append(run.args[0].info.dtype)  # type: ignore[attr-defined]
            return dict(zip(counts, seconds[len(asked) - 1], strict=True))

        monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
        monkeypatch.setattr(threads, "seconds_on", measure)
        return asked

    yield stand_in
    torch.set_num_threads(before)


def tiny(folder: Path, name: str = "tiny", **options: Any) -> ModelSpec:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 4}
    checkpoint = folder / f"{name}.safetensors"
    if not checkpoint.exists():
        save_file(timm.create_model("vit_tiny_patch16_224", **kwargs).state_dict(), checkpoint)
    return ModelSpec(name=name, architecture="vit_tiny_patch16_224", kwargs=kwargs, checkpoint=checkpoint, **options)


@pytest.mark.parametrize(("one", "two", "best"), [(2.0, 1.0, 2), (1.0, 2.0, 1), (1.0, 1.0, 1)])
def test_the_thread_count_that_runs_faster_is_set_and_stays_however_busy_the_machine_is(
    machine: Callable[..., list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    one: float,
    two: float,
    best: int,
) -> None:
    caplog.set_level(logging.INFO)
    models, used = [(tiny(tmp_path), 4)], "1 CPU thread" if best == 1 else "2 CPU threads"
    said = f"using {used} (2 ran {one / two:.2f} times as fast as one)"
    folder = tmp_path / "kept"
    assert machine(2, (one, two)) == []
    assert choose_threads(models, folder) == torch.get_num_threads() == best
    busy = machine(2, (two, one))
    torch.set_num_threads(3)
    assert choose_threads(models, folder) == torch.get_num_threads() == best
    assert busy == []
    assert caplog.messages.count(said) == 2
    # Until it is measured anew.
    if one != two:
        assert choose_threads(models, folder, anew=True) != best
        assert choose_threads(models, folder) != best


def test_threads_are_measured_for_all_models_together_each_in_the_type_it_is_to_run_in(
    machine: Callable[..., list[str]], tmp_path: Path
) -> None:
    first, second = tiny(tmp_path), tiny(tmp_path, "second", dtype="bfloat16")
    asked = machine(2, (1.0, 2.0), (4.0, 2.0))
    assert choose_threads([(first, 4), (second, 1)], tmp_path / "kept") == 2
    assert asked == ["float32", "bfloat16"]
    for other in ([(first, 4)], [(first, 4), (second, 2)], [(first, 4), (replace(second, dtype="float32"), 1)]):
        asked = machine(2, *[(1.0, 2.0)] * 2)
        assert choose_threads(other, tmp_path / "kept") == 1
        assert len(asked) == len(other)


def test_what_came_with_the_only_model_is_taken(machine: Callable[..., list[str]], tmp_path: Path) -> None:
    machine(2, (2.0, 1.0))
    spec = tiny(tmp_path, profiles=tmp_path / "came")
    choose_threads([(spec, 4)], tmp_path / "came")
    asked = machine(2, (1.0, 2.0))
    assert choose_threads([(spec, 4)], tmp_path / "own") == 2
    assert asked == []


def test_a_model_that_cannot_be_loaded_is_refused(machine: Callable[..., list[str]], tmp_path: Path) -> None:
    machine(2)
    with pytest.raises(ModelLoadError, match="is no file"):
        choose_threads([(replace(tiny(tmp_path), checkpoint=tmp_path / "gone"), 4)], tmp_path)


def test_a_single_cpu_is_not_measured(machine: Callable[..., list[str]], tmp_path: Path) -> None:
    asked = machine(1)
    assert choose_threads([(tiny(tmp_path), 4)], tmp_path / "kept") == torch.get_num_threads() == 1
    assert asked == []
    assert not (tmp_path / "kept").exists()


def test_the_real_measurement_chooses_one_or_all(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert choose_threads([(tiny(tmp_path), 2)], tmp_path / "kept") in (1, available_cpus())
    finally:
        torch.set_num_threads(before)
