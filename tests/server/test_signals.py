"""Commands as they are ended: at any moment, in one line, with the status that shells expect."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.server.api.rpc.wire import until
from tome_server.cli.serve import FREE_PORTS, start

BUNDLED = Path(__file__).parents[2] / "server/tome_server/models/bundled/fashion"
BEFORE = "before any model was served: stopping at once"


@contextmanager
def command(*args: str, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    line = [sys.executable, "-m", "tome_server", *args]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(log: Path, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    with log.open("w") as stderr, start(*FREE_PORTS, *flags, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


def state(pid: int, mask: str) -> int:
    """Return the signals that a process ignores (SigIgn) or catches (SigCgt)."""
    found = re.search(rf"^{mask}:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1], 16)


def has(pid: int, mask: str, signum: signal.Signals) -> Callable[[], bool]:
    return lambda: bool(state(pid, mask) >> (signum - 1) & 1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def slow(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration whose model loads once somebody writes its labels, and the pipe they are read from."""
    labels, config = tmp_path / "labels.fifo", tmp_path / "config.yaml"
    os.mkfifo(labels)
    bundled = yaml.safe_load((BUNDLED / "config.yaml").read_text())
    model = {
        "name": "slow",
        "source": bundled["architecture"],
        "kwargs": bundled["kwargs"],
        "data": bundled["data"],
        "checkpoint": str(BUNDLED / "weights.safetensors"),
        "labels": str(labels),
    }
    config.write_text(yaml.safe_dump({"threads": 1, "models": [model]}))
    return config, labels


def reader(pipe: Path) -> int:
    """Return the writing end of a pipe that has somebody reading from it, once it has."""
    end: list[int] = []

    def opened() -> bool:
        try:
            end.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    until(opened, "the pipe is read")
    return end[0]


def test_a_hangup_means_nothing_until_there_are_models_to_look_at(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log, "--dtype", "float32", "--profile-time", "500ms") as process:
        until(has(process.pid, "SigIgn", signal.SIGHUP), "it is ignored")
        process.send_signal(signal.SIGHUP)
        until(lambda: children(process.pid), "the device has a process")
        (device,) = children(process.pid)
        os.kill(device, signal.SIGHUP)  # as when it is sent to all processes of a container
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        until(lambda: '"event": "SIGHUP: looking for models' in log.read_text(), "it is said")
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT], ids=lambda order: order.name)
def test_a_server_told_to_stop_while_it_imports_ends_with_a_line(order: signal.Signals) -> None:
    with command("serve", "--listen", "127.0.0.1:0", "--metrics", "off") as process:
        until(has(process.pid, "SigIgn", signal.SIGHUP), "its signals are handled")
        process.send_signal(order)
        out, error = process.communicate(timeout=100)
    assert process.returncode == (0 if order == signal.SIGTERM else 130)
    assert (out, error) == ("", f"tome-server: {order.name} {BEFORE}\n")


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT], ids=lambda order: order.name)
def test_a_server_told_to_stop_while_it_loads_ends_with_its_device(
    slow: tuple[Path, Path], tmp_path: Path, order: signal.Signals
) -> None:
    """It waits for nothing: nothing is in flight, and what loads, which may take for ever, is of no use any more."""
    config, labels = slow
    log = tmp_path / "log"
    with serving(log, "--config", str(config)) as process:
        end = reader(labels)
        (device,) = children(process.pid)
        process.send_signal(order)
        assert process.wait(100) == (0 if order == signal.SIGTERM else 130)
        os.close(end)
    assert not Path(f"/proc/{device}").exists()
    text = log.read_text()
    assert f"{order.name} {BEFORE}" in text
    assert "in flight" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("args", "library"),
    [
        (["evaluate", "--data", "."], "libtorch"),
        (["profile"], "libtorch"),
        (["models", "supported", "*"], "libtorch"),
        (["plan", "--rate", "1", "--budget", "1s"], "numpy"),
    ],
    ids=lambda args: args[0],
)
def test_ctrl_c_while_a_command_imports_ends_it_with_a_line(args: list[str], library: str) -> None:
    with command(*args) as process:
        until(lambda: library in Path(f"/proc/{process.pid}/maps").read_text(), "it imports")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=100)
    assert (process.returncode, out, error) == (130, "", "tome-server: interrupted\n")


def test_ctrl_c_while_a_command_works_ends_it_with_a_line(slow: tuple[Path, Path], tmp_path: Path) -> None:
    config, labels = slow
    with command("evaluate", "--config", str(config), "--data", str(BUNDLED / "samples")) as process:
        end = reader(labels)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=100)
        os.close(end)
    assert (process.returncode, out) == (130, "")
    assert error.splitlines()[-1] == "tome-server: interrupted"
    assert "Traceback" not in error


# What terminals can show


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "args",
    [["settings"], ["settings", "--schema"], ["tune", "--help"], ["serve", "--help"], ["plan", "--help"],
     ["models", "--help"], ["models", "list", "--repository", "{repository}"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_printed_is_printed_with_what_the_terminal_has(tmp_path: Path, args: list[str], encoding: str) -> None:
    folder = tmp_path / "models" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("architecture: vit_tiny_patch16_224\ndescription: größer – 大\n")
    (folder / "weights.safetensors").write_bytes((BUNDLED / "weights.safetensors").read_bytes())
    line = [sys.executable, "-m", "tome_server", *(arg.format(repository=folder.parent) for arg in args)]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(line, capture_output=True, timeout=100, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    if encoding == "utf-8":
        assert "\\x" not in text
