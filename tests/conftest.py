"""Fixtures that several packages' tests share: a real server process, and the sample images."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # where only the tests of CUDA run
    pass
else:
    # A machine that stalls fails no test. The examples are the same in each run, but in `make nightly`, which looks for
    # others.
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("others", patient)
    settings.register_profile("same", patient, derandomize=True)
    settings.load_profile("same")

# What a profile takes that no earlier test's server has left; later ones find it in the session's cache.
PROFILE_TIME = "2s"
SAMPLES = Path(__file__).parents[1] / "server/tome_server/models/bundled/fashion/samples"


@dataclass
class ServerProcess:
    """A running `tome-server serve`."""

    process: "subprocess.Popen[str]"
    target: str
    metrics_url: str
    log: Path

    def terminate(self, timeout: float = 120) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def start_server(log: Path, *flags: str) -> ServerProcess:
    """Start a server on free ports and wait until it is ready; its log goes to a file.

    In float32 unless flags, or a file that they name, say otherwise: what auto chooses differs by machine.
    """
    if not {"--config", "--dtype", "--repository"} & {*flags}:
        flags = (*flags, "--dtype", "float32")
    command = [sys.executable, "-m", "tome_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics", "127.0.0.1:0", "--profile-time", PROFILE_TIME, *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "COLUMNS": "100"}
        )
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    watchdog.cancel()
    if not line:
        process.kill()
        process.wait()
        process.stdout.close()
        raise RuntimeError(f"the server did not start:\n{log.read_text()}")
    ready = json.loads(line)["ready"]
    return ServerProcess(process, ready["grpc"], ready["metrics"], log)


def stop_server(server: ServerProcess) -> None:
    """End a server, however it feels about it."""
    server.process.kill()
    server.process.wait()
    assert server.process.stdout is not None
    server.process.stdout.close()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the whole session: nobody's own is touched, and a profile is measured once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server of the bundled model for the whole session; tests must leave it as it was."""
    # No test that isn't about deadlines fails because the machine is busy.
    running = start_server(tmp_path_factory.mktemp("server") / "log", "--default-budget", "60s")
    yield running
    stop_server(running)


def servers(folder: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Yield a function that starts servers, which are ended afterwards."""
    started: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        started.append(start_server(folder / f"log{len(started)}", *flags))
        return started[-1]

    yield start
    for running in started:
        stop_server(running)


@pytest.fixture
def own_server(cache: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Return a function that starts a server, with flags, for the test to do anything to."""
    yield from servers(tmp_path)


@pytest.fixture(scope="module")
def module_server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Return a function that starts a server, with flags, for a module's tests to share."""
    yield from servers(tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="session")
def samples() -> dict[Path, str]:
    """The bundled sample images and their labels."""
    labels = json.loads((SAMPLES / "labels.json").read_text())
    return {SAMPLES / name: label for name, label in labels.items()}
