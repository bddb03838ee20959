"""A real `tome-server serve` in a process of its own."""

import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from tome_server.cli.serve import FREE_PORTS, start, when_ready

# What a profile takes that no earlier test's server has left; later ones find it in the session's cache.
PROFILE_TIME = "2s"


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
    # Tests stop the device's process for as long as they need, which may be long on a busy machine.
    flags = (*FREE_PORTS, "--profile-time", PROFILE_TIME, "--hung-device-timeout", "600s", *flags)
    with log.open("w") as stderr:
        process = start(*flags, stderr=stderr, env={**os.environ, "COLUMNS": "100"})
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    ready = when_ready(process)
    watchdog.cancel()
    if ready is None:
        _kill(process)
        raise RuntimeError(f"the server did not start:\n{log.read_text()}")
    return ServerProcess(process, ready["grpc"], ready["metrics"], log)


def stop_server(server: ServerProcess) -> None:
    """End a server at once."""
    _kill(server.process)


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
