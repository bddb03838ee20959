"""What tests of hostile input share: others who go on meanwhile, and what an attack cost the server."""

import contextlib
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.server.api.rpc.wire import PATIENCE, connected, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

MIB = 2**20


def resident(pid: int, *, peak: bool = False) -> int:
    """Return the bytes that a process has in memory, or had at most since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def descriptors(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


@dataclass
class Others:
    """Callers who do nothing wrong: a prediction, health and metrics, again and again in a thread."""

    server: ServerProcess
    image: bytes
    rounds: int = 0
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        base = self.server.metrics_url.removesuffix("/metrics")
        with connected(self.server.target) as stub:
            while not self._stop.is_set():
                try:
                    stub.Predict(pb.PredictRequest(image=self.image, no_deadline=True), timeout=PATIENCE)
                    for path in ("/v2/health/ready", "/metrics"):
                        with urllib.request.urlopen(base + path, timeout=PATIENCE) as answer:
                            answer.read()
                except Exception as error:
                    self.failures.append(repr(error))
                self.rounds += 1

    def stop(self) -> None:
        self._stop.set()

    def wait_for_a_round(self) -> None:
        """Wait until calls that began after now have been answered."""
        enough = self.rounds + 2
        until(lambda: self.rounds >= enough, "others are answered")


@contextlib.contextmanager
def others(server: ServerProcess, image: bytes) -> Iterator[Others]:
    """Have others call for as long as this lasts; at the end all of their calls must have been answered."""
    calling = Others(server, image)
    thread = threading.Thread(target=calling.run)
    thread.start()
    try:
        yield calling
        calling.wait_for_a_round()
    finally:
        calling.stop()
        thread.join()
    assert calling.failures == []


@contextlib.contextmanager
def at_most(server: ServerProcess, memory: int) -> Iterator[None]:
    """Hold the server's process to so many bytes more than it has now."""
    pid = server.process.pid
    before = resident(pid)
    forget_peak(pid)
    yield
    taken = resident(pid, peak=True) - before
    assert taken <= memory, f"{taken / MIB:.0f} MiB"
