"""Overload of decoding: a server that gets progressive JPEGs of 12 megapixels, compared with decoding alone.

First a bare loop (as many threads as CPUs, no server) decodes and prepares photographs as fast as it can: that is the
capacity. Then, in each round and at 1.6 and 5 times that rate, the load generator drives in turn

- a bare gRPC server that refuses every request once it has read it, in one process with the bare loop: what decoding
  can do while as many photographs arrive, and
- a real server of the bundled model, whose requests have a budget of a second,

open-loop over loopback, with the same Poisson arrivals. Printed is the ratio of the server's answers in time to the
images of the loop. Generator and model run on the same CPUs and take their part of them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from benchmarks.servers import tome_server
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_client.load import BudgetClass, LoadPlan, LoadResult, Renewal, event_loop, read_samples, run_load

WIDTH, HEIGHT = 4000, 3000
_LOADS = "arrivals, as multiples of what decoding alone does (default: 1.6,5)"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.bare:
        asyncio.run(_bare_loop())
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "photograph.jpg").write_bytes(photograph())
        images = read_samples(Path(folder))
        with tome_server("--metrics", "off", "--log-level", "error") as server:
            with _bare() as (_, decoded):
                time.sleep(args.seconds / 3)
                capacity = decoded() / (args.seconds / 3)
            for number in range(args.rounds):
                for load in args.loads:
                    plan = LoadPlan(
                        images, Renewal(load * capacity), (BudgetClass(args.budget),), duration=args.seconds,
                        seed=number, grace=30,
                    )  # fmt: skip
                    with _bare() as (sink, decoded):
                        _drive(sink, plan)
                        bare = decoded() / args.seconds
                    rows.append(_row(load, bare, _drive(server.target, plan), args.seconds))
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
    Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(file, "JPEG", quality=75, progressive=True)
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


@contextmanager
def _bare() -> Iterator[tuple[str, Callable[[], int]]]:
    """Run the bare loop and server; yields its address, and what ends both and returns the images decoded."""
    command = [sys.executable, "-m", "benchmarks.decoding", "--bare"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout

    def decoded() -> int:
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        return int(process.stdout.readline())

    try:
        yield process.stdout.readline().strip(), decoded
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class _Refusing(inference_pb2_grpc.InferenceServicer):
    """Reads requests and refuses them."""

    async def Predict(self, _: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED)

    async def GetModel(self, *_: Any) -> pb.GetModelResponse:  # type: ignore[override]  # noqa: N802
        return pb.GetModelResponse(model=pb.Model(summary=pb.ModelSummary(name="none", ready=True)))


async def _bare_loop() -> None:
    """Decode until standard input ends. Prints the address of a server that refuses, and then the images decoded."""
    from tome_server.models.preprocess import Limits, Preprocess
    from tome_server.models.transform import ImageSettings

    settings = ImageSettings((3, 56, 56), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    preprocess, image, done, ended = Preprocess(settings, Limits()), photograph(), Counter[int](), threading.Event()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 2**26)])
    inference_pb2_grpc.add_InferenceServicer_to_server(_Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def decode(number: int) -> None:
        while not ended.is_set():
            preprocess.encoded(image)
            done[number] += 1

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(os.cpu_count() or 1)]
    for thread in threads:
        thread.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(done.total(), flush=True)
    ended.set()


def _drive(target: str, plan: LoadPlan) -> LoadResult:
    with asyncio.Runner(loop_factory=event_loop) as runner:
        return runner.run(run_load(target, plan))


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
