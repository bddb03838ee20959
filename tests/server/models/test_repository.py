from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from tome_server.config.model_overrides import BatchingOverrides, LimitsOverrides, ModelOverrides
from tome_server.errors import ConfigError
from tome_server.models.bundled import BUNDLED
from tome_server.models.loading import load
from tome_server.models.repository import Contents, Repository, check_name, read_folder
from tome_server.models.spec import ModelSpec, bundled_spec

CPU = torch.device("cpu")
Fill = Callable[..., None]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "models").mkdir()
    return Repository(tmp_path / "models")


@pytest.fixture
def fill(tiny: nn.Module, spec: ModelSpec) -> Fill:
    """Make a model's folder of `tiny`."""

    def write(folder: Path, **config: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"architecture": spec.architecture, "kwargs": spec.kwargs} | config
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        save_file(tiny.state_dict(), folder / "weights.safetensors")

    return write


def refusal(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def test_a_folder_is_a_model_under_its_name(repository: Repository, fill: Fill) -> None:
    folder = repository.folder / "tiny"
    fill(folder, default_budget="250ms", description="small", license="MIT")
    (folder / "labels.txt").write_text("".join(f"class {i}\n" for i in range(7)))
    (folder / "README.md").write_text("passed over")
    [spec] = repository.scan().specs
    assert (spec.name, spec.version, spec.default_budget, spec.description) == ("tiny", None, 0.25, "small")
    assert spec.quality is None
    hosted = load(spec, CPU)
    assert hosted.info.name == "tiny"
    assert hosted.info.labels[6] == "class 6"


def test_models_come_in_order_of_name_and_what_is_none_is_passed_over(repository: Repository, fill: Fill) -> None:
    for name in ("b", "a.1", "C"):
        fill(repository.folder / name)
    (repository.folder / ".git").mkdir()
    (repository.folder / "README.md").touch()
    assert repository.names() == ["C", "a.1", "b"]
    assert [spec.name for spec in repository.scan().specs] == ["C", "a.1", "b"]


def test_an_empty_repository_has_no_models(repository: Repository) -> None:
    assert repository.scan() == Contents([], {})


def test_a_repository_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "gone"):
        assert refusal(Repository, path) == f"repository {path} is no folder"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/etc", "a\\b", "a b", ".hidden", "-flag", "é", "a\n", "a\0", "x" * 101]
)
def test_a_name_cannot_leave_the_folder(repository: Repository, fill: Fill, name: str) -> None:
    fill(repository.folder / "inside")
    for call in (check_name, repository.spec, repository.path, repository.versions, repository.served):
        assert refusal(call, name).startswith(f"{name!r} is no name of a model")
    assert "is no name of a model" in refusal(repository.remove, name)
    assert (repository.folder / "inside").is_dir()


def test_a_model_in_a_folder_that_cannot_be_its_name_is_a_fault(repository: Repository, fill: Fill) -> None:
    fill(repository.folder / "my model")
    fill(repository.folder / "né\nw")
    contents = repository.scan()
    assert contents.specs == []
    assert contents.faults.keys() == {"my model", r"'né\nw'"}
    assert str(contents.faults["my model"]).startswith("'my model' is no name of a model")


def test_what_is_no_models_folder_is_passed_over_and_said(
    repository: Repository, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    fill(repository.folder / "tiny")
    for name in ("lost+found", "__pycache__", ".git", ".tiny-12ab34cd", "with space"):
        (repository.folder / name).mkdir()
    (repository.folder / "notes.txt").touch()
    (repository.folder / ".gitignore").touch()
    (repository.folder / "loop").symlink_to(repository.folder / "loop")
    caplog.set_level("DEBUG", "tome_server")
    contents = repository.scan()
    assert [spec.name for spec in contents.specs] == repository.names() == ["tiny"]
    assert contents.faults == {}
    said = {record.getMessage(): record.levelname for record in caplog.records}
    passed = "{}/{} is passed over: it is no model's folder"
    assert said == {
        **{passed.format(repository.folder, name): "DEBUG" for name in (".git", ".tiny-12ab34cd", ".gitignore")},
        **{
            passed.format(repository.folder, name): "INFO"
            for name in ("lost+found", "__pycache__", "with space", "notes.txt", "loop")
        },
    }


def test_an_unknown_model_is_refused_with_those_there_are(repository: Repository, fill: Fill) -> None:
    fill(repository.folder / "tiny")
    said = f"repository {repository.folder} has no model named 'tony'; there is tiny"
    assert refusal(repository.spec, "tony") == said


def test_a_model_has_limits_and_defaults_of_its_own(repository: Repository, fill: Fill) -> None:
    fill(
        repository.folder / "tiny",
        policy="fixed:4",
        batching={"max_batch": 2, "max_delay": "5ms"},
        limits={"max_image_bytes": "1MiB", "max_image_pixels": 100},
        default_max_r=4,
        default_min_quality=0.98,
    )
    spec = repository.spec("tiny")
    assert spec.overrides == ModelOverrides(
        policy="fixed:4",
        batching=BatchingOverrides(max_batch=2, max_delay=0.005),
        limits=LimitsOverrides(max_image_bytes=2**20, max_image_pixels=100),
        default_max_r=4,
        default_min_quality=0.98,
    )
    assert spec.file == repository.folder / "tiny/config.yaml"


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("policy", "best", "policy: 'best' is no policy; there are price, fixed:R, "),
        ("batching", {"max_batch": 0}, "batching.max_batch: "),
        ("batching", {"max_bach": 1}, "batching.max_bach is not a setting; did you mean 'max_batch'?"),
        ("batching", {"max_delay": "soon"}, "batching.max_delay: 'soon' is not a duration"),
        ("limits", {"max_image_bytes": "1MB"}, "limits.max_image_bytes: '1MB' is no size"),
        ("limits", {"max_client_requests": 1}, "limits.max_client_requests is not a setting"),
        ("default_max_r", -1, "default_max_r: "),
        ("default_min_quality", 1.5, "default_min_quality: "),
        ("default_r", 4, "default_r is not a setting"),
    ],
)
def test_a_limit_that_is_none_is_refused_with_file_line_and_key(
    repository: Repository, fill: Fill, setting: str, value: object, says: str
) -> None:
    fill(repository.folder / "tiny", **{setting: value})
    where, said = refusal(repository.spec, "tiny").split(": ", 1)
    assert where.startswith(f"{repository.folder}/tiny/config.yaml:")
    assert said.startswith(says)


def test_all_that_is_wrong_is_said_with_file_and_field(repository: Repository, fill: Fill) -> None:
    root = repository.folder
    fill(root / "a", architectur="x")
    fill(root / "b", default_budget="soon")
    (root / "c").mkdir()
    fill(root / "d")
    (root / "d/weights.safetensors").unlink()
    fill(root / "e")
    fill(root / "f")
    (root / "f/weights.pth").touch()
    (root / "g").mkdir()
    (root / "g/config.yaml").write_text("description: empty\n")
    contents = repository.scan()
    assert [spec.name for spec in contents.specs] == ["e"]
    assert {name: str(fault) for name, fault in contents.faults.items()} == {
        "a": f"{root}/a/config.yaml:9: architectur is not a setting; did you mean 'architecture'?",
        "b": f"{root}/b/config.yaml:9: default_budget: 'soon' is not a duration; write for example 50ms, 1.5s or 2m",
        "c": f"{root}/c is no model: there is no config.yaml in it, and no folder of a version",
        "d": f"{root}/d: no weights.safetensors is there",
        "f": f"{root}/f: only one of weights.safetensors and weights.pth may be there",
        "g": f"{root}/g/config.yaml:1: architecture: is missing",
    }


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_other_weights_than_the_folders_cannot_be_named(
    repository: Repository, fill: Fill, spec: ModelSpec, key: str
) -> None:
    fill(repository.folder / "tiny", kwargs={**spec.kwargs, key: "/etc/passwd"})
    assert f"kwargs: {key} can't be set: the weights are those beside this file" in refusal(repository.spec, "tiny")


def test_the_highest_version_is_served_unless_the_config_says_otherwise(repository: Repository, fill: Fill) -> None:
    model = repository.folder / "tiny"
    for version in ("2", "10", "1"):
        fill(model / version, description=f"version {version}")
    assert repository.versions("tiny") == [1, 2, 10]
    [spec] = repository.scan().specs
    assert (spec.version, spec.description) == (10, "version 10")
    assert repository.spec("tiny", 2).description == "version 2"
    (model / "config.yaml").write_text("version: 2\n")
    assert repository.spec("tiny").version == 2
    assert repository.spec("tiny", 10).version == 10


def test_a_wrong_choice_of_version_is_refused(repository: Repository, fill: Fill) -> None:
    model = repository.folder / "tiny"
    fill(model / "1")
    assert refusal(repository.spec, "tiny", 3) == f"{model} has no version 3; only 1"
    (model / "config.yaml").write_text("version: 3\n")
    assert refusal(repository.spec, "tiny") == f"{model}/config.yaml: version: there is no 3, only 1"
    (model / "config.yaml").write_text("architecture: vit\n")
    assert "config.yaml:1: architecture is not a setting; valid keys are version" in refusal(repository.spec, "tiny")
    (model / "01").mkdir()
    assert "whole number from 1, without leading zeros" in refusal(repository.versions, "tiny")


def test_a_model_without_versions_has_none_to_ask_for(repository: Repository, fill: Fill) -> None:
    fill(repository.folder / "tiny")
    assert repository.versions("tiny") == []
    assert refusal(repository.spec, "tiny", 1).endswith("has no version 1; it has no versions")


def test_what_is_written_is_whole_or_not_there(repository: Repository, fill: Fill) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise ConfigError("half way")

    assert refusal(lambda: repository.write("tiny", broken, replace=False)) == "half way"
    assert list(repository.folder.iterdir()) == []
    assert repository.write("tiny", fill, replace=False) == repository.folder / "tiny"
    assert "exists; remove it first" in refusal(lambda: repository.write("tiny", fill, replace=False))
    assert refusal(lambda: repository.write("tiny", broken, replace=True)) == "half way"
    assert repository.spec("tiny").description == ""
    repository.write("tiny", lambda folder: fill(folder, description="new"), replace=True)
    assert repository.spec("tiny").description == "new"
    assert [path.name for path in repository.folder.iterdir()] == ["tiny"]


def test_a_model_without_versions_becomes_the_first(repository: Repository, fill: Fill) -> None:
    repository.write("plain", lambda folder: fill(folder, description="first"), replace=False)
    said = refusal(lambda: repository.write("plain", fill, version=1, replace=False))
    assert said.endswith("/plain has no versions yet: what lies in it becomes version 1, so take 2 or more")
    repository.write("plain", lambda folder: fill(folder, description="fourth"), version=4, replace=False)
    assert repository.versions("plain") == [1, 4]
    assert (repository.spec("plain", 1).description, repository.spec("plain").description) == ("first", "fourth")
    assert [path.name for path in repository.folder.iterdir()] == ["plain"]


def test_a_version_that_cannot_be_put_there_leaves_the_model_as_it_was(
    repository: Repository, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = repository.write("plain", fill, replace=False)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == place and self.parent == repository.folder:
            raise OSError("the disk has gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="the disk has gone"):
        repository.write("plain", fill, version=2, replace=False)
    assert repository.spec("plain").version is None
    assert [path.name for path in repository.folder.iterdir()] == ["plain"]


def test_a_model_with_versions_is_not_written_without_one(repository: Repository, fill: Fill) -> None:
    for version in (1, 2):
        repository.write("many", fill, version=version, replace=False)
    assert "has versions; name one" in refusal(lambda: repository.write("many", fill, replace=True))
    assert repository.versions("many") == [1, 2]


def test_a_version_or_a_whole_model_is_removed(repository: Repository, fill: Fill) -> None:
    for version in (1, 2):
        repository.write("many", fill, version=version, replace=False)
    assert repository.remove("many", 2) == repository.folder / "many/2"
    assert repository.versions("many") == [1]
    repository.remove("many")
    assert list(repository.folder.iterdir()) == []


def test_the_bundled_models_folder_is_in_the_format() -> None:
    assert read_folder(BUNDLED / "fashion", "fashion") == bundled_spec("fashion")
