"""The merged model of this checkout against that of another, timed in turn in one run.

Each side is a process of its own that imports its own checkout's `tome_server.merging`, packs the same kind of model
and runs it on command. `git worktree add ../before COMMIT` makes a checkout of a commit to compare with. Weights are
random, which does not change the time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
# Seconds that one timing takes at least, so that the clock's noise is small.
LEAST = 0.1


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds a batch; (low, high) are quartiles over the rounds."""

    threads: int
    batch: int
    r: int
    other_ms: float
    ours_ms: float
    speedup: float
    speedup_quartiles: tuple[float, float]


class Side:
    """A process that times the models of one checkout."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def seconds(self, r: int, calls: int) -> float:
        """Return the seconds of one call at r, over so many."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{r} {calls}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def side(checkout: Path, model: str, batch: int, threads: int) -> Iterator[Side]:
    """Start a process for one checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "server"), "OMP_WAIT_POLICY": "PASSIVE"}
    environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "8192"
    command = [sys.executable, "-P", __file__, "--side", "--model", model]
    command += ["--batch", str(batch), "--threads", str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Side(process)
        assert process.stdin is not None
        process.stdin.close()


def run_side(model: str, batch: int, threads: int) -> None:
    """Time the calls that each line of standard input names, until it ends."""
    import tome_server.merging  # noqa: F401  isort: skip  (makes timm importable; of any commit)

    import timm
    import torch

    from tome_server.merging import merge, pack

    torch.set_num_threads(threads)
    plain = timm.create_model(model).eval().requires_grad_(False)
    images = torch.randn(batch, *plain.default_cfg["input_size"])
    packed = pack(merge(plain))
    with torch.inference_mode():
        for line in sys.stdin:
            r, calls = map(int, line.split())
            start = time.perf_counter()
            for _ in range(calls):
                packed(images, r)
            print((time.perf_counter() - start) / calls, flush=True)


def measure(other: Path, model: str, batch: int, threads: int, rs: Sequence[int], rounds: int) -> list[Row]:
    """Time both sides in turn at each r."""
    with ExitStack() as stack:
        sides = []
        for checkout in (other, HERE):
            sides.append(stack.enter_context(side(checkout, model, batch, threads)))
            sides[-1].seconds(rs[0], 1)  # has measured how best to divide its work before the next one starts
        before, ours = sides
        calls = {}
        for r in rs:
            ours.seconds(r, 2)  # the first calls make kernels
            before.seconds(r, 2)
            calls[r] = max(1, round(LEAST / before.seconds(r, 2)))
        pairs: dict[int, list[tuple[float, float]]] = {r: [] for r in rs}
        for _ in range(rounds):
            for r, times in pairs.items():
                times.append((before.seconds(r, calls[r]), ours.seconds(r, calls[r])))
    return [_row(threads, batch, r, times) for r, times in pairs.items()]


def _row(threads: int, batch: int, r: int, times: Sequence[tuple[float, float]]) -> Row:
    low, speedup, high = statistics.quantiles([before / ours for before, ours in times], n=4)
    before_ms, ours_ms = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
    return Row(threads, batch, r, before_ms, ours_ms, speedup, (low, high))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or be one side."""
    args = _arguments().parse_args(argv)
    if args.side:
        run_side(args.model, args.batch[0], args.threads[0])
        return
    if args.other is None or not (args.other / "server/tome_server/merging").is_dir():
        raise SystemExit("--other must name a checkout of this repository")
    rows = [
        row
        for threads in args.threads
        for batch in args.batch
        for row in measure(args.other.resolve(), args.model, batch, threads, args.r, args.rounds)
    ]
    if args.json:
        setting = {"model": args.model, "device": platform.machine(), "rounds": args.rounds}
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    # Here, since a side imports this file too, and must find nothing of this repository but its own checkout's server.
    from tome_api.tables import table

    cells = []
    for row in rows:
        low, high = row.speedup_quartiles
        sizes = (f"{size}" for size in (row.threads, row.batch, row.r))
        times = (f"{row.other_ms:.1f}", f"{row.ours_ms:.1f}", f"{row.speedup:.3f}", f"{low:.3f}-{high:.3f}")
        cells.append((*sizes, *times))
    header = ("threads", "batch", "r", "other ms", "ours ms", "speedup", "quartiles")
    print(table(header, cells, right=range(len(header))))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="what to compare with")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--batch", type=_integers, default=[1, 8], help="batch sizes (default: 1,8)")
    parser.add_argument("--r", type=_integers, default=[0, 8, 13, 16], help="default: 0,8,13,16")
    parser.add_argument("--threads", type=_integers, default=[1, 2], help="CPU threads (default: 1,2)")
    parser.add_argument("--rounds", type=int, default=11, help="timings of each pair (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser


# Not imported from another benchmark, for the same reason.
def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
