"""What a person sees on a terminal, which is a pseudo-terminal here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.peer import Peer

pytest.importorskip("pty", reason="needs pseudo-terminals")


def started(*argv: str, **streams: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts the command with standard error on a terminal; returns it and the other end of the terminal."""
    ours, theirs = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "tome_client", *argv], stderr=theirs, stdout=streams.get("stdout", subprocess.DEVNULL)
    )
    os.close(theirs)
    return running, ours


def until(terminal: int, text: bytes) -> bytes:
    """Returns what is shown until `text` appears."""
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 4096)
    return shown


def rest(terminal: int) -> bytes:
    """Returns what is shown until the other end is closed, which Linux reports as an error."""
    shown = b""
    try:
        while more := os.read(terminal, 4096):
            shown += more
    except OSError:
        pass
    os.close(terminal)
    return shown


def test_progress_is_shown_while_no_result_arrives_and_erased_before_any_other_line(image: str, peer: Peer) -> None:
    peer.free = 1
    peer.hold.clear()
    running, terminal = started("predict", image, image, "nowhere.png")
    until(terminal, b"2 of 3 images")
    peer.hold.set()
    shown = rest(terminal)
    assert running.wait(60) == 1
    *_, last = shown.split(b"\x1b[K")
    assert last.strip() == b"tome-client: 1 of 3 images failed: 1 INVALID_ARGUMENT"


@pytest.mark.parametrize("command", ["embed", "wait"])
def test_commands_without_results_to_see_show_progress(command: str, image: str, peer: Peer, tmp_path: Path) -> None:
    peer.hold.clear()
    argv = {"embed": [image, "-o", str(tmp_path / "a.npy")], "wait": []}[command]
    shows = {"embed": b"0 of 1 images", "wait": b"waiting for"}[command]
    running, terminal = started(command, *argv)
    until(terminal, shows)
    peer.hold.set()
    assert rest(terminal).endswith(b"\x1b[K")
    assert running.wait(60) == 0


def test_results_on_the_terminal_are_progress_enough(image: str, peer: Peer) -> None:
    ours, theirs = os.openpty()
    running, terminal = started("predict", image, image, stdout=theirs)
    os.close(theirs)
    assert running.wait(60) == 0
    assert rest(terminal) == b""
    assert image.encode() in rest(ours)
