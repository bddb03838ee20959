"""NVIDIA's perf_analyzer, as it is published, against the real server. It is built for a newer C library than Debian
12's: without one that runs, it gets trixie's beside it, which takes root and debootstrap."""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.api.rpc.wire import scrape
from tests.server_process import ServerProcess
from tome_client import Client
from tome_client.cli import main

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]

VERSION = "2.60.0"
RATES = (4, 8)
# Of our own client's, in turn with perf_analyzer's: seconds, and how many of each at least and at most.
WINDOW, LEAST, MOST = 3.0, 5, 15


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs perf_analyzer here."""
    if found := shutil.which("perf_analyzer"):
        return [found]
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs perf_analyzer, or root and: apt-get install debootstrap")
    folder = tmp_path_factory.mktemp("perf_analyzer")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--platform", "manylinux_2_38_x86_64", "--target", str(folder / "wheel"), f"perf-analyzer=={VERSION}"]
    subprocess.run(pip, check=True)
    base = folder / "trixie"
    bootstrap = ["debootstrap", "--foreign", "--variant=minbase", "--include=libstdc++6", "trixie", str(base)]
    subprocess.run(bootstrap, check=True, stdout=subprocess.DEVNULL)
    libraries = base / "usr/lib/x86_64-linux-gnu"
    binary = folder / "wheel/perf_analyzer/bin/perf_analyzer"
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(binary)]


@pytest.fixture(scope="module")
def analyze(command: list[str], server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs perf_analyzer, and returns the rows of its table."""

    def run(*flags: str, http: bool = False, of: Any = server) -> list[dict[str, str]]:
        table = tmp_path_factory.mktemp("table") / "table.csv"
        address = of.metrics_url.removesuffix("/metrics").removeprefix("http://") if http else of.target
        # Zeros, for its random floats are random bytes: NaN, and refused. What is stable here is not asked.
        common = ["-m", "fashion", "-u", address, "-i", "http" if http else "grpc", "--input-data", "zero"]
        common += ["--stability-percentage", "999", "--max-trials", "3", "-f", str(table)]
        done = subprocess.run([*command, *common, *flags], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        with table.open() as file:
            return list(csv.DictReader(file))

    return run


def test_a_sweep_of_concurrency_completes(analyze: Callable[..., Any], server: ServerProcess) -> None:
    before = scrape(server.metrics_url).total("tome_requests_total", code="OK")
    rows = analyze("--concurrency-range", "1:4", "--measurement-interval", "2000")
    assert sorted(int(row["Concurrency"]) for row in rows) == [1, 2, 3, 4]
    for row in rows:
        assert float(row["Inferences/Second"]) > 0
        assert float(row["Server Compute Infer"]) > 0  # from our ModelStatistics
        assert float(row["Server Compute Infer"]) < float(row["p99 latency"])
    assert scrape(server.metrics_url).total("tome_requests_total", code="OK") > before


@pytest.mark.parametrize("flags", [["--streaming", "--async"], ["--async"], ["-b", "4"]])
def test_streams_callbacks_and_batches_complete(analyze: Callable[..., Any], flags: list[str]) -> None:
    [row] = analyze("--concurrency-range", "2", "--measurement-interval", "2000", *flags)
    assert float(row["Inferences/Second"]) > 0


def test_rest_completes(analyze: Callable[..., Any]) -> None:
    [row] = analyze("--concurrency-range", "2", "--measurement-interval", "2000", http=True)
    assert float(row["Inferences/Second"]) > 0


def test_at_fixed_rates_it_finds_what_our_own_client_finds(
    analyze: Callable[..., Any], server: ServerProcess, samples: dict[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = analyze(
        "--request-rate-range", f"{RATES[0]}:{RATES[-1]}:{RATES[1] - RATES[0]}", "--measurement-interval", "5000"
    )
    theirs = {round(float(row["Request Rate"])): float(row["Inferences/Second"]) for row in rows}
    assert set(theirs) == set(RATES)
    for rate in RATES:
        arguments = ["--target", server.target, "--images", str(min(samples).parent), "--rate", str(rate)]
        arguments += ["--arrivals", "constant", "--budget", "60s", "--duration", "10s", "--warmup", "1s", "--json"]
        capsys.readouterr()
        assert main(["load", *arguments]) in (None, 0)
        ours = json.loads(capsys.readouterr().out)
        assert theirs[rate] == pytest.approx(ours["summary"]["total"]["goodput"], rel=0.1)


def median_latency(target: str, concurrency: int) -> float:
    """In µs, of so many clients of ours that each ask anew once they are answered: what perf_analyzer asks."""
    image = np.zeros((3, 28, 28), np.float32)
    latencies: list[float] = []
    end = time.perf_counter() + WINDOW

    def ask() -> None:
        with Client(target) as client:
            client.predict(image)
            while (sent := time.perf_counter()) < end:
                client.predict(image, features=True, top_k=10)
                latencies.append(time.perf_counter() - sent)

    clients = [threading.Thread(target=ask) for _ in range(concurrency)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return 1e6 * statistics.median(latencies)


@pytest.fixture(scope="module")
def one_thread(module_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server that leaves a core to its clients, of which ours needs more of it."""
    return module_server("--threads", "1", "--default-budget", "60s")


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_its_latencies_are_those_that_our_own_client_finds(
    analyze: Callable[..., Any], one_thread: ServerProcess, concurrency: int
) -> None:
    ratios: list[float] = []
    while len(ratios) < LEAST or (len(ratios) < MOST and statistics.median(ratios) != pytest.approx(1, abs=0.1)):
        flags = ["--concurrency-range", str(concurrency), "--measurement-interval", "1000"]
        [row] = analyze(*flags, of=one_thread)
        ratios.append(float(row["p50 latency"]) / median_latency(one_thread.target, concurrency))
    print(f"concurrency {concurrency}: perf_analyzer's median latency is {statistics.median(ratios):.3f} of ours")
    assert statistics.median(ratios) == pytest.approx(1, abs=0.1)
