from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.client.peer import Failure, Peer, answer
from tome_api.v1 import inference_pb2
from tome_client.cli import bulk, main
from tome_client.cli.images import NamedImages
from tome_client.client import Client


def embed(output: Path, *argv: str) -> int:
    return main(["embed", *argv, "--output", str(output)])


def in_order(photos: Path) -> list[str]:
    return [str(photos / f"{name}.jpg") for name in ("0", "2", "4", "6", "below/1", "below/3", "below/5", "below/7")]


def test_an_npy_file_has_a_row_for_each_image_and_the_paths_beside_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "photos.npy"
    assert embed(output, str(photos), "--r", "8") == 0
    rows = np.load(output, mmap_mode="r", allow_pickle=False)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[10 + number, 8, 0.5] for number in (0, 2, 4, 6, 1, 3, 5, 7)]
    paths = tmp_path / "photos.paths.txt"
    assert paths.read_text().splitlines() == in_order(photos)
    assert capsys.readouterr().out == f"{output}: 8 × 3 float32; the path of each row: {paths}\n"
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_json_lines_have_a_line_for_each_image(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "photos.jsonl"
    assert embed(output, str(photos)) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["path"] for row in rows] == in_order(photos)
    assert rows[0] == {"path": str(photos / "0.jpg"), "model": "first", "r": 0, "embedding": [10, 0, 0.5]}


def test_a_parquet_file_is_a_table(photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the parquet extra")
    for flags, size in (([], 4), (["--float16"], 2)):
        output = tmp_path / "photos.parquet"
        assert embed(output, str(photos), *flags) == 0
        table = parquet.read_table(output)
        assert table.column_names == ["path", "model", "r", "embedding"]
        assert table["path"].to_pylist() == in_order(photos)
        assert [list(map(float, row)) for row in table["embedding"].to_pylist()][1] == [12, 0, 0.5]
        assert table.schema.field("embedding").type.value_type.bit_width == 8 * size


def test_a_parquet_file_of_several_groups_has_every_row(photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the parquet extra")
    output = tmp_path / "photos.parquet"
    assert embed(output, *[str(photos)] * 300) == 0
    assert parquet.read_table(output)["path"].to_pylist() == in_order(photos) * 300


def test_parquet_without_pyarrow_says_what_to_install_before_anything_is_sent(
    photos: Path, tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert embed(tmp_path / "photos.parquet", str(photos)) == 1
    assert capsys.readouterr().err == (
        "tome-client: writing .parquet needs pyarrow: pip install 'tome-serving[parquet]'; "
        ".npy and .jsonl need nothing more\n"
    )
    assert not peer.calls


def test_requests_ask_for_features_without_a_deadline(image: str, peer: Peer, tmp_path: Path) -> None:
    assert embed(tmp_path / "a.npy", image) == 0
    request = peer.calls[0].request
    assert request.no_deadline
    assert (request.return_features, request.normalize_features, request.float16_features) == (True, False, False)
    argv = ["--normalize", "--float16", "--min-quality", "0.99", "--max-r", "9", "--model", "m", "--budget", "200ms"]
    assert embed(tmp_path / "b.npy", image, *argv) == 0
    request = peer.calls[1].request
    assert (request.normalize_features, request.float16_features) == (True, True)
    assert (request.min_quality, request.max_r, request.model) == (0.99, 9, "m")
    assert (request.no_deadline, request.latency_budget.ToMilliseconds()) == (False, 200)
    assert np.load(tmp_path / "b.npy").dtype == np.float16


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_an_image_that_fails_has_no_row_and_rows_and_paths_still_agree(
    suffix: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(photos / "0.jpg"), "nowhere.png", str(photos / "2.jpg")]
    output = tmp_path / f"a{suffix}"
    assert embed(output, *named) == 1
    assert capsys.readouterr().err.splitlines()[1] == "tome-client: 1 of 3 images failed: 1 INVALID_ARGUMENT"
    if suffix == ".npy":
        assert np.load(output)[:, 0].tolist() == [10, 12]
        assert (tmp_path / "a.paths.txt").read_text().splitlines() == [named[0], named[2]]
    else:
        assert [json.loads(line)["path"] for line in output.read_text().splitlines()] == [named[0], named[2]]


def test_a_server_that_is_lost_leaves_the_rows_that_it_answered(
    photos: Path, peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.failures.extend([None, None, Failure(grpc.StatusCode.INTERNAL, "broken")])
    assert embed(tmp_path / "a.npy", str(photos)) == 1
    out, err = capsys.readouterr()
    assert err == "tome-client: 6 of 8 images have no answer: INTERNAL: broken\n"
    assert out.startswith(f"{tmp_path / 'a.npy'}: 2 × 3 float32")
    assert np.load(tmp_path / "a.npy")[:, 0].tolist() == [10, 12]


def test_a_run_without_an_answer_leaves_an_older_file_as_it_is(
    photos: Path, peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.npy"
    output.write_bytes(b"older")
    assert main(["embed", str(photos), "-o", str(output), "--target", "localhost:1"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert output.read_bytes() == b"older"
    assert sorted(tmp_path.glob("a.*")) == [output]


def test_features_of_another_length_end_the_run_without_a_file(
    photos: Path, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replaced(request: inference_pb2.PredictRequest) -> inference_pb2.PredictResponse:
        response = answer(request)
        del response.features[len(request.image) % 2 + 1 :]
        return response

    monkeypatch.setattr(f"{Peer.__module__}.answer", replaced)
    assert embed(tmp_path / "a.npy", str(photos)) == 1
    assert capsys.readouterr().err.endswith(
        "1.jpg: got 2 features, and 1 for the images before; was the model replaced?\n"
    )
    assert list(tmp_path.glob("a.*")) == []


def test_a_name_with_a_line_break_is_written_only_where_it_can_be_read_back(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = photos / "a\nb.jpg"
    odd.write_bytes(b"image")
    assert embed(tmp_path / "a.npy", str(odd)) == 1
    assert "a path with a line break can't be listed in" in capsys.readouterr().err
    assert embed(tmp_path / "a.jsonl", str(odd)) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["path"] == str(odd)


@pytest.mark.parametrize("name", ["a.npz", "a", "a.parket"])
def test_a_suffix_that_names_no_format_is_answered_with_those_there_are(
    name: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        embed(Path(name), image)
    assert exited.value.code == 2
    assert "its name must end in one of .npy, .jsonl, .parquet" in capsys.readouterr().err


def test_an_output_that_can_not_be_written_is_said_before_anything_is_sent(
    image: str, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(Path("nowhere/a.npy"), image) == 1
    assert "nowhere/a.npy.part: No such file or directory" in capsys.readouterr().err
    assert not peer.calls


def test_ctrl_c_keeps_the_rows_that_were_answered(image: str, peer: Peer, tmp_path: Path) -> None:
    """Also while images that failed wait for the one before them, as many as may."""
    peer.free = 1
    peer.hold.clear()
    output = tmp_path / "a.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "tome_client", "embed", image, image, *["nowhere.png"] * 1000, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(peer.calls) < 2:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (out, err.splitlines()) == (
        f"{output}: 1 × 3 float32\n",
        ["tome-client: interrupted; 1001 of 1002 images have no answer"],
    )
    assert running.returncode == 130
    assert len(output.read_text().splitlines()) == 1


def test_what_waits_for_an_earlier_image_is_bounded(image: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer holds the first image until the images that overtake it are as many as may."""
    monkeypatch.setattr(bulk, "_AHEAD", 4)
    peer.hold.clear()
    done = 0
    most = 0

    class Names(list[str]):
        def __getitem__(self, number):
            nonlocal most
            most = max(most, number - done)
            if number == 3:
                peer.hold.set()
            return super().__getitem__(number)

    images = NamedImages(Names([image] + ["nowhere.png"] * 300), [], alone=False, stdin=b"")
    with Client(peer.target) as client:
        for one in bulk._streamed(client, images, {"features": True}, in_order=True):
            assert (one.result is not None) == (done == 0)
            done += 1
    assert done == 301
    assert most <= 4
