from dataclasses import replace
from pathlib import Path

import pytest

from tome_client.load.arrivals import read_trace as clients_trace
from tome_server.api.tokens import Tokens
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
