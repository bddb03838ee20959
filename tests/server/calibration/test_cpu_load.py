"""How busy the machine is with something else."""

import threading
from pathlib import Path

import pytest

from tome_server.calibration.cpu_load import LoadMeter


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A process of two threads."""
    write(tmp_path, 1, 500, 100)
    write(tmp_path, 2, 0, 0)
    return tmp_path


def write(tasks: Path, thread: int, ran: int, waited: int) -> None:
    """Milliseconds that a thread has run and waited."""
    (tasks / str(thread)).mkdir(exist_ok=True)
    (tasks / str(thread) / "schedstat").write_text(f"{ran * 10**6} {waited * 10**6} 7\n")


def test_it_is_the_share_of_the_time_that_threads_waited_since_it_was_begun(tasks: Path) -> None:
    meter = LoadMeter(tasks)
    write(tasks, 1, 520, 110)
    write(tasks, 2, 10, 0)
    write(tasks, 3, 30, 30)
    assert meter.share() == pytest.approx(40 / 100)
    assert LoadMeter(tasks).share() is None


def test_a_thread_that_has_ended_is_left_out(tasks: Path) -> None:
    meter = LoadMeter(tasks)
    write(tasks, 2, 30, 10)
    (tasks / "1/schedstat").unlink()
    assert meter.share() == pytest.approx(0.25)


def test_too_little_was_run_to_say_anything(tasks: Path) -> None:
    meter = LoadMeter(tasks)
    write(tasks, 1, 509, 10_000)
    assert meter.share() is None


@pytest.mark.parametrize("content", ["0 0 0\n", "", "1 2\n", "a b c\n"])
def test_a_kernel_that_does_not_count_says_nothing(tasks: Path, content: str) -> None:
    for thread in (1, 2):
        (tasks / str(thread) / "schedstat").write_text(content)
    assert LoadMeter(tasks).share() is None
    assert LoadMeter(tasks / "nowhere").share() is None


def test_this_process_is_measured_where_the_kernel_counts() -> None:
    if not Path("/proc/self/schedstat").is_file():
        pytest.skip("this kernel doesn't count")
    meter = LoadMeter()
    for _ in range(10_000_000):
        threading.get_ident()
    share = meter.share()
    assert share is not None
    assert 0 <= share < 1
