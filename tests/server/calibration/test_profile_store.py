import contextlib
import json
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.server.json_mutations import mutated
from tome_server.calibration.profile_key import ProfileKey
from tome_server.calibration.profile_store import (
    ProfileError,
    default_folder,
    load_profile,
    nearest_path,
    profile_path,
    profile_text,
    read_profile,
    save_profile,
)
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Latency, Profile

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


KEY = ProfileKey(
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
def key() -> ProfileKey:
    return KEY


@pytest.fixture
def path(tmp_path: Path, key: ProfileKey) -> Path:
    """A stored profile."""
    path = profile_path(tmp_path / "profiles", "tiny", key)
    save_profile(path, key, PROFILE)
    return path


def test_what_is_read_is_what_was_stored_to_six_digits(path: Path, key: ProfileKey) -> None:
    read = load_profile(path, key)
    assert (read.sizes, read.rs, read.one_call) == (PROFILE.sizes, PROFILE.rs, PROFILE.one_call)
    for rows, stored in ((read.p50, PROFILE.p50), (read.p95, PROFILE.p95)):
        assert [list(row) for row in rows] == [pytest.approx(row, rel=1e-5) for row in stored]
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
        ("rounds", 2.5, "measured.rounds must be a whole number of 0 to 1,000,000, not 2.5"),
        ("rounds", -1, "measured.rounds must be a whole number of 0 to 1,000,000, not -1"),
        ("load", 1.5, "measured.load must be a number of 0 to 1, not 1.5"),
        ("load", "much", "measured.load must be a number of 0 to 1, not much"),
        ("spread", 0, "measured.spread must be a number of 1e-06 to 1e"),
        ("spread", None, "measured.spread must be a number .* not None"),
        ("spread", 1e308, "measured.spread must be a number .* not 1e"),
        ("extrapolated", 1, "measured.extrapolated must be true or false, not 1"),
    ],
)
def test_what_does_not_say_how_it_was_measured_is_damaged(
    path: Path, key: ProfileKey, name: str, value: Any, says: str
) -> None:
    save_profile(path, key, replace(PROFILE, measured=GOOD))
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"measured": document["measured"] | {name: value}}))
    with pytest.raises(ProfileError, match=f"{path} (is damaged|can't be read): .*{says}"):
        load_profile(path, key)
    del document["measured"][name]
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=rf"is damaged: (measured\.)?{name} is missing"):
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
        (b"", "can't be read: it is no JSON"),
        (b"{", "can't be read: it is no JSON"),
        (b"\xff\xfe\x00", "can't be read: the file is UTF-16"),
        (b"[" * 100_000, "can't be read: it is nested too deeply"),
        (b" " * (16 * 2**20 + 1), "can't be read: it is larger than 16,777,216 bytes"),
        (b'{"format": 1, "format": 1}', "can't be read: format is given twice"),
        (b'{"format": 1, "key": NaN}', "can't be read: it holds NaN"),
        (b"[]", "can't be read: the file must be an object"),
        (b"{}", "is no profile"),
        (b'{"format": 2}', "has format 2; this version reads 1"),
        (b'{"format": 1}', "is damaged: key is missing"),
        (b'{"format": 1, "key": 3}', "is damaged: key must be an object"),
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
        ("batch_sizes", [1, 2.5, 4], r"batch_sizes\[1\] must be a whole number of 1 to 4,096, not 2.5"),
        ("batch_sizes", [1, "2", 4], r"batch_sizes\[1\] must be a whole number"),
        ("batch_sizes", [True, 2, 4], r"batch_sizes\[0\] must be a whole number"),
        ("batch_sizes", [1] * 5000, "batch_sizes has 5,000 items; at most 4,096 are accepted"),
        ("batch_sizes", [], "batch sizes end at none"),
        ("batch_sizes", [2, 4], "must ascend from 1"),
        ("batch_sizes", 4, "batch_sizes must be a list, not 4"),
        ("p50_seconds", [[1, 1]], "p50 must have 3 rows of 2 values"),
        ("p50_seconds", [[1, 2], [1, 2], [1, 2]], "p50 must fall with r"),
        ("p50_seconds", [["a", "b"]] * 3, r"p50_seconds\[0\]\[0\] must be a number of 1e-07 to 2400, not a"),
        ("p95_seconds", [[1e308, 1e308]] * 3, r"p95_seconds\[0\]\[0\] must be a number .* not 1e"),
        ("p50_seconds", [[1e-308, 1e-308]] * 3, r"p50_seconds\[0\]\[0\] must be a number .* not 1e"),
        ("p50_seconds", [[10**400] * 2] * 3, r"p50_seconds\[0\]\[0\] must be a number"),
        ("p95_seconds", [[2000, 1]] * 3, "p95_seconds has 2000 s for a batch of 1, more than any model takes"),
        ("p50_seconds", None, "p50_seconds must be a list, not None"),
        ("p95_seconds", [[float("nan")] * 2] * 3, "it holds NaN, which is no number"),
        ("p95_seconds", [[1e-6, 1e-6]] * 3, "p95 can't be less than p50"),
        ("extra_group_seconds", -1, "extra_group_seconds must be a number of 0 to 2400, not -1"),
        ("extra_group_seconds", 1e308, "extra_group_seconds must be a number of 0 to 2400"),
        ("extra_group_seconds", None, "extra_group_seconds must be a number"),
        ("packed", "yes", "packed must be true or false"),
    ],
)
def test_a_damaged_profile_is_refused(path: Path, key: ProfileKey, name: str, value: Any, says: str) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {name: value}))
    with pytest.raises(ProfileError, match=f"{path} (is damaged|can't be read): .*{says}"):
        load_profile(path, key)
    del document[name]
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=rf"is damaged: (measured\.)?{name} is missing"):
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


def test_a_profile_that_an_earlier_version_stored_is_found_and_read(tmp_path: Path, key: ProfileKey) -> None:
    """The name and the text of the file must not change, or every machine measures its models again."""
    file = tmp_path / "tiny-522b85b7.json"
    file.write_text(
        '{"format": 1, "key": {"model": "vit_tiny_patch16_224", "weights": "' + "ab" * 32 + '", '
        '"input_size": [3, 16, 16], "macs": [1000, 600], "proportional_attention": true, "device": "A Processor", '
        '"dtype": "float32", "threads": 1, "torch": "2.13.0+cpu", "timm": "1.0.31", "tome_serving": "0.1.0", '
        '"max_batch": 4, "rs": [0, 2], "schedules": "", "division": "", "merging": "torch", "attention": "torch"}, '
        '"batch_sizes": [1, 2, 4], "p50_seconds": [[0.0135123, 0.0121], [0.02, 0.015], [0.03, 0.02]], '
        '"p95_seconds": [[0.0142, 0.0129], [0.021, 0.016], [0.0311, 0.022]], "extra_group_seconds": 0.00123457, '
        '"packed": false, "measured": {"rounds": 5, "load": 0.0123, "spread": 1.06, "extrapolated": false}}'
    )
    assert nearest_path(tmp_path, "tiny", key) == profile_path(tmp_path, "tiny", key) == file
    profile = load_profile(file, key)
    assert profile.p50 == ((0.0135123, 0.0121), (0.02, 0.015), (0.03, 0.02))
    assert profile.measured == Measured(rounds=5, load=0.0123, spread=1.06)
    assert read_profile(file) == (key, profile)


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


def test_the_text_is_the_files(path: Path, key: ProfileKey) -> None:
    assert profile_text(key, PROFILE) == path.read_text()


@given(st.data())
def test_a_mutated_profile_ends_in_a_sound_record_or_the_documented_error(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.json")
        save_profile(path, KEY, replace(PROFILE, measured=GOOD))
        path.write_bytes(data.draw(mutated(json.loads(path.read_text()))))
        try:
            profile = load_profile(path, KEY)
        except ProfileError as error:
            assert str(error).startswith((str(path), f"there is no {path}"))  # noqa: PT017
        else:
            _check_sound(profile)
        with contextlib.suppress(ProfileError):
            _check_sound(read_profile(path)[1])


def _check_sound(profile: Profile) -> None:
    """A server that relies on it predicts finite times, whatever batches then take."""
    latency = Latency(profile)
    for seconds in (1e-6, 1e-3, 10.0):
        for size in range(1, profile.max_batch + 1):
            for level in range(len(profile.rs)):
                assert 0 < latency.expected(size, level) <= latency.promised(size, level) * (1 + 1e-9) < 1e12
        latency.observe([0], seconds)
    assert str(profile.measured) is not None
