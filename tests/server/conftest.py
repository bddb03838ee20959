"""Fixtures of a scripted engine, and of a wall clock that tests set."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

with contextlib.suppress(ModuleNotFoundError):  # where only the tests of CUDA run
    from tests.server.scripted_engine import bench, bundled, clock, start, stopped  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One torch thread: several collapse where other tests and servers run. Tests of several threads set them."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """A function that sets the wall clock of processes started from now on, whose other clocks go on as they were."""
    try:
        [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    except ValueError:
        pytest.skip("needs libfaketime: apt-get install faketime")
    file = tmp_path / "clock"
    file.write_text("+0")
    for name, value in {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": file,
        "FAKETIME_NO_CACHE": 1,
        "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        "DONT_FAKE_MONOTONIC": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    return file.write_text
