"""What is measured to choose by, and kept."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tome_server.calibration import speedups
from tome_server.calibration.cpu_load import LoadMeter
from tome_server.calibration.speedups import Speedups, model_speedups, speed_key
from tome_server.merging.cpu import attention_c, matching_c
from tome_server.models.spec import ModelSpec

CPU = torch.device("cpu")
KEY = {"model": "vit", "threads": 2}
SPEC = ModelSpec(name="tiny", architecture="vit_tiny_patch16_224", kwargs={"img_size": 32})


class Clock:
    """Measures what it is told to, and counts how often it is asked."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.gain


def test_a_gain_is_measured_once_and_stays_when_the_machine_would_now_say_otherwise(tmp_path: Path) -> None:
    first, busy = Clock(1.25), Clock(1.0)
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", first) == 1.25
    again = Speedups("vit", KEY, tmp_path)
    assert [again.get_or_measure("division", busy) for _ in range(2)] == [1.25] * 2
    assert (first.asked, busy.asked) == (1, 0)


def test_the_same_is_chosen_at_the_first_start_as_at_those_that_read_what_it_kept(tmp_path: Path) -> None:
    first = Speedups("vit", KEY, tmp_path).get_or_measure("bfloat16", Clock(1.09996))
    assert Speedups("vit", KEY, tmp_path).get_or_measure("bfloat16", Clock(0.0)) == first


def test_gains_of_one_key_lie_in_one_file_and_each_is_measured_when_it_is_asked_for(tmp_path: Path) -> None:
    for what in ("bfloat16", "division"):
        Speedups("a/vit", KEY, tmp_path).get_or_measure(what, Clock(1.5))
    [file] = tmp_path.iterdir()
    assert file.name.startswith("a_vit-")
    assert json.loads(file.read_text()) == {"key": KEY, "gains": {"bfloat16": 1.5, "division": 1.5}}


def test_another_key_is_measured_for_itself_and_the_first_is_kept(tmp_path: Path) -> None:
    other = Clock(2.0)
    Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5))
    assert Speedups("vit", KEY | {"threads": 3}, tmp_path).get_or_measure("division", other) == 2.0
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", other) == 1.5
    assert other.asked == 1


def test_what_came_with_the_model_is_taken_and_only_read(tmp_path: Path) -> None:
    own, came, clock = tmp_path / "own", tmp_path / "came", Clock(2.0)
    Speedups("vit", KEY, came).get_or_measure("division", Clock(1.5))
    before = {file: file.read_bytes() for file in came.iterdir()}
    kept = Speedups("vit", KEY, own, came)
    assert kept.get_or_measure("division", clock) == 1.5
    assert not own.exists()
    assert kept.get_or_measure("bfloat16", clock) == 2.0
    assert {file: file.read_bytes() for file in came.iterdir()} == before
    # With those that it was measured beside.
    assert Speedups("vit", KEY, own).get_or_measure("division", clock) == 1.5


def test_measured_anew_all_that_was_kept_is_forgotten(tmp_path: Path) -> None:
    for what in ("division", "bfloat16"):
        Speedups("vit", KEY, tmp_path).get_or_measure(what, Clock(1.5))
    anew, later = Clock(2.0), Clock(3.0)
    assert Speedups("vit", KEY, tmp_path, anew=True).get_or_measure("division", anew) == 2.0
    # bfloat16 was measured with the other division.
    found = Speedups("vit", KEY, tmp_path)
    assert (found.get_or_measure("division", later), found.get_or_measure("bfloat16", later)) == (2.0, 3.0)


DAMAGES: list[Callable[[str], str]] = [
    lambda _: "",
    lambda whole: whole[:-10],
    lambda _: "[]",
    lambda _: '{"gains": {"division": 2}}',
    lambda whole: whole.replace("1.5", "0"),
    lambda whole: whole.replace("1.5", "NaN"),
    lambda whole: whole.replace("1.5", "1e400"),
    lambda whole: whole.replace("1.5", "1e308"),
    lambda whole: whole.replace("1.5", "1e-308"),
    lambda whole: whole.replace("1.5", "-1.5"),
    lambda whole: whole.replace("1.5", "true"),
    lambda whole: whole.replace('"division": 1.5', '"division": 1.5, "division": 1.5'),
    lambda _: "[" * 100_000,
    lambda _: " " * (16 * 2**20 + 1),
    lambda whole: whole.replace("\n}\n", ',\n  "busy": {"division": NaN}\n}\n'),
    lambda whole: whole.replace("\n}\n", ',\n  "busy": {"division": 1e308}\n}\n'),
    lambda whole: whole.replace("1.5", '"fast"'),
    lambda whole: whole.replace("1.5", "null"),
    lambda whole: whole.replace('"vit"', '"other"'),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_measured_again_and_replaced(
    tmp_path: Path, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5))
    [file] = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    clock = Clock(1.5)
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", clock) == 1.5
    assert clock.asked == 1
    assert file.read_text() == whole
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    if "other" not in damage(whole):  # that is of another set-up, not damaged
        [warning] = warnings
        assert warning.startswith(f"what was measured to choose by (vit) is measured again: {file}: ")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_measured_again_and_does_not_stop_the_start(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5))
    [file] = tmp_path.iterdir()
    file.unlink()
    make(file)
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(2.0)) == 2.0


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    def fails() -> float:
        raise MemoryError

    kept = Speedups("vit", KEY, tmp_path)
    with pytest.raises(MemoryError):
        kept.get_or_measure("division", fails)
    assert kept.get_or_measure("division", Clock(1.5)) == 1.5


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = Speedups("vit", KEY, tmp_path / "file")
    assert [kept.get_or_measure(what, Clock(1.5)) for what in ("division", "bfloat16")] == [1.5] * 2
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "(vit) isn't kept, and will be measured again at the next start: " in warning


def test_the_log_says_what_is_measured_and_nothing_where_it_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5))
    [file] = tmp_path.iterdir()
    assert caplog.messages == [f"measuring what is gained by division (vit), to be kept in {file.name}"]


def test_the_key_holds_all_that_speed_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> object:
        return speed_key(SPEC, CPU, 2, 8)

    keys = [
        key(),
        speed_key(SPEC, CPU, 1, 8),
        speed_key(SPEC, CPU, 2, 4),
        speed_key(replace(SPEC, architecture="vit_small_patch16_224"), CPU, 2, 8),
        speed_key(replace(SPEC, kwargs={"img_size": 64}), CPU, 2, 8),
        speed_key(replace(SPEC, data={"input_size": [3, 64, 64]}), CPU, 2, 8),
        speed_key(replace(SPEC, proportional_attention=False), CPU, 2, 8),
    ]
    monkeypatch.setattr(matching_c, "BUILT", not matching_c.BUILT)
    keys.append(key())
    monkeypatch.setattr(speedups, "packed_dtypes", lambda: (torch.float64,))
    keys.append(key())
    monkeypatch.setattr(attention_c, "DTYPES", {torch.float64})
    keys.append(key())
    monkeypatch.setattr(speedups, "device_name", lambda _: "another processor")
    keys.append(key())
    monkeypatch.setattr(torch, "__version__", "1.0")
    keys.append(key())
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])
    assert all(json.loads(json.dumps(each)) == each for each in keys)


def test_gains_of_a_model_are_those_on_as_many_threads_as_torch_is_set_to(tmp_path: Path) -> None:
    before, clock = torch.get_num_threads(), Clock(1.5)
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            model_speedups(SPEC, CPU, 8, tmp_path).get_or_measure("bfloat16", clock)
    finally:
        torch.set_num_threads(before)
    assert clock.asked == 2


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How busy the machine is found to be, from measurement to measurement."""
    loads: list[float | None] = []
    monkeypatch.setattr(LoadMeter, "share", lambda _: loads.pop(0))
    return loads


def test_a_gain_measured_while_the_machine_was_busy_is_measured_again_next_time(
    tmp_path: Path, load: list[float | None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load[:] = [0.37, 0.02]
    first = Speedups("vit", KEY, tmp_path)
    # Not within one start, where the choice must stay.
    assert [first.get_or_measure("division", Clock(gain)) for gain in (0.7, 1.5)] == [0.7] * 2
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"key": KEY, "gains": {"division": 0.7}, "busy": {"division": 0.37}}
    assert caplog.messages[-1] == (
        "what is gained by division (vit) was measured while the machine was busy (37% of the time waiting for a "
        "CPU); it will be measured again next time"
    )
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5)) == 1.5
    assert json.loads(file.read_text()) == {"key": KEY, "gains": {"division": 1.5}}
    assert Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(0.0)) == 1.5


def test_of_two_gains_measured_while_the_machine_was_busy_the_one_of_less_load_is_kept(
    tmp_path: Path, load: list[float | None]
) -> None:
    load[:] = [0.4, 0.6, 0.3, None]
    kept = [Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(gain)) for gain in (0.7, 0.8, 0.9, 1.5)]
    assert kept == [0.7, 0.7, 0.9, 1.5]


def test_what_does_not_say_how_busy_the_machine_was_is_measured_again(tmp_path: Path) -> None:
    Speedups("vit", KEY, tmp_path).get_or_measure("division", Clock(1.5))
    [file] = tmp_path.iterdir()
    for busy in ("[]", '{"division": "much"}', "3"):
        whole = file.read_text()
        file.write_text(whole.replace("\n}\n", f',\n  "busy": {busy}\n}}\n'))
        clock = Clock(1.5)
        assert Speedups("vit", KEY, tmp_path).get_or_measure("division", clock) == 1.5
        assert clock.asked == 1
        assert file.read_text() == whole
