"""A real `tome-server serve` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

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
