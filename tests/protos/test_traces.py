"""Traces, which client and server read alike."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tome_api.traces import Arrival, read_trace


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def test_a_trace_is_read_line_by_line(file: Path) -> None:
    file.write_text("# recorded on a Tuesday\n0.0132 50ms\n\n0.5   # no budget of its own\n0.5 0.2 s\n 2 none # bulk\n")
    assert read_trace(file) == (Arrival(0.0132, 0.05), Arrival(0.5), Arrival(0.5, 0.2), Arrival(2.0, math.inf))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_it(mark: bytes, file: Path) -> None:
    file.write_bytes(mark + "0.5 50ms # grüße\r\n0.6\r\n".encode())
    assert read_trace(file) == (Arrival(0.5, 0.05), Arrival(0.6))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0.1\nsoon\n", "trace:2: 'soon' is not a number of seconds"),
        ("# x\n0.2\n0.1\n", "trace:3: times must not be negative, infinite or go back; got 0.1 after 0.2"),
        ("-1\n", "trace:1: times must not be negative"),
        ("nan\n", "trace:1: times must not"),
        ("inf 50ms\n", "trace:1: times must not"),
        ("0.1 soon\n", "trace:1: 'soon' is not a duration"),
        ("0.1 500\n", "trace:1: 500 needs a unit: 500ms or 500s"),
        ("0.1 0ms\n", "trace:1: '0ms' must be above 0"),
        ("0.1 50ms 3\n", "trace:1: '50ms 3' is not a duration"),
        ("# nothing\n\n", "trace: there is no request in it"),
    ],
)
def test_a_wrong_trace_is_refused_by_its_line(file: Path, lines: str, message: str) -> None:
    file.write_text(lines)
    with pytest.raises(ValueError) as caught:
        read_trace(file)
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused_by_its_name(file: Path) -> None:
    file.write_bytes(b"\xff\xfe0\x00.\x001\x00")
    with pytest.raises(ValueError, match=r"trace: the file is not UTF-8 text"):
        read_trace(file)
