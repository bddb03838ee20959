"""Everything at once that befalls a server, and then quiet: all is as it was before.

    pytest -m nightly -s tests/server/test_chaos.py

TOME_CHAOS_SECONDS says for how long; by default ten minutes. TOME_CHAOS_SEED chooses what happens when.
"""

import contextlib
import io
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from PIL import Image

from tests.server.api.rpc.wire import scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

SECONDS = float(os.environ.get("TOME_CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("TOME_CHAOS_SEED", "0"))
# Within so many seconds of quiet the budgets of before must do again.
RECOVERED = 5.0
# Bytes: `limits.decode_memory`.
ROOM = 512 * 2**20
# Requests of one round, and the most that are in flight.
ROUND, MOST = 24, 200
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(SECONDS * 2 + 900)]

ENDS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,  # of a server whose device was killed, until it has been started again
    grpc.StatusCode.CANCELLED,  # what the test cancels itself
}


def photograph() -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((4000, 3000)).save(file, "JPEG", quality=90)
    return file.getvalue()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Chaos:
    """A server, its clients, and what befalls them."""

    def __init__(self, start: Callable[[], ServerProcess], clock: Callable[[str], object], images: list[bytes]) -> None:
        self.start, self.clock, self.images = start, clock, images
        self.random = random.Random(SEED)
        self.server = start()
        self.channel = grpc.insecure_channel(self.server.target)
        self.calls: list[Any] = []
        self.ends: Counter[str] = Counter()
        self.silent: list[socket.socket] = []
        self.killed = 0
        self.happened: Counter[str] = Counter()

    @property
    def pids(self) -> list[int]:
        return [self.server.process.pid, *children(self.server.process.pid)]

    def ask(self) -> None:
        """Send a round of requests of mixed budgets, kinds and images; some are given up by the client."""
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        for _ in range(ROUND):
            request = pb.PredictRequest(image=self.random.choice(self.images))
            budget = self.random.choice([0.005, 0.05, 0.1, 0.4, 1.0, 5.0, None])
            if budget is None:
                request.no_deadline = True
            else:
                request.latency_budget.CopyFrom(Duration(nanos=int(budget % 1 * 1e9), seconds=int(budget)))
            call = stub.Predict.future(request, timeout=60)
            self.calls.append(call)
            if self.random.random() < 0.1:
                call.cancel()
        self.reap(MOST)

    def reap(self, most: int) -> None:
        """Wait until no more than `most` calls are in flight; each has ended in just one way that it may."""
        until(lambda: sum(not call.done() for call in self.calls) <= most, "calls end")
        left = []
        for call in self.calls:
            if not call.done():
                left.append(call)
                continue
            code = grpc.StatusCode.CANCELLED if call.cancelled() else call.code()
            assert code in ENDS, f"{code}: {call.details()}"
            self.ends[code.name] += 1
        self.calls = left

    def stop_a_process(self) -> None:
        pid = self.random.choice(self.pids)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.1, 5.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def kill_the_device(self) -> None:
        [device] = children(self.server.process.pid)
        os.kill(device, signal.SIGKILL)
        assert self.server.process.wait(120) == 1, "the server ends, to be started again"
        self.killed += 1
        self.reap(0)
        self.channel.close()
        self.server = self.start()
        self.channel = grpc.insecure_channel(self.server.target)

    def set_the_clock(self) -> None:
        self.clock(self.random.choice(["+0", "+30d", "-30d", "+1h", "-5s"]))

    def burst_of_photographs(self) -> None:
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        for _ in range(30):
            seconds = self.random.choice([1, 60])
            request = pb.PredictRequest(image=self.images[-1], latency_budget=Duration(seconds=seconds))
            self.calls.append(stub.Predict.future(request))

    def churn(self) -> None:
        """Connections that say nothing, that break off, and that ask one thing and go."""
        host, port = self.server.target.rsplit(":", 1)
        for _ in range(20):
            connection = socket.create_connection((host, int(port)), 10)
            self.silent.append(connection)
            if self.random.random() < 0.5:
                connection.send(self.random.randbytes(100))
        for connection in self.silent[:-10]:
            connection.close()
        self.silent = self.silent[-10:]
        with grpc.insecure_channel(self.server.target) as channel:
            inference_pb2_grpc.InferenceStub(channel).ListModels(
                pb.ListModelsRequest(), timeout=60, wait_for_ready=True
            )

    def step(self) -> None:
        self.ask()
        what, weights = zip(
            (self.stop_a_process, 8), (self.burst_of_photographs, 3), (self.churn, 4), (self.set_the_clock, 3),
            (self.kill_the_device, 0.3), (lambda: time.sleep(0.5), 6), strict=True,
        )  # fmt: skip
        [one] = self.random.choices(what, weights)
        self.happened[getattr(one, "__name__", "rest").strip("<>")] += 1
        one()

    def quiet(self) -> None:
        self.reap(0)
        for connection in self.silent:
            connection.close()
        self.silent = []
        self.clock("+0")
        until(lambda: scrape(self.server.metrics_url).total("tome_requests_pending") == 0, "nothing waits")

    def least_budgets(self) -> dict[int, float]:
        """For each image, a budget that an idle server takes: three times what it usually needs, in seconds."""
        return {number: 3 * median(self._took(image) for _ in range(9)) for number, image in enumerate(self.images)}

    def _took(self, image: bytes) -> float:
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        reply = stub.Predict(pb.PredictRequest(image=image, latency_budget=Duration(seconds=60)))
        return float(reply.timing.total.ToNanoseconds() / 1e9)

    def answers(self, image: bytes, budget: float) -> bool:
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        duration = Duration()
        duration.FromNanoseconds(int(budget * 1e9))
        call = stub.Predict.future(pb.PredictRequest(image=image, latency_budget=duration))
        return call.code() is grpc.StatusCode.OK


def test_after_chaos_an_idle_server_is_as_it_was(
    own_server: Callable[..., ServerProcess], wall_clock: Callable[[str], object], samples: dict[Path, str]
) -> None:
    chaos = Chaos(own_server, wall_clock, [*(path.read_bytes() for path in sorted(samples)[:3]), photograph()])
    chaos.ask()
    chaos.quiet()
    budgets = chaos.least_budgets()
    began = time.monotonic()
    marks: dict[int, tuple[list[int], list[int]]] = {}
    while time.monotonic() - began < SECONDS:
        chaos.step()
        pid = chaos.server.process.pid
        if pid not in marks:
            chaos.quiet()
            marks[pid] = ([descriptors(each) for each in chaos.pids], [resident(each) for each in chaos.pids])
    chaos.quiet()
    quiet = time.monotonic()
    # A neighbour may cost one of them its deadline, but not again and again.
    recovered: dict[int, float] = {}
    for number, budget in budgets.items():
        while not chaos.answers(chaos.images[number], budget):
            assert time.monotonic() - quiet < 60
            time.sleep(0.1)
        recovered[number] = time.monotonic() - quiet
    print(
        f"\n{chaos.ends.total()} requests in {quiet - began:.0f} s: {dict(chaos.ends)}\n"
        f"{dict(chaos.happened)}\n"
        "budget of before, and seconds of quiet until it did again: "
        + ", ".join(f"{budgets[number] * 1e3:.0f} ms {seconds:.2f} s" for number, seconds in recovered.items())
    )
    assert max(recovered.values()) < RECOVERED
    assert chaos.server.process.poll() is None
    held, memory = marks[chaos.server.process.pid]
    now = [descriptors(each) for each in chaos.pids]
    kept = [resident(each) for each in chaos.pids]
    print(f"descriptors {held} -> {now}; MiB {[size >> 20 for size in memory]} -> {[size >> 20 for size in kept]}")
    # Allocators keep some of what decoding may take at once; a leak of photographs would be gigabytes.
    assert all(after <= before + ROOM for before, after in zip(memory, kept, strict=True))
    # The channel's own connection and a few of what is kept open for reuse.
    assert all(after <= before + 3 for before, after in zip(held, now, strict=True))
    log = chaos.server.log.read_text()
    assert "Traceback" not in log
    assert chaos.server.terminate(120) == 0
