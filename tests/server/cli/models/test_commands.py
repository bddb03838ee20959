"""The `tome-server models` commands, on models and images so small that each takes a moment."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.server_process import ServerProcess
from tome_client import Client
from tome_server.calibration.tuning import Tuned, tune
from tome_server.cli import main, offline
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load
from tome_server.models.repository import Repository
from tome_server.models.spec import ModelSpec, quality_file
from tome_server.scheduling.profile import Profile

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
CLASSES = ("circle", "square", "stripe")

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets these for its own process, which here is pytest's."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that succeeds, and return what it prints."""

    def command(*args: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main.main(["models", *map(str, args)])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return command


def failure(*args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main.main(["models", *map(str, args)])
    assert isinstance(caught.value.code, str)
    return caught.value.code


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for images of 32 pixels, without a classifier."""
    torch.manual_seed(0)
    model = timm.create_model(
        ARCHITECTURE, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0
    )
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of each of three classes, which differ in brightness and grain."""
    folder = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(20):
            random = np.random.default_rng(100 * label + i)
            pixels = random.integers(60 * label, 60 * label + 100, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def add(run: Run, models: Path, backbone: Path, *flags: object) -> str:
    return run(
        "add",
        ARCHITECTURE,
        "--kwargs",
        KWARGS,
        "--checkpoint",
        backbone,
        "--repository",
        models,
        "--no-profile",
        "--threads",
        "1",
        *flags,
    )


def test_a_model_is_added_with_all_that_its_weights_tell(run: Run, models: Path, backbone: Path) -> None:
    said = add(run, models, backbone, "--name", "tiny", "--license", "MIT", "--default-budget", "200ms")
    assert said == f"{models}/tiny: {ARCHITECTURE}, no classifier, features alone\n"
    spec = Repository(models).spec("tiny")
    assert spec.kwargs["img_size"] == 32
    assert spec.kwargs["num_classes"] == 0
    assert spec.data["input_size"] == [3, 32, 32]
    assert spec.default_budget == 0.2
    assert "default_budget: 200ms" in (models / "tiny/config.yaml").read_text()
    assert spec.checkpoint is not None
    assert spec.checkpoint.stat().st_mode & 0o777 == 0o644  # a server of another user reads it
    stored, given = load_file(spec.checkpoint), load_file(backbone)
    assert stored.keys() == given.keys()
    assert all(torch.equal(stored[name], given[name]) for name in given)


def test_another_image_size_is_the_weights_own_unless_it_is_set(run: Run, models: Path, backbone: Path) -> None:
    add(run, models, backbone, "--name", "own")
    flags = [
        "--kwargs",
        KWARGS.replace("{", "{img_size: 48, "),
        "--checkpoint",
        backbone,
        "--repository",
        models,
        "--no-profile",
    ]
    run("add", ARCHITECTURE, "--name", "larger", *flags)
    repository = Repository(models)
    assert repository.spec("own").kwargs["img_size"] == 32
    assert repository.spec("larger").data["input_size"] == [3, 48, 48]


def test_the_bundled_model_can_be_added_and_measured(run: Run, models: Path) -> None:
    assert (
        run("add", "bundled:fashion", "--repository", models, "--no-profile")
        == f"{models}/fashion: bundled:fashion, 10 classes\n"
    )
    assert load(Repository(models).spec("fashion"), torch.device("cpu")).info.relative_quality is not None
    table = run(
        "profile", "fashion", "--repository", models, "--profile-time", "200ms", "--max-batch", "2", "--threads", "1"
    )
    assert table.startswith("batch ")
    [profile] = (models / "fashion/profiles").glob("*.json")
    # And which dtype is faster, which the server is to choose by.
    assert len([*(models / "fashion/profiles").glob("fashion-*.gains")]) == 1
    assert json.loads(profile.read_text())["batch_sizes"] == [1, 2]
    described = json.loads(run("inspect", "fashion", "--repository", models, "--json"))
    assert described["classes"] == 10
    assert described["patches"] == [14, 14]
    assert described["profiles"] == [profile.name]
    assert [level["r"] for level in described["levels"]] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert described["levels"][0]["top1"] == 0.9049
    text = run("inspect", "fashion", "--repository", models)
    assert "0.9049" in text
    assert "46.0%" in text


def test_the_largest_batch_is_the_models_own_unless_a_flag_says_otherwise(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def measured(model: object, device: object, *, max_batch: int, **_: object) -> Profile:
        asked.append(max_batch)
        return Profile((1,), (0,), ((0.01,),), ((0.01,),))

    monkeypatch.setattr(offline, "measure", measured)
    run("add", "bundled:fashion", "--repository", models, "--no-profile")
    config = models / "fashion" / "config.yaml"
    config.write_text(config.read_text() + "batching: {max_batch: 3}\n")
    profile = ["profile", "fashion", "--repository", models, "--threads", "1"]
    run(*profile)
    run(*profile, "--max-batch", "2")
    assert asked == [3, 2]


def test_a_backbone_becomes_a_classifier(run: Run, models: Path, backbone: Path, photos: Path) -> None:
    add(run, models, backbone, "--name", "tiny")
    said = run("fit-head", "tiny", "--repository", models, "--data", photos, "--r", "0,2", "--no-profile")
    assert said.startswith(f"{models}/tiny: 3 classes, fitted to 45 images at r = 0, 2\n")
    assert "on the 15 held out:" in said
    spec = Repository(models).spec("tiny")
    model = load(spec, torch.device("cpu"))
    assert model.info.labels == CLASSES
    assert model.info.relative_quality is not None
    assert model.info.quality[0].top1 is not None
    assert model.info.quality[0].top1 > 0.9
    # Only the head is new.
    assert spec.checkpoint is not None
    stored, given = load_file(spec.checkpoint), load_file(backbone)
    assert stored.keys() - given.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(stored[name], given[name]) for name in given)
    report = json.loads((models / "tiny/quality.json").read_text())
    assert report["images"] == 15
    assert report["fitted_to"]["images"] == 45
    assert [path.name for path in models.iterdir()] == ["tiny"]


def test_a_model_with_versions_gets_a_new_one(run: Run, models: Path, backbone: Path, photos: Path) -> None:
    add(run, models, backbone, "--name", "tiny", "--version", "4")
    run("fit-head", "tiny", "--repository", models, "--data", photos, "--limit", "45", "--no-profile")
    assert Repository(models).versions("tiny") == [4, 5]
    listed = json.loads(run("list", "--repository", models, "--json"))
    assert [(model["name"], model["version"], model["versions"]) for model in listed] == [("tiny", 5, [4, 5])]
    assert run("remove", "tiny", "--repository", models, "--version", "5") == f"removed {models}/tiny/5\n"
    assert Repository(models).spec("tiny").version == 4
    run("remove", "tiny", "--repository", models)
    assert list(models.iterdir()) == []


def test_a_model_that_has_a_classifier_keeps_it_unless_told_otherwise(
    run: Run, models: Path, backbone: Path, photos: Path
) -> None:
    add(run, models, backbone, "--name", "tiny")
    (models / "tiny" / "LICENSE").write_text("mine")
    (models / "tiny" / "notes").mkdir()
    (models / "tiny" / "notes" / "one").touch()
    fit = ["fit-head", "tiny", "--repository", models, "--data", photos, "--no-profile", "--threads", "1"]
    run(*fit)  # a backbone has none
    report = models / "tiny" / "quality.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"images": 10_000, "data": "t10k"}))
    before = {path.name: path.read_bytes() for path in (models / "tiny").iterdir() if path.is_file()}
    said = failure(*fit)
    assert said == (
        f"tome-server: {models}/tiny has a classifier of 3 classes and the quality measured on 10,000 images of t10k: "
        "--overwrite replaces that, --save-as NAME makes another model"
    )
    assert {path.name: path.read_bytes() for path in (models / "tiny").iterdir() if path.is_file()} == before
    run(*fit, "--save-as", "other", "--seed", "1")
    assert "exists; take another name" in failure(*fit, "--save-as", "other")
    assert {path.name: path.read_bytes() for path in (models / "tiny").iterdir() if path.is_file()} == before
    assert json.loads((models / "other" / "quality.json").read_text())["images"] == 15
    run(*fit, "--overwrite")
    assert json.loads(report.read_text())["images"] == 15
    # What else lies in the folder isn't the command's to remove.
    for name in ("tiny", "other"):
        assert (models / name / "LICENSE").read_text() == "mine"
        assert (models / name / "notes" / "one").is_file()


def test_a_model_without_versions_becomes_version_1_when_another_is_added(
    run: Run, models: Path, backbone: Path
) -> None:
    add(run, models, backbone, "--name", "tiny")
    before = {path.name: path.read_bytes() for path in (models / "tiny").iterdir() if path.is_file()}
    flags = ["--kwargs", KWARGS, "--checkpoint", backbone, "--repository", models, "--no-profile", "--name", "tiny"]
    assert f"{models}/tiny has no versions yet: what lies in it becomes version 1, so take 2 or more" in failure(
        "add", ARCHITECTURE, *flags, "--version", "1"
    )
    add(run, models, backbone, "--name", "tiny", "--version", "2", "--description", "second")
    repository = Repository(models)
    assert repository.versions("tiny") == [1, 2]
    assert (repository.spec("tiny").version, repository.spec("tiny").description) == (2, "second")
    assert {path.name: path.read_bytes() for path in (models / "tiny" / "1").iterdir() if path.is_file()} == before
    assert [path.name for path in models.iterdir()] == ["tiny"]
    assert load(repository.spec("tiny", 1), torch.device("cpu")).info.name == "tiny"


def test_a_repository_that_is_read_only_is_said_before_anything_is_measured(
    run: Run, models: Path, backbone: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run, models, backbone, "--name", "tiny")
    # Tests may run as root, whom nothing but a read-only file system keeps from writing.
    monkeypatch.setattr(os, "access", lambda *_: False)
    stored = ["tiny", "--repository", models]
    said = "can't be written to: it is read-only, or another user's"
    assert failure("profile", *stored) == f"tome-server: {models}/tiny {said}"
    for command in ("evaluate", "tune"):
        assert failure(command, *stored, "--data", photos) == f"tome-server: {models}/tiny {said}"
    assert failure("fit-head", *stored, "--data", photos) == f"tome-server: {models} {said}"
    assert failure("add", "bundled:fashion", "--repository", models) == f"tome-server: {models} {said}"


def test_a_faulty_model_is_listed_apart(
    run: Run, models: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(run, models, backbone, "--name", "tiny")
    (models / "broken").mkdir()
    (models / "lost+found").mkdir()
    with pytest.raises(SystemExit) as caught:
        main.main(["models", "list", "--repository", str(models), "--json"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert [model["name"] for model in json.loads(out)] == ["tiny"]
    assert err == (
        f"broken can't be loaded: {models}/broken is no model: there is no config.yaml in it, and no folder of a "
        "version\n"
    )


def test_quality_is_measured_when_images_are_given(run: Run, models: Path, backbone: Path, photos: Path) -> None:
    add(run, models, backbone, "--name", "tiny")
    said = "tiny has no classifier to measure; tome-server models fit-head gives it one"
    assert said in failure("evaluate", "tiny", "--repository", models, "--data", photos)
    run("fit-head", "tiny", "--repository", models, "--data", photos, "--no-profile", "--threads", "1")
    weights, labels = models / "tiny/weights.safetensors", models / "tiny/labels.txt"
    add(run, models, weights, "--name", "again", "--labels", labels, "--data", photos, "--limit", "10")
    report = json.loads((models / "again/quality.json").read_text())
    assert report["images"] == 10
    again = ["evaluate", "again", "--repository", models, "--data", photos, "--threads", "1"]
    said = f"{models}/again/quality.json holds the quality measured on 10 images of photos0; --overwrite replaces it"
    assert said.replace("photos0", photos.name) in failure(*again)
    assert json.loads((models / "again/quality.json").read_text()) == report
    table = run(*again, "--overwrite")
    assert len(table.splitlines()) == 1 + len(report["levels"])
    assert json.loads((models / "again/quality.json").read_text())["images"] == 60
    listed = run("list", "--repository", models)
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["again", "tiny"]
    assert listed.count("yes") == 2


def test_a_report_that_replaces_one_of_more_images_says_so(
    run: Run, models: Path, backbone: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main.main(["models", "evaluate", *map(str, stored), "--overwrite", *flags])
        assert caught.value.code == 0
        return capsys.readouterr().err

    add(run, models, backbone, "--name", "tiny")
    stored = ["tiny", "--repository", models, "--data", photos, "--threads", "1"]
    run("fit-head", *stored, "--no-profile")
    assert "is now of" not in told()
    said = f"quality.json was of 60 images of {photos.name}, and is now of 20 of {photos.name}\n"
    assert said in told("--limit", "20")
    assert "is now of" not in told("--limit", "20")
    report = models / "tiny/quality.json"
    report.write_text("broken")
    assert "is now of" not in told("--limit", "10")
    assert json.loads(report.read_text())["images"] == 10


def test_a_tuned_model_keeps_its_schedules_when_it_is_measured_again(
    run: Run, models: Path, backbone: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_better_at_3(*args: Any, **options: Any) -> list[Tuned]:
        # Random weights and a single block to choose leave nothing to be better at.
        return [replace(each, difference=2.5 - each.r, standard_error=0.1) for each in tune(*args, **options)]

    monkeypatch.setattr(offline, "tune", found_better_at_3)
    add(run, models, backbone, "--name", "tiny")
    stored = ["tiny", "--repository", models, "--data", photos, "--threads", "1"]
    run("fit-head", *stored, "--no-profile")
    assert "--overwrite replaces it" in failure("tune", *stored, "--r", "2,3")
    stored.append("--overwrite")
    printed = run("tune", *stored, "--r", "2,3", "--limit", "60", "--held-out", "40", "--trials", "3")
    assert printed.count("  r in every block") == 2
    report = json.loads((models / "tiny/quality.json").read_text())
    assert (report["images"], report["tuned"]["images"], report["tuned"]["held_out"]) == (40, 20, 40)
    found = {level["r"]: level["schedule"] for level in report["tuned"]["levels"] if level["kept"]}
    assert list(found) == [3]
    assert printed.count("left out") == 1
    assert {level["r"]: level["schedule"] for level in report["levels"] if "schedule" in level} == found
    model = load(Repository(models).spec("tiny"), torch.device("cpu"))
    assert {r: list(own) for r, own in model.info.schedules.items()} == found
    assert model.info.relative_quality is not None
    run("evaluate", *stored)
    again = json.loads((models / "tiny/quality.json").read_text())
    assert again["images"] == 60
    assert {level["r"]: level["schedule"] for level in again["levels"] if "schedule" in level} == found
    assert failure("tune", *stored, "--target-macs", "0.01") == (
        f"tome-server: target MACs of 0.01: tiny is served with no less than {_least(model):.3f} of its work, "
        f"at r = {model.info.rs[-1]}"
    )
    assert "r must lie in 1..8 for tiny, and is 9" in failure("tune", *stored, "--r", "9")
    assert "1 images to measure on are too few" in failure("tune", *stored, "--limit", "1")


def test_a_model_is_tuned_in_the_dtype_asked_for_and_its_report_kept_apart(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def tuned(spec: ModelSpec, *_: object) -> tuple[dict[str, object], list[Tuned]]:
        asked.append(spec.dtype)
        return {"levels": [{"r": 0, "macs": len(asked), "top1": None, "agreement": 1.0}]}, []

    def written(name: str) -> int:
        return int(json.loads((models / "fashion" / name).read_text())["levels"][0]["macs"])

    monkeypatch.setattr(offline, "tune_model", tuned)
    stored = ["models", "tune", "fashion", "--repository", str(models), "--data", "images"]
    with pytest.raises(SystemExit):
        main.main(["models", "add", "bundled:fashion", "--repository", str(models), "--no-profile"])
    for flags in ([], ["--dtype", "bfloat16"], []):
        with pytest.raises(SystemExit) as caught:
            main.main([*stored, "--overwrite", *flags])
        assert caught.value.code == 0
    assert asked == ["auto", "bfloat16", "auto"]
    assert (written("quality.json"), written("quality-bfloat16.json")) == (3, 2)
    said = capsys.readouterr().err
    assert said.count("quality-bfloat16.json still has the schedules of before") == 2


def _least(model: LoadedModel) -> float:
    return model.count(model.info.rs[-1]).total / model.info.cost(0).total


def test_what_cannot_be_added_leaves_nothing(
    run: Run, models: Path, backbone: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", _without_hub(timm.create_model))
    flags = ["--kwargs", KWARGS, "--repository", models, "--no-profile"]
    cases: list[tuple[list[object], str]] = [
        (["vit_tiny_patch16_225", *flags], "timm has no model named 'vit_tiny_patch16_225'"),
        ([ARCHITECTURE, *flags, "--checkpoint", "/gone.pth"], "/gone.pth is no file"),
        (
            [ARCHITECTURE, *flags],
            "pretrained weights from the hub: no network. Where the hub can't be reached, give local",
        ),
        (
            [ARCHITECTURE, "--repository", models, "--checkpoint", backbone],
            "doesn't fit vit_tiny_patch16_224: missing: ",
        ),
        ([ARCHITECTURE, *flags, "--checkpoint", backbone, "--name", "../x"], "'../x' is no name of a model"),
        (
            [ARCHITECTURE, *flags, "--checkpoint", backbone, "--labels", "/gone"],
            "labels /gone can't be read: No such file",
        ),
        ([ARCHITECTURE, *flags, "--checkpoint", backbone, "--data", "/gone"], "/gone does not exist"),
        ([ARCHITECTURE, *flags, "--checkpoint", backbone, "--data", photos], "has no classifier to measure"),
        ([ARCHITECTURE, *flags, "--checkpoint", backbone, "--input", "{crop: 1}"], "crop is none of input_size"),
        (
            ["beit_base_patch16_224", "--repository", models],
            "beit_base_patch16_224 can't be merged",
        ),  # nor is it downloaded
        (["bundled:nothing", "--repository", models], "no bundled model is named 'nothing'"),
        (["bundled:fashion", "--repository", models, "--labels", "x"], "bundled:fashion is complete as it is"),
    ]
    for args, says in cases:
        assert says in failure("add", *args)
        assert not models.exists() or list(models.iterdir()) == []
    add(run, models, backbone)
    assert f"{models}/{ARCHITECTURE} exists; remove it first" in failure(
        "add", ARCHITECTURE, *flags, "--checkpoint", backbone
    )


def _without_hub(create: Callable[..., Any]) -> Callable[..., Any]:
    def model(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise ConnectionError("no network")
        return create(*args, **kwargs)

    return model


def test_a_head_that_cannot_be_fitted_changes_nothing(
    run: Run, models: Path, backbone: Path, photos: Path, tmp_path: Path
) -> None:
    add(run, models, backbone, "--name", "tiny")
    before = {path.name: path.read_bytes() for path in (models / "tiny").iterdir()}
    few = ["--repository", models, "--data", photos, "--limit", "6"]
    assert "each class needs at least 5 images to fit a head to" in failure("fit-head", "tiny", *few)
    flat = ["--repository", models, "--data", photos / CLASSES[0]]
    assert "the images have no labels" in failure("fit-head", "tiny", *flat)
    assert "no model named 'other'; there is tiny" in failure("fit-head", "other", *few)
    assert {path.name: path.read_bytes() for path in (models / "tiny").iterdir()} == before


@pytest.mark.parametrize("text", ["[1]", "a: [", "3", "{1: 2}"])
def test_arguments_that_are_no_mapping_are_wrong_usage(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["models", "add", "x", "--repository", "y", "--kwargs", text])
    assert caught.value.code == 2
    assert "is no mapping; write for example '{img_size: 224}'" in capsys.readouterr().err


def test_supported_says_of_each_entry_point_whether_it_can_be_merged_and_why_not(run: Run) -> None:
    lines = run("supported", "*dwee_*").splitlines() + run("supported", "*rope_mixed_224").splitlines()
    assert any("no: " in line and "DiffAttention" in line for line in lines)
    assert any(line.startswith("vit_small_patch16_rope_mixed_224") and line.endswith("supported") for line in lines)
    assert lines[-1] == f"3 of 3 entry points of timm {timm.__version__} supported"
    report = json.loads(run("supported", "*_pwee_*", "--json"))
    assert (report["supported"], report["of"]) == (1, 1)
    assert report["models"] == [{"name": "vit_pwee_patch16_reg1_gap_256", "supported": True, "reason": None}]
    assert "no entry point that fits" in failure("supported", "no_such_model")


def test_what_was_added_is_served(
    run: Run, models: Path, backbone: Path, own_server: Callable[..., ServerProcess], samples: dict[Path, str]
) -> None:
    add(run, models, backbone, "--name", "embedder", "--description", "random")
    run("add", "bundled:fashion", "--repository", models, "--no-profile")
    run("profile", "fashion", "--repository", models, "--profile-time", "200ms", "--threads", "1", "--max-batch", "2")
    flags = ["--threads", "1", "--max-batch", "2", "--profile-time", "300ms"]
    server = own_server("--repository", str(models), *flags)
    [profile] = (models / "fashion/profiles").glob("*.json")
    # It holds; on a busy machine it may be measured again, or another type be chosen than when it was measured.
    said = f"profile of fashion read from {profile}|{profile} was measured (while|in|for|with other dtype)"
    assert re.search(said, server.log.read_text())
    with Client(server.target, timeout=60) as client:
        assert [model.name for model in client.models()] == ["embedder", "fashion"]
        assert client.model("embedder").summary.description == "random"
        assert client.model("embedder").num_classes == 0
        fashion = client.model("fashion")
        levels = json.loads(quality_file(models / "fashion", fashion.dtype).read_text())["levels"]
        assert fashion.r_grid[0].top1 == levels[0]["top1"]
        file, label = next(iter(samples.items()))
        assert client.predict(file, model="fashion", budget=60, r=0).predictions[0].label == label
        embedded = client.predict(file, budget=60, features=True, normalize=True)  # by the first, which it is
        assert embedded.predictions == ()
        assert embedded.features is not None
        assert len(embedded.features) == 48
