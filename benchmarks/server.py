"""The server itself: how long it takes to start, what memory it holds, and how it stops with calls in flight.

Each run starts a server twice with one new folder of profiles: `cold`, where it measures its model, and `warm`, where
it finds the profile. The time counts from the command to the ready line. Then the resident memory of the process that
answers requests (`front`) and of the one that runs the models (`device`) is read from /proc. The warm server gets calls
without merging and with ample budgets. Once all have arrived it is stopped (SIGTERM), and timed until it has exited. A
call without an answer, or an exit status other than 0, fails the benchmark.

Needs Linux. Flags of `tome-server serve` may follow `--`. On a machine that is busy with other work, times say little.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.servers import Server, tome_server
from tome_api.tables import table
from tome_client import AsyncClient
from tome_client.load import read_samples

SAMPLES = Path(__file__).parents[1] / "server/tome_server/models/bundled/fashion/samples"
# Seconds: of each call, and for the calls to arrive and the server to stop.
BUDGET = 600.0
TIMEOUT = 600.0


@dataclass(frozen=True)
class Run:
    """One run. Seconds and MiB."""

    cold_start: float
    warm_start: float
    front_cold: float
    front_warm: float
    device_cold: float
    device_warm: float
    in_flight: int
    """calls in the server at SIGTERM"""
    answered: int
    """of those sent"""
    stop: float
    exit_status: int


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    runs = [_run(args) for _ in tqdm(range(args.runs), unit="run", disable=not sys.stderr.isatty())]
    setting = {"runs": args.runs, "calls": args.calls, "flags": args.flags}
    if args.json:
        print(json.dumps({**setting, "each": [asdict(run) for run in runs]}, indent=2))
    else:
        _print_table(setting, runs)
    if any(run.answered < args.calls or run.exit_status for run in runs):
        sys.exit("a server lost calls, or failed")


def _run(args: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--profiles", folder, "--max-pending", str(max(256, args.calls)), *args.flags]
        with tome_server(*flags) as cold:
            cold_memory = _memory(cold)
        with tome_server(*flags) as warm:
            warm_memory = _memory(warm)
            in_flight, answered, stop = asyncio.run(_stop_under_load(warm, args.calls))
            status = warm.process.returncode
    return Run(
        cold_start=cold.seconds,
        warm_start=warm.seconds,
        front_cold=cold_memory["front"],
        front_warm=warm_memory["front"],
        device_cold=cold_memory["device"],
        device_warm=warm_memory["device"],
        in_flight=in_flight,
        answered=answered,
        stop=stop,
        exit_status=status,
    )


def _memory(server: Server) -> dict[str, float]:
    """Return the resident MiB of a server's two processes."""
    pid = server.process.pid
    [device] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"front": _resident(pid), "device": _resident(int(device))}


async def _stop_under_load(server: Server, calls: int) -> tuple[int, int, float]:
    """Stop the server; returns how many calls it held, how many calls were answered, and the seconds to its exit."""
    images = [sample.data for sample in read_samples(SAMPLES)]
    async with AsyncClient(server.target, timeout=TIMEOUT, retries=False) as client:
        calls_made = [
            asyncio.create_task(client.predict(images[turn % len(images)], r=0, top_k=1, budget=BUDGET))
            for turn in range(calls)
        ]
        in_flight, arrived = 0, 0
        async with asyncio.timeout(TIMEOUT):
            while arrived < calls:
                in_flight, ended = await asyncio.to_thread(_counts, server)
                arrived = in_flight + ended
        began = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.process.wait, TIMEOUT)
        seconds = time.perf_counter() - began
        ends = await asyncio.gather(*calls_made, return_exceptions=True)
    return in_flight, sum(not isinstance(end, BaseException) for end in ends), seconds


def _counts(server: Server) -> tuple[int, int]:
    """Return how many requests the server holds, and how many it has ended."""
    samples = server.samples()
    held, ended = (
        sum(int(sample.value) for sample in samples if sample.name == name)
        for name in ("tome_requests_pending", "tome_requests_total")
    )
    return held, ended


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


_ROWS = {
    "cold_start": ("start, measuring the model", "s", 2),
    "warm_start": ("start, with a profile", "s", 2),
    "front_cold": ("resident, front, cold start", "MiB", 0),
    "front_warm": ("resident, front, warm start", "MiB", 0),
    "device_cold": ("resident, device, cold start", "MiB", 0),
    "device_warm": ("resident, device, warm start", "MiB", 0),
    "in_flight": ("calls in flight at SIGTERM", "", 0),
    "answered": ("calls answered", "", 0),
    "stop": ("SIGTERM to exit", "s", 2),
}


def _print_table(setting: dict[str, object], runs: Sequence[Run]) -> None:
    print("  ".join(f"{name} {value}" for name, value in setting.items()))
    rows = []
    for name, (text, unit, digits) in _ROWS.items():
        values = [getattr(run, name) for run in runs]
        cells = (statistics.median(values), min(values), max(values))
        rows.append((text, *(f"{value:.{digits}f}" for value in cells), unit))
    print(table(("", "median", "least", "most", ""), rows, right=(1, 2, 3)))
    print(f"exit status: {', '.join(str(run.exit_status) for run in runs)}")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="to have in flight at the stop (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of tome-server serve")
    return parser


if __name__ == "__main__":
    main()
