import importlib.metadata
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tome_server.calibration import profile_store
from tome_server.calibration.profile_store import (
    ProfileError,
    ProfileKey,
    default_folder,
    device_name,
    keep_profile,
    load_profile,
    obtain_profile,
    profile_key,
    profile_path,
    profile_text,
    read_profile,
    save_profile,
)
from tome_server.execution.executor import run_batch
from tome_server.merging import merge, pack
from tome_server.models.loaded import LoadedModel, with_schedules
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Profile

CPU = torch.device("cpu")
PROFILE = Profile(
    sizes=(1, 2, 4),
    rs=(0, 2),
    p50=((0.0135123456, 0.0121), (0.02, 0.015), (0.03, 0.02)),
    p95=((0.0142, 0.0129), (0.021, 0.016), (0.0311, 0.022)),
    extra_group=0.00123456789,
    one_call=False,
)
GOOD = Measured(rounds=5, load=0.0123456789, spread=1.06)
BUSY = Measured(rounds=5, load=0.374, spread=1.3)


@pytest.fixture
def key() -> ProfileKey:
    return ProfileKey(
        model="vit_tiny_patch16_224",
        weights="ab" * 32,
        input_size=(3, 16, 16),
        macs=(1000, 600),
        proportional_attention=True,
        device="A Processor",
        dtype="float32",
        threads=1,
        torch="2.13.0+cpu",
        timm="1.0.31",
        tome_serving="0.1.0",
        max_batch=4,
        rs=(0, 2),
    )


@pytest.fixture
def path(tmp_path: Path, key: ProfileKey) -> Path:
    """A stored profile."""
    path = profile_path(tmp_path / "profiles", "tiny", key)
    save_profile(path, key, PROFILE)
    return path


def test_what_is_read_is_what_was_stored_to_six_digits(path: Path, key: ProfileKey) -> None:
    read = load_profile(path, key)
    assert (read.sizes, read.rs, read.one_call) == (PROFILE.sizes, PROFILE.rs, PROFILE.one_call)
    for given, stored in ((read.p50, PROFILE.p50), (read.p95, PROFILE.p95)):
        assert [list(row) for row in given] == [pytest.approx(row, rel=1e-5) for row in stored]
    assert read.extra_group == pytest.approx(PROFILE.extra_group, rel=1e-5)
    save_profile(path, key, read)
    assert load_profile(path, key) == read


@pytest.mark.parametrize("one_call", [True, False])
def test_a_file_keeps_the_key_that_earlier_versions_wrote(tmp_path: Path, key: ProfileKey, one_call: bool) -> None:
    """Profiles are shipped from machine to machine, and outlive a name in the code."""
    path = tmp_path / "profile.json"
    save_profile(path, key, replace(PROFILE, one_call=one_call))
    assert json.loads(path.read_text())["packed"] is one_call
    assert load_profile(path, key).one_call is one_call


def test_a_file_says_what_it_holds_and_in_which_unit(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["format"] == 1
    assert document["key"]["device"] == "A Processor"
    assert document["key"]["rs"] == [0, 2]
    assert document["batch_sizes"] == [1, 2, 4]
    assert document["p50_seconds"][0] == [0.0135123, 0.0121]
    assert document["extra_group_seconds"] == 0.00123457


@pytest.mark.parametrize("measured", [GOOD, BUSY, replace(GOOD, load=None), Measured(1, 0.0, 1.0, extrapolated=True)])
def test_how_a_profile_was_measured_is_stored_with_it(path: Path, key: ProfileKey, measured: Measured) -> None:
    save_profile(path, key, replace(PROFILE, measured=measured))
    read = load_profile(path, key).measured
    assert read is not None
    assert (read.rounds, read.extrapolated, read.provisional) == (
        measured.rounds,
        measured.extrapolated,
        measured.provisional,
    )
    assert read.spread == pytest.approx(measured.spread, rel=1e-5)
    assert read.load == (None if measured.load is None else pytest.approx(measured.load, rel=1e-5))
    assert json.loads(path.read_text())["measured"].keys() == {"rounds", "load", "spread", "extrapolated"}


def test_a_file_of_an_older_version_is_read_and_counts_as_good(path: Path, key: ProfileKey) -> None:
    assert "measured" not in json.loads(path.read_text())
    read = load_profile(path, key)
    assert read.measured is None
    assert not read.provisional


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rounds", 2.5, "rounds must be a whole number"),
        ("rounds", -1, "rounds can't be -1"),
        ("load", 1.5, "load must lie in 0..1, not 1.5"),
        ("load", "much", "not supported"),
        ("spread", 0, "spread must be above 0"),
        ("spread", None, "not supported"),
        ("extrapolated", 1, "extrapolated true or false"),
    ],
)
def test_what_does_not_say_how_it_was_measured_is_damaged(
    path: Path, key: ProfileKey, name: str, value: Any, says: str
) -> None:
    save_profile(path, key, replace(PROFILE, measured=GOOD))
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"measured": document["measured"] | {name: value}}))
    with pytest.raises(ProfileError, match=f"{path} is damaged: .*{says}"):
        load_profile(path, key)
    del document["measured"][name]
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=f"is damaged: '{name}' is missing"):
        load_profile(path, key)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(path: Path, key: ProfileKey) -> None:
    save_profile(path, key, replace(PROFILE, one_call=True))
    assert load_profile(path, key).one_call
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    path: Path, key: ProfileKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ProfileError, match=f"{path} can't be written: No space left on device"):
        save_profile(path, key, replace(PROFILE, one_call=True))
    assert load_profile(path, key).one_call is False
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_others_may_read_a_profile(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("model", "vit_base_patch16_224", "model (vit_tiny_patch16_224, not vit_base_patch16_224)"),
        ("weights", "cd" * 32, "weights (ababab"),
        ("input_size", (3, 32, 32), "input_size ([3, 16, 16], not [3, 32, 32])"),
        ("macs", (1000, 700), "macs ([1000, 600], not [1000, 700])"),
        ("proportional_attention", False, "proportional_attention (True, not False)"),
        ("device", "Another", "device (A Processor, not Another)"),
        ("dtype", "float16", "dtype (float32, not float16)"),
        ("threads", 2, "threads (1, not 2)"),
        ("torch", "2.14.0", "torch (2.13.0+cpu, not 2.14.0)"),
        ("timm", "1.0.32", "timm (1.0.31, not 1.0.32)"),
        ("tome_serving", "0.2.0", "tome_serving (0.1.0, not 0.2.0)"),
        ("max_batch", 8, "max_batch (4, not 8)"),
        ("rs", (0, 4), "rs ([0, 2], not [0, 4])"),
        ("division", "images", "division (, not images)"),
        ("merging", "C", "merging (torch, not C)"),
        ("attention", "C", "attention (torch, not C)"),
    ],
)
def test_a_profile_of_another_set_up_is_refused_and_what_differs_is_said(
    path: Path, key: ProfileKey, name: str, value: Any, says: str
) -> None:
    wanted = replace(key, **{name: value})
    assert profile_path(path.parent, "tiny", wanted) != path
    with pytest.raises(ProfileError) as caught:
        load_profile(path, wanted)
    assert str(caught.value).startswith(f"{path} was measured with other {says}")


def test_all_that_differs_is_said(path: Path, key: ProfileKey) -> None:
    with pytest.raises(ProfileError, match=r"threads \(1, not 2\); torch \(2\.13\.0\+cpu, not 3\)"):
        load_profile(path, replace(key, threads=2, torch="3"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path, key: ProfileKey) -> None:
    with pytest.raises(ProfileError, match=f"there is no {tmp_path / 'gone.json'}"):
        load_profile(tmp_path / "gone.json", key)


def test_a_folder_in_the_files_place_is_named(tmp_path: Path, key: ProfileKey) -> None:
    with pytest.raises(ProfileError, match="can't be read: Is a directory"):
        load_profile(tmp_path, key)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no profile"),
        (b"{}", "is no profile"),
        (b'{"format": 2}', "has format 2; this version reads 1"),
        (b'{"format": 1}', "is damaged: 'key' is missing"),
        (b'{"format": 1, "key": 3}', "is damaged: 'key' is missing"),
        (b'{"format": 1, "key": {}}', r"was measured with other model \(None, not vit_tiny_patch16_224\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_profile_is_refused(path: Path, key: ProfileKey, content: bytes, says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=says):
        load_profile(path, key)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("batch_sizes", [1, 2, 3], "batch sizes end at 3"),
        ("batch_sizes", [1, 2.5, 4], "whole numbers"),
        ("batch_sizes", [1, "2", 4], "whole numbers"),
        ("batch_sizes", [2, 4], "must ascend from 1"),
        ("batch_sizes", 4, "not iterable"),
        ("p50_seconds", [[1, 1]], "p50 must have 3 rows of 2 values"),
        ("p50_seconds", [[1, 2], [1, 2], [1, 2]], "p50 must fall with r"),
        ("p50_seconds", [["a", "b"]] * 3, "not supported"),
        ("p50_seconds", None, "not iterable"),
        ("p95_seconds", [[float("nan")] * 2] * 3, "p95 must hold positive seconds"),
        ("p95_seconds", [[1e-9, 1e-9]] * 3, "p95 can't be less than p50"),
        ("extra_group_seconds", -1, "extra_group must be seconds"),
        ("extra_group_seconds", None, "not supported"),
        ("packed", "yes", "packed must be true or false"),
    ],
)
def test_a_damaged_profile_is_refused(path: Path, key: ProfileKey, name: str, value: Any, says: str) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {name: value}))
    with pytest.raises(ProfileError, match=f"{path} is damaged: .*{says}"):
        load_profile(path, key)
    del document[name]
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=f"is damaged: '{name}' is missing"):
        load_profile(path, key)


def test_a_profile_can_be_read_whatever_it_holds_for(path: Path, key: ProfileKey) -> None:
    assert read_profile(path) == (key, load_profile(path, key))
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"key": {"model": "vit"}}))
    with pytest.raises(ProfileError, match=f"{path} is damaged: .*missing"):
        read_profile(path)
    path.write_text(json.dumps(document | {"packed": 1}))
    with pytest.raises(ProfileError, match=f"{path} is damaged: packed must be true or false"):
        read_profile(path)


def test_a_models_name_makes_a_plain_file_name(tmp_path: Path, key: ProfileKey) -> None:
    path = profile_path(tmp_path, "../a model/ß", key)
    assert path.parent == tmp_path
    assert path.name == f".._a_model_ß-{key.digest}.json"
    assert len(key.digest) == 8


def test_profiles_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache/tome-serving/profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache/tome-serving/profiles"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ProfileError, match="neither a home folder nor XDG_CACHE_HOME"):
        default_folder()


def test_the_key_holds_what_latency_depends_on(model: LoadedModel, tmp_path: Path) -> None:
    checkpoint = tmp_path / "weights"
    checkpoint.write_bytes(b"")
    key = profile_key(model, checkpoint, CPU, 4)
    assert key.weights == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert key.model == "vit_tiny_patch16_224"
    assert key.rs == tuple(level.r for level in model.info.grid)
    assert key.macs == tuple(level.cost.total for level in model.info.grid)
    assert (key.dtype, key.max_batch, key.input_size) == ("float32", 4, (3, 16, 16))
    assert key.torch == torch.__version__
    assert key.device == device_name(CPU) != ""
    assert profile_key(model, None, CPU, 4).weights == "hub:vit_tiny_patch16_224"


def test_the_key_holds_schedules_for_equal_work_may_take_another_time(model: LoadedModel) -> None:
    constant, written = (profile_key(m, None, CPU, 4) for m in (model, with_schedules(model, {2: (2, 2)})))
    assert constant.schedules == ""
    assert written.schedules == "2: 2 2"
    assert written.macs == constant.macs
    assert written.digest != constant.digest


def test_the_key_holds_what_a_few_threads_divide_among_them(model: LoadedModel) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval().requires_grad_(False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        divisions = []
        for divided in (False, True):
            packed = replace(model, merged=pack(merge(network), divided=divided))
            divisions.append(profile_key(packed, None, CPU, 4).division)
    finally:
        torch.set_num_threads(before)
    assert divisions == ["images", "images and blocks"]
    assert profile_key(model, None, CPU, 4).division == ""


def test_the_key_holds_the_threads_that_were_set_last(model: LoadedModel) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert profile_key(model, None, CPU, 4).threads == threads
    finally:
        torch.set_num_threads(before)


def test_a_processor_that_does_not_say_its_name_goes_by_its_kind(tmp_path: Path) -> None:
    assert profile_store._cpu_name(tmp_path / "gone") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert profile_store._cpu_name(tmp_path / "cpuinfo") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor  \n\nmodel name\t: B\n")
    assert profile_store._cpu_name(tmp_path / "cpuinfo") == "A Processor"


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
    monkeypatch.setattr(profile_store, "measure", measure)
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
    return profile_store.measure_again(
        model, None, CPU, profile=profile, max_batch=2, budget=3, folder=folder, run=run_batch, stop=threading.Event()
    )


def test_in_service_what_is_better_is_stored_and_returned(
    model: LoadedModel, tmp_path: Path, measured: Measure, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile_store, "load_of_single_images", SingleImages(0.01))
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
    monkeypatch.setattr(profile_store, "load_of_single_images", SingleImages(load))
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
    assert f"there is no {own / file.name}; {file} is no JSON" in caplog.messages[-2]


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
    assert f"{file} is no JSON" in caplog.text
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
    monkeypatch.setattr(profile_store.secrets, "token_hex", lambda _: "full")
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
    for name in ("glob", "read_bytes", "mkdir"):
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


def test_the_text_is_the_files(path: Path, key: ProfileKey) -> None:
    assert profile_text(key, PROFILE) == path.read_text()


def test_what_is_run_from_its_source_has_no_version_and_a_profile_all_the_same(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def of_others(name: str) -> str:
        if name == "tome-serving":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert profile_key(model, None, torch.device("cpu"), 4).tome_serving == "0+unknown"
