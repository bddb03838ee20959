"""Fixtures that several packages' tests share: a real server process, and the sample images."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, start_server, stop_server

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

# As the commands do, before torch is imported: threads that spin while they wait take a hundred times as long where
# something else keeps one of them from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A proxy of the environment is no way to what the tests start on this machine. Programs understand either spelling.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "localhost", "127.0.0.1", "::1"]))

# Shells have what they start in the background ignore SIGINT, and nohup SIGHUP, and processes inherit that.
for _signum, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signum) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(_signum, _handler)

SAMPLES = Path(__file__).parents[1] / "server/tome_server/models/bundled/fashion/samples"


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
