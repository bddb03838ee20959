"""Overload where decoding is the limit: photographs of 12 megapixels, beside what decoding alone can do.

In each round a bare loop (as many threads as CPUs, no server) decodes and prepares photographs as fast as it goes. Then
a real server of the bundled model gets them over loopback, open-loop with Poisson arrivals, at 1.6 and at 5 times that
rate, each with a budget of a second. Printed is the ratio of the answers in time to the images of the bare loop. The
load generator and the model run on the same CPUs and take their part of them.
"""

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tome_client.load import BudgetClass, LoadPlan, LoadResult, Renewal, event_loop, read_samples, run_load

WIDTH, HEIGHT = 4000, 3000
_LOADS = "arrivals, as multiples of what decoding alone does (default: 1.6,5)"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.bare:
        print(json.dumps(_bare_loop(args.seconds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "photograph.jpg").write_bytes(photograph())
        images = read_samples(Path(folder))
        with _server() as target:
            for number in range(args.rounds):
                bare = _bare(args.seconds)
                for load in args.loads:
                    plan = LoadPlan(
                        images, Renewal(load * bare), (BudgetClass(args.budget),), duration=args.seconds, seed=number,
                        grace=30,
                    )  # fmt: skip
                    with asyncio.Runner(loop_factory=event_loop) as runner:
                        rows.append(_row(load, bare, runner.run(run_load(target, plan)), args.seconds))
                    if not args.json:
                        print(_line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for load in args.loads:
        ratios = [row["ratio"] for row in rows if row["load"] == load]
        print(f"{load:g} times: {statistics.median(ratios):.0%} of decoding alone (median; {min(ratios):.0%} to "
              f"{max(ratios):.0%})")  # fmt: skip


def photograph() -> bytes:
    """Return a JPEG that is decoded like a photograph: smooth, with some detail everywhere."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", type=_numbers, default=[1.6, 5.0], metavar="X,…", help=_LOADS)
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="default: 1")
    parser.add_argument("--seconds", type=float, default=15.0, metavar="N", help="of each part (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _bare(seconds: float) -> float:
    """Return the photographs a second of the bare loop, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decoding", "--bare", "--seconds", str(seconds / 2)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _bare_loop(seconds: float) -> float:
    from tome_server.models.preprocess import Limits, Preprocess
    from tome_server.models.transform import ImageSettings

    settings = ImageSettings((3, 56, 56), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    preprocess, image, done = Preprocess(settings, Limits()), photograph(), Counter[int]()
    end = time.perf_counter() + seconds

    def decode(number: int) -> None:
        while time.perf_counter() < end:
            preprocess.encoded(image)
            done[number] += 1

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done.total() / seconds


@contextmanager
def _server() -> Iterator[str]:
    """Run a server of the bundled model; yields its address."""
    command = [sys.executable, "-m", "tome_server", "serve", "--listen", "127.0.0.1:0", "--metrics", "off"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        yield json.loads(process.stdout.readline())["ready"]["grpc"]
    finally:
        process.terminate()
        process.wait()


def _row(load: float, bare: float, result: LoadResult, seconds: float) -> dict[str, object]:
    outcomes = result.outcomes
    in_time = sum(one.attained for one in outcomes) / seconds
    return {
        "load": load, "bare": round(bare, 2), "requests": len(outcomes), "in_time": round(in_time, 2),
        "ratio": round(in_time / bare, 3),
        "ends": dict(Counter(one.code if one.reason is None else f"{one.code} {one.reason}" for one in outcomes)),
    }  # fmt: skip


def _line(row: dict[str, object]) -> str:
    return (
        f"{row['load']:>4} times {row['bare']}/s: {row['requests']} requests, {row['in_time']}/s in time, "
        f"{row['ratio']} of decoding alone  {row['ends']}"
    )


if __name__ == "__main__":
    main()
