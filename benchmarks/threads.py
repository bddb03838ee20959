"""CPU threads: what more of them gain, and what their way of waiting costs, with and without other work on the CPUs.

Each variant runs a model's forward pass in a process of its own, because OpenMP reads how its threads wait when torch
is imported: `asleep` (OMP_WAIT_POLICY=PASSIVE, which `tome-server` sets), `briefly` (they spin for 10,000 rounds before
they sleep: GOMP_SPINCOUNT=10000) or `spinning` (OMP_WAIT_POLICY=ACTIVE). A single thread never waits. Several threads
divide the images of a batch. Images left over, above all a single image, are run by one thread (`images`), or by all
threads block by block (`blocks`). `busy` is the number of other processes that keep a CPU busy. The variants take
turns, --rounds times. A time is the median over the rounds of the median call, with the least and the most beside it.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from tqdm import tqdm

from benchmarks.merging import integers, seconds
from tome_api.tables import table
from tome_server.merging import MergedModel, merge, pack, packable
from tome_server.merging.geometry import default_size
from tome_server.models.loading import create
from tome_server.models.spec import BUNDLED_PREFIX, bundled_spec

WAITING = {
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "briefly": {"GOMP_SPINCOUNT": "10000"},
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
}
DIVIDED = {"measured": None, "images": False, "blocks": True}


@dataclass(frozen=True)
class Row:
    """One variant at one batch size and r. Milliseconds, over the rounds."""

    threads: int
    divided: str
    """The value of --divided."""
    waiting: str
    busy: int
    batch: int
    r: int
    median: float
    least: float
    most: float


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.timed is not None:
        print(json.dumps(_time(args.timed, args)))
        return
    rows = _measure(args)
    setting = {"model": args.model, "cpus": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    setting |= {"rounds": args.rounds}
    if args.json:
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("  ".join(f"{name} {value}" for name, value in setting.items()))
        _print_table(rows, args)


def _ways(args: argparse.Namespace) -> list[tuple[int, str, str, int]]:
    """Threads, what they divide, how they wait, and how many busy processes are beside them."""
    # A single thread has nothing to divide or to wait for.
    return [
        (threads, divided, waiting, busy)
        for threads, divided, waiting, busy in itertools.product(args.threads, args.divided, args.waiting, args.busy)
        if threads > 1 or (divided, waiting) == (args.divided[0], args.waiting[0])
    ]


def _measure(args: argparse.Namespace) -> list[Row]:
    ways = _ways(args)
    taken: dict[tuple[int, str, str, int], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in tqdm(range(args.rounds), unit="round", disable=not sys.stderr.isatty()):
        for way in ways:
            taken[way].append(_turn(*way, args))
    rows = []
    for way, (batch, r) in itertools.product(ways, itertools.product(args.batch, args.r)):
        times = [turn[f"{batch} {r}"] * 1e3 for turn in taken[way]]
        rows.append(Row(*way, batch, r, statistics.median(times), min(times), max(times)))
    return rows


def _turn(threads: int, divided: str, waiting: str, busy: int, args: argparse.Namespace) -> dict[str, float]:
    """Run `_time` in a process whose threads wait in the given way."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= WAITING[waiting] | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
    command = [sys.executable, "-m", "benchmarks.threads", "--timed", str(threads), "--model", args.model]
    command += ["--divided", divided]
    command += ["--batch", _commas(args.batch), "--r", _commas(args.r), "--calls", str(args.calls)]
    with _busy(busy):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Keep this many other processes busy while the block lasts."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _time(threads: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a call for each batch size and r."""
    torch.set_num_threads(threads)
    merged, size = _merged(args.model, DIVIDED[args.divided[0]])
    times = {}
    with torch.inference_mode():
        for batch, r in itertools.product(args.batch, args.r):
            images = torch.randn(batch, *size)

            def call(images: torch.Tensor = images, r: int = r) -> object:
                return merged(images, r)

            for _ in range(3):
                call()
            calls = max(args.calls // batch, min(args.calls, 10))
            times[f"{batch} {r}"] = statistics.median(seconds(call, 1) for _ in range(calls))
    return times


def _merged(name: str, divided: bool | None) -> tuple[MergedModel, tuple[int, int, int]]:
    """Return the model, of random weights, and its input's [C, H, W]."""
    bundled = name.startswith(BUNDLED_PREFIX)
    model = create(bundled_spec(name.removeprefix(BUNDLED_PREFIX))) if bundled else timm.create_model(name)
    merged = merge(model.eval().requires_grad_(False))
    height, width = default_size(merged.model)
    return (pack(merged, divided=divided) if packable(merged) else merged), (model.in_chans, height, width)


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _print_table(rows: Sequence[Row], args: argparse.Namespace) -> None:
    lines = []
    for (threads, divided, waiting, busy, batch), group in itertools.groupby(
        rows, lambda row: (row.threads, row.divided, row.waiting, row.busy, row.batch)
    ):
        several = (divided, waiting) if threads > 1 else ("", "")
        cells = (f"{row.median:.1f} ms ({row.least:.1f}-{row.most:.1f})" for row in group)
        lines.append((f"{threads}", *several, f"{busy}", f"{batch}", *cells))
    header = ("threads", "divided", "waiting", "busy", "batch", *(f"r = {r}" for r in args.r))
    print(table(header, lines, right=range(5, len(header))))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.threads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:fashion", help="bundled or timm name (default: %(default)s)")
    parser.add_argument("--threads", type=integers, default=[1, 2], help="default: 1,2")
    parser.add_argument(
        "--waiting", type=_waiting, default=["asleep", "briefly"], help="default: asleep,briefly; or spinning"
    )
    parser.add_argument(
        "--divided", type=_divided, default=["measured"], help="of measured (as served, the default), images, blocks"
    )
    parser.add_argument("--busy", type=integers, default=[0, 1], help="processes beside (default: 0,1)")
    parser.add_argument("--batch", type=integers, default=[1, 8], help="default: 1,8")
    parser.add_argument("--r", type=integers, default=[0, 8, 14], help="default: 0,8,14")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: %(default)s)")
    parser.add_argument(
        "--calls", type=int, default=40, help="of one image in a turn, of a batch fewer (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--timed", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    return parser


def _waiting(text: str) -> list[str]:
    return _names(text, WAITING)


def _divided(text: str) -> list[str]:
    return _names(text, DIVIDED)


def _names(text: str, known: Collection[str]) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
