"""Output of both commands on terminals that are not UTF-8."""

from __future__ import annotations

import io
import sys

import pytest

from tome_api.terminal import never_refuse


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "197 → 101, CV² 1…", "197 -> 101, CV2 1..."),
        ("ascii", "Übergröße", "\\xdcbergr\\xf6\\xdfe"),
        ("latin-1", "größe → 鳥", "größe -> \\u9ce5"),
        ("utf-8", "197 → 101", "197 → 101"),
        # How Python names files whose bytes are not UTF-8.
        ("utf-8", "latin-\udce9.png", "latin-\\udce9.png"),
    ],
)
def test_what_a_terminal_lacks_is_written_in_what_it_has(
    encoding: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    never_refuse()
    for stream in (sys.stdout, sys.stderr):
        print(text, file=stream, flush=True)
        assert isinstance(stream.buffer, io.BytesIO)
        assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_a_command_without_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    never_refuse()
