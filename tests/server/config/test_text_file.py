import contextlib
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tome_client.load.arrivals import read_trace as clients_trace
from tome_server.api.tokens import Tokens
from tome_server.config import text_file
from tome_server.config.text_file import read_text
from tome_server.errors import ConfigError
from tome_server.models.loading import load
from tome_server.models.preparing import CPU
from tome_server.models.spec import bundled_spec
from tome_server.simulation.capacity import load_replica
from tome_server.simulation.workload import read_trace

PROFILE = Path(__file__).parents[3] / "benchmarks/profiles/fashion.json"
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("data", [b"a\nb\n", MARK + b"a\nb\n", b"a\r\nb\r\n", MARK + b"a\r\nb\r\n"])
def test_a_mark_and_the_lines_ends_make_no_difference(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert read_text(tmp_path / "file") == "a\nb\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("größer".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("größer".encode("utf-16-be").replace(b"\0g", b"\xfe\xff\0g", 1), "the file is UTF-16; save it as UTF-8"),
        ("größer".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        ("a\nb\ngrößer".encode("latin-1"), "line 3 is not UTF-8 (byte 0xf6); save it as UTF-8"),
        (MARK + "a\ngrößer".encode("cp1252"), "line 2 is not UTF-8 (byte 0xf6); save it as UTF-8"),
    ],
)
def test_another_encoding_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_text(tmp_path / "file")
    assert str(caught.value) == says


def test_tokens_may_have_a_mark_and_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(MARK + b"first-token-0123456789\n")
    assert Tokens(file).holder("Bearer first-token-0123456789")
    file.write_text("first-token-0123456789\n", encoding="utf-16")
    with pytest.raises(ConfigError, match="the file is UTF-16; save it as UTF-8"):
        Tokens(file)


def test_traces_may_have_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_bytes(MARK + b"0.5 50ms\n")
    assert [arrival.at for arrival in read_trace(file)] == [0.5]
    assert clients_trace(file).arrivals[0].at == 0.5


def test_reports_and_profiles_may_have_a_mark(tmp_path: Path) -> None:
    spec = bundled_spec("fashion", "float32")
    assert spec.quality is not None
    quality, profile = tmp_path / "quality.json", tmp_path / "profile.json"
    quality.write_bytes(MARK + spec.quality.read_bytes())
    profile.write_bytes(MARK + PROFILE.read_bytes())
    assert load_replica(profile, quality) == load_replica(PROFILE, spec.quality)
    assert load(replace(spec, quality=quality), CPU).info.quality == load(spec, CPU).info.quality


def test_a_file_of_more_bytes_than_are_read_is_refused_and_not_held(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert len(read_text(file, 100)) == 100
    with pytest.raises(ValueError, match="it is larger than 99 bytes"):
        read_text(file, 99)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)  # more than any memory holds
    with pytest.raises(ValueError, match="it is larger than 16,777,216 bytes"):
        read_text(file)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_named_and_not_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # a socket's path may be no longer than 108 bytes
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("file")
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"it is a {kind}, not a file"):
        read_text(file)


def test_a_pipe_is_read_where_it_may_be_one_and_bounded_as_a_file_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content, most in (("a\n" * 50_000, 100_000), ("x" * 200_000, 100_000)):
        writing = threading.Thread(target=_write, args=(pipe, content))
        writing.start()
        try:
            if len(content) <= most:
                assert read_text(pipe, most, pipe=True) == content
            else:
                with pytest.raises(ValueError, match="larger than 100,000 bytes"):
                    read_text(pipe, most, pipe=True)
        finally:
            writing.join()


def _write(pipe: Path, content: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write_text(content)


@pytest.mark.parametrize("opened", [False, True])
def test_a_pipe_that_nothing_is_written_to_is_given_up(
    opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "PIPE_TIME", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR) if opened else None
    try:
        with pytest.raises(ValueError, match="it is a pipe, which wasn't written and closed within"):
            read_text(pipe, pipe=True)
    finally:
        if writer is not None:
            os.close(writer)
