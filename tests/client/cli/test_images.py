"""Which images `predict` and `embed` send."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import grpc
import pytest

from tests.client.peer import Failure, Peer
from tome_client.cli import main


def sent(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """Returns the names of the images that were answered, sorted."""
    main(["predict", "--json", *argv])
    return sorted(json.loads(line)["image"] for line in capsys.readouterr().out.splitlines())


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_images_are_sent_in_the_order_of_the_arguments_and_of_the_paths_in_each(
    photos: Path, image: str, peer: Peer
) -> None:
    assert main(["predict", image, str(photos), str(photos / "0.jpg")]) == 0
    lengths = [len(call.request.image) for call in peer.calls]
    assert lengths[1:] == [10, 12, 14, 16, 11, 13, 15, 17, 10]


def test_a_pattern_is_the_files_that_it_matches(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a shell that passes patterns on, or in quotes where there are too many files for a command line."""
    assert sent(capsys, str(photos / "*.jpg")) == [str(photos / f"{number}.jpg") for number in (0, 2, 4, 6)]
    assert len(sent(capsys, str(photos / "**/*.jpg"))) == 8
    assert sent(capsys, str(photos / "[02].jp?")) == [str(photos / "0.jpg"), str(photos / "2.jpg")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = photos / "shirt[0].jpg"
    odd.write_bytes(b"image")
    assert sent(capsys, str(odd)) == [str(odd)]


def test_a_pattern_without_a_match_is_one_line_and_the_rest_is_answered(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "nowhere/*.png", image]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == "tome-client: nowhere/*.png: no file matches this pattern\n"


@pytest.mark.parametrize("url", ["https://host/shirt.png", "file:///shirt.png", "s3://bucket/shirt.png"])
def test_a_url_is_said_not_to_be_fetched_and_the_rest_is_answered(
    url: str, image: str, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", url, image]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == (f"tome-client: {url}: URLs are not fetched; download the image and name its file, or pipe it to -\n")
    assert len(peer.calls) == 1


def test_a_dash_is_the_image_on_standard_input(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is one image, so it has the model's default budget."""
    pipe(monkeypatch, b"an image")
    assert sent(capsys, "-") == ["-"]
    assert peer.calls[0].request.image == b"an image"
    assert not peer.calls[0].request.no_deadline


@pytest.mark.parametrize("argv", [["-"], ["--from-file", "-"]])
def test_standard_input_that_is_a_terminal_is_not_waited_for(
    argv: list[str], peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["predict", *argv]) == 1
    assert capsys.readouterr().err == "tome-client: - stands for standard input, and nothing is piped into it\n"
    assert not peer.calls


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_list_of_names_comes_from_a_file_or_standard_input(
    ends: str, photos: Path, image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names may be folders and patterns here too, and empty lines and a byte order mark are no names."""
    text = f"\ufeff{photos / '0.jpg'}{ends}{ends}{photos / 'below'}{ends}".encode()
    named = sorted([str(photos / "0.jpg"), *(str(photos / f"below/{number}.jpg") for number in (1, 3, 5, 7))])
    pipe(monkeypatch, text)
    assert sent(capsys, "--from-file", "-") == named
    (photos / "list").write_bytes(text)
    assert sent(capsys, "--from-file", str(photos / "list"), image) == sorted([image, *named])


def test_one_name_in_a_list_is_bulk_work(image: str, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that happens to find one file doesn't get another deadline than for two."""
    pipe(monkeypatch, f"{image}\n".encode())
    assert main(["predict", "--from-file", "-"]) == 0
    assert peer.calls[0].request.no_deadline


def test_an_empty_list_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, b"\n")
    assert main(["predict", "--from-file", "-"]) == 1
    assert capsys.readouterr() == ("", "tome-client: -: there is no name of an image in this list\n")


def test_a_list_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--from-file", "nowhere"]) == 1
    assert capsys.readouterr().err == "tome-client: nowhere: No such file or directory\n"


def test_a_list_that_is_no_list_fails_line_by_line(
    image: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its bytes are: a name may be too long for a file, or have bytes that no name has."""
    (photos / "list").write_bytes(b"\x00\xff\n" + b"x" * 9000 + b"\n" + image.encode())
    assert main(["predict", "--from-file", str(photos / "list")]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert len(err.splitlines()) == 3
    assert err.endswith("2 of 3 images failed: 2 INVALID_ARGUMENT\n")


def test_standard_input_can_not_be_both_image_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["predict", "-", "--from-file", "-"])
    assert exited.value.code == 2
    assert "standard input is either an image or the list of --from-file, not both" in capsys.readouterr().err


def test_a_server_that_is_lost_under_way_is_one_line(
    photos: Path, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.failures.extend([None, None, Failure(grpc.StatusCode.UNAVAILABLE, "gone")])
    assert main(["predict", str(photos)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.startswith("tome-client: 6 of 8 images have no answer: UNAVAILABLE: ")
    assert len(err.splitlines()) == 1
