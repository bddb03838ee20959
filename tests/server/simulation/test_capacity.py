import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tome_server.calibration.profile_key import ProfileKey
from tome_server.calibration.profile_store import profile_text, save_profile
from tome_server.cli.main import main
from tome_server.errors import ConfigError
from tome_server.models.bundled import BUNDLED
from tome_server.scheduling.profile import Profile
from tome_server.simulation.capacity import Plan, Question, answer_fields, load_replica

QUALITY = BUNDLED / "fashion" / "quality.json"
WEIGHTS = json.loads(QUALITY.read_text())["weights_sha256"]
RS = tuple(range(0, 16, 2))
SIZES = (1, 8)
# 2 ms, and 10 ms an image at r = 0, half of that at the last.
P50 = tuple(tuple(0.002 + 0.010 * size * (1 - level / 14) for level in range(8)) for size in SIZES)
PROFILE = Profile(SIZES, RS, P50, tuple(tuple(1.04 * value for value in row) for row in P50))
KEY = ProfileKey(
    model="vit_tiny_patch16_224",
    weights=WEIGHTS,
    input_size=(3, 28, 28),
    macs=tuple(range(80, 0, -10)),
    proportional_attention=True,
    device="A Processor",
    dtype="float32",
    threads=1,
    torch="2.13.0",
    timm="1.0.31",
    tome_serving="0.1.0",
    max_batch=8,
    rs=RS,
)
# Seconds matter little here: few requests will do.
QUESTION = Question(rate=500.0, budgets=(0.12,), attainment=0.99, requests=2000)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    save_profile(path, KEY, PROFILE)
    return path


def fields(**changes: Any) -> dict[str, Any]:
    quality = load_quality()
    return answer_fields(Plan(replace(QUESTION, **changes), PROFILE, quality))


def load_quality() -> tuple[float, ...]:
    levels = json.loads(QUALITY.read_text())["levels"]
    return tuple(level["top1"] for level in levels)


def failure(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    return str(caught.value.code)


def test_the_answer_is_the_fewest_that_do() -> None:
    plan = Plan(QUESTION, PROFILE, load_quality())
    enough = plan.fewest("price")
    assert enough is not None
    assert plan.point("price", enough).result.attainment >= 0.99
    assert plan.point("price", enough - 1).result.attainment < 0.99
    # 8 images take 42 ms at the most merging, and 82 ms unmerged.
    assert 500 / (8 / 0.042) <= enough <= 500 / (8 / 0.082) + 1


def test_it_takes_fewer_replicas_than_without_merging_at_more_quality_than_with_the_most() -> None:
    answer = fields()
    plain, most = answer["others"]
    assert (plain["policy"], most["policy"]) == ("fixed:0", "fixed:14")
    assert most["replicas"] <= answer["replicas"] < plain["replicas"]
    table = [point["replicas"] for point in answer["table"]]
    assert table == sorted(table)
    assert answer["replicas"] in table
    roomy = answer["table"][-1]
    assert roomy["mean_r"] < answer["answer"]["mean_r"]
    assert roomy["attainment"] >= answer["answer"]["attainment"]


def test_more_asked_takes_more() -> None:
    replicas = fields()["replicas"]
    assert fields(cv2=8.0)["replicas"] > replicas
    assert fields(attainment=0.5)["replicas"] < replicas
    assert fields(rate=1.0)["replicas"] == 1


def test_what_no_number_of_replicas_does_is_said() -> None:
    answer = fields(budgets=(0.005,))
    assert answer["replicas"] is answer["answer"] is None
    assert answer["table"] == []
    # Half of the budgets can be met.
    assert fields(budgets=(0.005, 0.12), attainment=0.4)["replicas"] is not None


def test_each_thing_is_simulated_once() -> None:
    told: list[None] = []
    plan = Plan(QUESTION, PROFILE, load_quality(), lambda: told.append(None))
    answer_fields(plan)
    once = len(told)
    answer_fields(plan)
    assert len(told) == once > 0


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--policy: 'best' is no policy"):
        Plan(replace(QUESTION, policy="best"), PROFILE, load_quality())


def test_a_replica_is_read_from_its_files(profile: Path) -> None:
    key, measured, quality = load_replica(profile, None)
    assert key == KEY
    assert (measured.sizes, measured.rs) == (SIZES, RS)
    assert measured.p50[1] == pytest.approx(P50[1], rel=1e-5)
    assert quality == load_quality()


def test_the_default_is_the_bundled_model_as_last_profiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="run tome-server profile, or name with --profile"):
        load_replica(None, None)
    folder = tmp_path / "tome-serving" / "profiles"
    save_profile(folder / "fashion-01234567.json", KEY, PROFILE)
    assert load_replica(None, None)[0] == KEY


def test_agreement_counts_where_nothing_is_labelled(profile: Path, tmp_path: Path) -> None:
    report = json.loads(QUALITY.read_text())
    for level in report["levels"]:
        level["top1"] = None
    (tmp_path / "quality.json").write_text(json.dumps(report))
    assert load_replica(profile, tmp_path / "quality.json")[2][0] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report.update(weights_sha256="other"), "was measured on other weights than the profile"),
        (lambda report: report.update(levels=report["levels"][:3]), "lacks r = 6, 8, 10, 12, 14"),
        (lambda report: report.pop("levels"), "can't be read: levels"),
        (lambda report: report.update(levels=[1]), "can't be read: levels"),
    ],
)
def test_a_quality_report_that_does_not_fit_is_refused(profile: Path, tmp_path: Path, change: Any, says: str) -> None:
    report = json.loads(QUALITY.read_text())
    change(report)
    (tmp_path / "quality.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=says):
        load_replica(profile, tmp_path / "quality.json")


def test_another_models_profile_needs_its_quality(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(
        profile_text(replace(KEY, model="vit_base_patch16_224", weights="hub:vit_base_patch16_224"), PROFILE)
    )
    with pytest.raises(ConfigError, match="tome-server evaluate --output FILE measures it for vit_base_patch16_224"):
        load_replica(path, None)


def test_the_command_prints_words_and_a_table(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--rate", "500", "--budget", "120ms", "--profile", str(profile), "--requests", "1000"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0.99 of 500 requests/s within 120 ms, CV² 1: ")
    assert sum(line.endswith(" <") for line in lines) == 1
    assert [line.partition(":")[0] for line in lines[-2:]] == ["fixed", "fixed"]


def test_the_command_prints_its_words_on_a_terminal_of_ascii_too(profile: Path) -> None:
    asked = ["--rate", "500", "--budget", "120ms", "--profile", str(profile), "--requests", "200"]
    done = subprocess.run(
        [sys.executable, "-m", "tome_server", "plan", *asked],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "within 120 ms, CV2 1: " in done.stdout


def test_the_command_prints_json_and_draws(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.svg"
    load = "--rate 300 --budget mix:60ms=3,120ms=1 --cv2 4 --attainment 0.95 --requests 500 --overhead 0"
    with pytest.raises(SystemExit) as caught:
        main(["plan", *load.split(), "--json", "--profile", str(profile), "--picture", str(picture)])
    assert caught.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["question"]["budgets"] == [0.06, 0.12]
    assert document["question"]["weights"] == [3, 1]
    assert document["answer"]["attainment"] >= 0.95
    assert "<svg" in picture.read_text()


def test_the_command_fails_where_nothing_does(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--rate", "5", "--budget", "5ms", "--profile", str(profile), "--requests", "200"])
    assert caught.value.code == 1
    assert "no number of replicas does that; an all but idle one answers 0.000%" in capsys.readouterr().out


def test_what_could_not_be_drawn_is_said_before_anything_is_simulated(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--rate", "5", "--budget", "50ms", "--profile", str(profile), "--picture")
    gone = tmp_path / "gone"
    assert failure(*asked, str(gone / "a.svg")) == f"tome-server: --picture: there is no folder {gone}"
    pytest.importorskip("matplotlib")
    message = failure(*asked, str(tmp_path / "a.jpeg"))
    assert message == f"tome-server: --picture: {tmp_path / 'a.jpeg'} must end in one of .png, .svg, .pdf"
    monkeypatch.delitem(sys.modules, "tome_server.cli.pictures")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert failure(*asked, str(tmp_path / "a.svg")).endswith("it needs: pip install 'tome-serving[plots]'")


def test_a_profile_that_is_not_there_is_said(tmp_path: Path) -> None:
    message = failure("--rate", "5", "--budget", "50ms", "--profile", str(tmp_path / "none.json"))
    assert message.endswith("none.json; tome-server profile --output FILE writes one")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda document: document["key"].pop("rs"), "is damaged"),
        (lambda document: document["key"].update(more=1), "is damaged"),
        (lambda document: document.pop("batch_sizes"), "is damaged: batch_sizes is missing"),
        (lambda document: document.update(p50_seconds=[[1.0]]), "is damaged: p50 must have 2 rows of 8 values"),
    ],
)
def test_a_damaged_profile_is_refused(profile: Path, change: Any, says: str) -> None:
    document = json.loads(profile.read_text())
    change(document)
    profile.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=says):
        load_replica(profile, None)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rate", "0"],
        ["--rate", "many"],
        ["--budget", "soon"],
        ["--budget", "50"],
        ["--budget", "none"],
        ["--overhead", "2"],
        ["--attainment", "1.1"],
        ["--attainment", "0"],
        ["--cv2", "-1"],
        ["--overhead", "-1ms"],
        ["--requests", "0"],
    ],
)
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--rate", "5", "--budget", "50ms", *wrong])
    assert caught.value.code == 2
    assert f"argument {wrong[0]}: " in capsys.readouterr().err
