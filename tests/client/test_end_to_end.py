"""The client against the real server, which serves bundled:fashion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from tests.server_process import ServerProcess
from tome_client import AsyncClient, Client, PredictOptions, StreamItem, TomeError
from tome_client.cli import main


@pytest.fixture
def image_file(samples: dict[Path, str]) -> Path:
    return min(samples)


@pytest.fixture
def client(server: ServerProcess) -> Client:
    with Client(server.target, timeout=60) as connected:
        yield connected


def test_most_samples_are_recognised(client: Client, samples: dict[Path, str]) -> None:
    right = sum(client.predict(file, r=0).predictions[0].label == label for file, label in samples.items())
    assert right >= 0.8 * len(samples)


def test_the_answer_accounts_for_itself(client: Client, image_file: Path) -> None:
    result = client.predict(image_file, r=8, top_k=3, features=True, token_map=True, patch_features=True, float16=True)
    model = client.model(result.model)
    assert [one.score for one in result.predictions] == sorted((one.score for one in result.predictions), reverse=True)
    assert len(result.predictions) == 3
    assert result.merging.r == 8
    assert result.merging.tokens_out < result.merging.tokens_in
    assert 0 < result.merging.saved_share < 1
    assert 0 < result.timing.compute <= result.timing.total
    assert result.timing.slack > 0
    assert result.timing.batch_size >= 1
    assert len(result.features) == model.feature_dim
    patches = result.patch_features
    assert (patches.grid_height, patches.grid_width, patches.dim) == (14, 14, model.feature_dim)
    assert len(patches.values) == 14 * 14 * model.feature_dim
    grid = result.token_map
    assert len(grid.token) == grid.grid_height * grid.grid_width
    # The class token's output token has no patch.
    assert len(set(grid.token)) == result.merging.tokens_out - 1


def test_work_without_a_deadline_is_answered_and_has_no_slack(client: Client, image_file: Path) -> None:
    image = image_file.read_bytes()
    assert client.predict(image, budget=30).timing.slack is not None
    items = (StreamItem(str(number), image, PredictOptions(features=True)) for number in range(200))
    answers = list(client.predict_stream(items))
    assert [one.error for one in answers] == [None] * 200
    assert {one.result.timing.slack for one in answers} == {None}


def test_the_command_needs_no_budget_for_a_folder(
    server: ServerProcess, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", server.target, "predict", str(image_file.parent), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == len(list(image_file.parent.glob("*.png")))
    assert {one["result"]["timing"]["slack"] for one in answers} == {None}
    argv = ["--target", server.target, "load", "--images", str(image_file.parent), "--rate", "20", "--json"]
    assert main([*argv, "--budget", "none", "--duration", "1s", "--warmup", "0"]) == 0
    total = json.loads(capsys.readouterr().out)["summary"]["total"]
    assert total["answered"] == total["sent"]


def test_the_same_image_gets_the_same_answer_however_it_is_given(client: Client, image_file: Path) -> None:
    with Image.open(image_file) as image:
        image.load()
    settings = client.model().input
    pixels = np.asarray(image.convert("RGB"))
    mean, std = (np.array(one, np.float32) for one in (settings.mean, settings.std))
    # The samples have the model's size, so that normalising them is all there is to do.
    assert pixels.shape[:2] == (settings.height, settings.width)
    normalised = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)
    scores = [
        [one.score for one in client.predict(given, r=0).predictions]
        for given in (image_file, str(image_file), image_file.read_bytes(), image, pixels, normalised)
    ]
    assert np.allclose(scores, scores[0], atol=1e-5)


def test_merging_stays_inside_the_bounds_asked_for(client: Client, image_file: Path) -> None:
    assert client.predict(image_file, min_r=4, max_r=4).merging.r == 4


def test_a_field_that_is_wrong_is_named(client: Client, image_file: Path) -> None:
    with pytest.raises(TomeError) as caught:
        client.predict(image_file, r=-1)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [one.field for one in caught.value.field_violations] == ["r"]
    with pytest.raises(TomeError) as caught:
        client.predict(b"no image")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_model_is_not_found(client: Client, image_file: Path) -> None:
    for call in (lambda: client.predict(image_file, model="nothing"), lambda: client.model("nothing")):
        with pytest.raises(TomeError) as caught:
            call()
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_a_budget_that_cannot_be_kept_is_refused_with_the_reason(client: Client, image_file: Path) -> None:
    with pytest.raises(TomeError) as caught:
        client.predict(image_file, budget=1e-5)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.reason in ("INFEASIBLE", "EXPIRED")


def test_a_stream_answers_every_item(client: Client, image_file: Path, samples: dict[Path, str]) -> None:
    items = [StreamItem(file.name, file) for file in samples]
    items.append(StreamItem("bad", b"no image"))
    items.append(StreamItem("unknown", image_file, PredictOptions(model="nothing")))
    results = {one.id: one for one in client.predict_stream(items)}
    names = [file.name for file in samples]
    assert results.keys() == {*names, "bad", "unknown"}
    assert results["bad"].error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert results["unknown"].error.code is grpc.StatusCode.NOT_FOUND
    assert all(results[name].result for name in names)


async def test_the_asynchronous_client_does_the_same(
    server: ServerProcess, image_file: Path, samples: dict[Path, str]
) -> None:
    async with AsyncClient(server.target, timeout=60) as client:
        assert (await client.models())[0].ready
        result = await client.predict(image_file, r=0)
        assert result.model == (await client.model()).summary.name
        items = [StreamItem(file.name, file) for file in samples]
        assert {one.id async for one in client.predict_stream(items)} == {file.name for file in samples}


def test_the_model_says_what_each_r_costs(client: Client) -> None:
    (summary,) = client.models()
    model = client.model(summary.name)
    assert model.summary == summary
    assert len(model.labels) == model.num_classes == 10
    macs = [level.macs for level in model.r_grid]
    assert model.r_grid[0].r == 0
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == len(macs)


def test_the_command_line_predicts(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], samples: dict[Path, str]
) -> None:
    images = [str(file) for file in samples]
    assert main(["--target", server.target, "predict", *images, "--json"]) == 0
    assert {json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()} == set(images)


def test_the_command_line_lists_models(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", server.target, "models"]) == 0
    name = capsys.readouterr().out.splitlines()[1].split()[0]
    assert main(["--target", server.target, "models", name]) == 0
    assert "agreement" in capsys.readouterr().out


def test_the_command_line_draws(server: ServerProcess, tmp_path: Path, image_file: Path) -> None:
    picture = tmp_path / "out.png"
    argv = ["--target", server.target, "visualize", str(image_file), "--r", "8", "-o", str(picture)]
    assert main(argv) == 0
    with Image.open(picture) as drawn:
        assert drawn.size == (2 * 448 + 8, 448)
        assert len(drawn.getcolors(maxcolors=1 << 20)) > 10


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_the_command_line_embeds_a_folder(
    suffix: str, server: ServerProcess, client: Client, samples: dict[Path, str], tmp_path: Path
) -> None:
    """Row by row what a single request gives, in the order of the paths."""
    output = tmp_path / f"samples{suffix}"
    folder = str(min(samples).parent)
    argv = ["--target", server.target, "embed", folder, "-o", str(output), "--r", "4", "--normalize"]
    assert main(argv) == 0
    if suffix == ".npy":
        rows = np.load(output)
        paths = (tmp_path / "samples.paths.txt").read_text().splitlines()
    else:
        written = [json.loads(line) for line in output.read_text().splitlines()]
        rows = np.array([one["embedding"] for one in written])
        paths = [one["path"] for one in written]
        assert {one["r"] for one in written} == {4}
    assert paths == sorted(map(str, samples))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4)
    alone = client.predict(paths[-1], r=4, features=True, normalize=True).features
    assert np.allclose(rows[-1], alone, atol=1e-3)


def test_the_command_line_waits_for_a_server(server: ServerProcess) -> None:
    assert main(["--target", server.target, "wait", "--timeout", "none", "--model", "fashion"]) == 0


def test_the_command_line_predicts_from_standard_input_and_a_list(server: ServerProcess, image_file: Path) -> None:
    command = [sys.executable, "-m", "tome_client", "--target", server.target, "predict", "--json"]
    one = subprocess.run([*command, "-"], input=image_file.read_bytes(), capture_output=True, check=True)
    listed = f"{image_file}\n{image_file.parent}/*.png\n".encode()
    several = subprocess.run([*command, "--from-file", "-"], input=listed, capture_output=True, check=True)
    assert json.loads(one.stdout)["result"]["timing"]["slack"] is not None
    answers = [json.loads(line) for line in several.stdout.splitlines()]
    assert len(answers) == 1 + len(list(image_file.parent.glob("*.png")))
    assert {one["result"]["timing"]["slack"] for one in answers} == {None}
