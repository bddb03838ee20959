import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tome_server.calibration import obtain_profile as obtaining
from tome_server.calibration.obtain_profile import measure_again, obtain_profile
from tome_server.calibration.profile_key import profile_key
from tome_server.calibration.profile_store import keep_profile, load_profile, profile_path
from tome_server.config import text_file
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Profile

CPU = torch.device("cpu")
GOOD = Measured(rounds=5, load=0.0123456789, spread=1.06)
BUSY = Measured(rounds=5, load=0.374, spread=1.3)


class Measure:
    """Stands in for the measurement, which takes no time."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        """arguments"""
        self.measured: Measured | None = None
        """what the next profile says of how it was measured"""

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.calls)

    def __call__(self, model: LoadedModel, _: torch.device, **options: Any) -> Profile:
        self.calls.append(options)
        rs = tuple(level.r for level in model.info.grid)
        return Profile((1, 2), rs, ((0.01,) * len(rs),) * 2, ((0.02,) * len(rs),) * 2, measured=self.measured)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measure:
    measure = Measure()
    monkeypatch.setattr(obtaining, "measure", measure)
    return measure


def obtain(model: LoadedModel, folder: Path | None, shipped: Path | None = None) -> Profile:
    return obtain_profile(model, None, CPU, max_batch=2, budget=3, folder=folder, shipped=shipped)


def test_a_model_is_measured_once(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "deep" / "profiles"
    first = obtain(model, folder)
    assert [(call["max_batch"], call["budget"]) for call in measured] == [(2, 3)]
    [file] = folder.iterdir()
    assert caplog.messages == [
        f"measuring how fast tiny is, for about 3 s: there is no {file}",
        "profile of tiny measured: batches of several r run packed",
    ]
    caplog.clear()
    assert obtain(model, folder) == first
    assert len(measured) == 1
    assert caplog.messages == [f"profile of tiny read from {file}: batches of several r run packed"]


def test_a_profile_measured_while_the_machine_was_busy_is_measured_again_at_the_next_start(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    measured.measured = BUSY
    obtain(model, tmp_path)
    assert caplog.messages[-1] == (
        "profile of tiny measured: batches of several r run packed; measured while the machine was busy (37% of the "
        "time waiting for a CPU); it will be measured again"
    )
    measured.measured = GOOD
    assert obtain(model, tmp_path).measured == GOOD
    [file] = tmp_path.iterdir()
    assert caplog.messages[-2:] == [
        f"measuring how fast tiny is, for about 3 s: {file} was measured while the machine was busy (37% of the time "
        "waiting for a CPU)",
        "profile of tiny measured: batches of several r run packed",
    ]
    assert not obtain(model, tmp_path).provisional
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (BUSY, replace(BUSY, load=0.2)),
        (replace(GOOD, rounds=1), replace(GOOD, rounds=2)),
        (replace(GOOD, rounds=1, extrapolated=True), replace(GOOD, rounds=1)),
    ],
)
def test_of_two_provisional_profiles_the_better_is_kept(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture, worse: Measured,
    better: Measured,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    for now, kept in ((worse, worse), (better, better), (worse, better)):
        measured.measured = now
        assert obtain(model, tmp_path).rs
        [file] = tmp_path.iterdir()
        read = load_profile(file, profile_key(model, None, CPU, 2)).measured
        assert read is not None
        assert (read.rounds, read.load) == (kept.rounds, pytest.approx(kept.load, rel=1e-5))
    assert caplog.messages[-1].startswith(f"profile of tiny read from {file}: batches of several r run packed; meas")
    assert caplog.messages[-1].endswith("; it will be measured again")


def test_a_provisional_profile_that_came_with_the_model_is_measured_again_and_the_better_one_kept_beside(
    model: LoadedModel, tmp_path: Path, measured: Measure
) -> None:
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    measured.measured = BUSY
    obtain(model, shipped)
    [file] = shipped.iterdir()
    before = file.read_bytes()
    measured.measured = GOOD
    assert obtain(model, own, shipped).measured == GOOD
    assert file.read_bytes() == before
    assert len(list(own.iterdir())) == 1
    assert not obtain(model, own, shipped).provisional
    assert len(measured) == 2
    # A good one that came with the model is as good as one of the own.
    for name in own.iterdir():
        name.rename(shipped / name.name)
    measured.measured = BUSY
    keep_profile(own, "tiny", profile_key(model, None, CPU, 2), measured(model, CPU))
    assert not obtain(model, own, shipped).provisional


class SingleImages:
    """Stands in for the trial of single images that shows how busy the machine is."""

    def __init__(self, load: float | None) -> None:
        self.load = load

    def __call__(self, *_: object, **__: object) -> float | None:
        return self.load


def again(model: LoadedModel, folder: Path, profile: Profile) -> Profile | None:
    return measure_again(
        model, None, CPU, profile=profile, max_batch=2, budget=3, folder=folder, run=run_batch, stop=threading.Event()
    )


def test_in_service_what_is_better_is_stored_and_returned(
    model: LoadedModel, tmp_path: Path, measured: Measure, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(obtaining, "load_of_single_images", SingleImages(0.01))
    measured.measured = BUSY
    busy = obtain(model, tmp_path)
    caplog.set_level(logging.INFO)
    assert again(model, tmp_path, busy) is None
    assert caplog.messages == []
    measured.measured = GOOD
    found = again(model, tmp_path, busy)
    assert found is not None
    assert not found.provisional
    assert caplog.messages == ["profile of tiny measured again while nothing else ran: batches of several r run packed"]
    assert not obtain(model, tmp_path).provisional
    assert len(measured) == 3


@pytest.mark.parametrize(
    ("load", "before", "measures"),
    [(0.05, 0.374, True), (0.18, 0.374, True), (0.2, 0.374, False), (0.2, 0.05, False), (0.05, 0.05, True),
     (None, 0.374, True), (0.9, None, True)],
)  # fmt: skip
def test_in_service_nothing_is_measured_while_the_machine_is_busy(
    model: LoadedModel, tmp_path: Path, measured: Measure, monkeypatch: pytest.MonkeyPatch, load: float | None,
    before: float | None, measures: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(obtaining, "load_of_single_images", SingleImages(load))
    measured.measured = Measured(1, before, 1.0)
    again(model, tmp_path, measured(model, CPU))
    assert len(measured) == 1 + measures


def test_a_profile_that_came_with_the_model_is_read_and_never_written(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    profile = obtain(model, shipped)
    [file] = shipped.iterdir()
    assert obtain(model, own, shipped) == profile
    assert len(measured) == 1
    assert not own.exists()
    assert caplog.messages[-1] == f"profile of tiny read from {file}: batches of several r run packed"
    file.write_text("{")
    obtain(model, own, shipped)
    assert len(measured) == 2
    assert file.read_text() == "{"
    assert len(list(own.iterdir())) == 1
    assert f"there is no {own / file.name}; {file} can't be read: it is no JSON" in caplog.messages[-2]


def test_a_profile_of_another_set_up_is_measured_again_and_what_differs_is_logged(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    profile = obtain(model, tmp_path)
    [file] = tmp_path.iterdir()
    key = profile_key(model, None, CPU, 2)
    file.unlink()
    for other in (replace(key, torch="1.0", threads=7), replace(key, torch="1.1"), replace(key, timm="0", torch="0")):
        keep_profile(tmp_path, "tiny", other, profile)
    (tmp_path / "tiny-12345678.json").write_text("{")
    (tmp_path / "other-12345678.json").write_text("{")
    caplog.clear()
    obtain(model, tmp_path)
    assert len(measured) == 2
    message, _ = caplog.messages
    assert message.endswith(f"was measured with other torch (1.1, not {torch.__version__})")
    obtain(model, tmp_path)
    assert len(measured) == 2


def test_a_damaged_profile_is_measured_again_and_replaced(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    obtain(model, tmp_path)
    [file] = tmp_path.iterdir()
    file.write_text(file.read_text()[:100])
    caplog.clear()
    obtain(model, tmp_path)
    assert len(measured) == 2
    [warned] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned.startswith(f"the stored profile of tiny isn't used: {file} can't be read: it is no JSON")
    obtain(model, tmp_path)
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_warned_of_and_the_profile_used(
    model: LoadedModel, tmp_path: Path, measured: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # permissions would not stop root
    assert obtain(model, tmp_path / "file" / "profiles").max_batch == 2
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "isn't kept, and will be measured again at the next start" in record.getMessage()
    assert "can't be written: " in record.getMessage()


def test_a_full_disk_is_warned_of_the_profile_used_and_nothing_left_behind(
    model: LoadedModel,
    tmp_path: Path,
    measured: Measure,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written goes to the kernel's own full device."""
    path = profile_path(tmp_path, "tiny", profile_key(model, None, CPU, 2))
    monkeypatch.setattr(text_file.secrets, "token_hex", lambda _: "full")
    (tmp_path / f".{path.stem}-full.tmp").symlink_to("/dev/full")
    assert obtain(model, tmp_path).max_batch == 2
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "the profile of tiny isn't kept, and will be measured again at the next start: "
        f"{path} can't be written: No space left on device"
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_read_does_not_stop_a_server(
    model: LoadedModel,
    tmp_path: Path,
    measured: Measure,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def denied(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    caplog.set_level(logging.INFO)
    for name in ("glob", "stat", "mkdir"):
        monkeypatch.setattr(Path, name, denied)
    assert obtain(model, tmp_path).max_batch == 2
    assert "can't be read: Permission denied" in caplog.messages[0]
    assert "can't be written: Permission denied" in caplog.messages[1]


def test_without_a_home_the_profile_is_used_and_the_log_says_it_is_not_kept(
    model: LoadedModel, measured: Measure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert obtain(model, None).max_batch == 2
    assert "neither a home folder nor XDG_CACHE_HOME" in caplog.text


def test_without_a_folder_named_it_is_the_default_one(
    model: LoadedModel, tmp_path: Path, measured: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    obtain(model, None)
    assert len(list((tmp_path / "tome-serving/profiles").iterdir())) == 1
