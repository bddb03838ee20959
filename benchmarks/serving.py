"""Deadlines on a real server: the default policy beside fixed r, on the same arrivals, over loopback.

Each policy has a server of the bundled model, which runs all the time. For each load the servers are driven in turn,
open-loop, with the same Poisson arrivals and images. Loads are shares of the capacity at r = 0. The bare model's loop
(no server: full batches of ready tensors, one after the other) measures that first. `effective accuracy` is the
measured top-1 of each answer's r, averaged over all requests; those unanswered or late count 0.

Budgets are --budget full batches, and --images times one image's time at r = 0 as the server measured it: a few images
leave time for one short batch after the one that is running.

At last each fixed r is driven to saturation, to show the cost of the server itself: its images a second over those of
the bare loop, in turn. And it counts how many batches of the default policy took no longer than promised, which 95 in
100 should. On a machine that is busy with other work none of this says much.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from benchmarks.servers import Server, tome_server
from tome_client import AsyncClient, Client, ModelInfo
from tome_client.load import LoadPlan, LoadResult, Renewal, event_loop, parse_budgets, read_samples, run_load, summarize

SAMPLES = Path(__file__).parents[1] / "server/tome_server/models/bundled/fashion/samples"
# Server and bare loop in turn, so many times and for so many seconds at most.
ROUNDS, WINDOW = 3, 5.0
# Requests in flight at saturation: a batch on the device, and those that the next ones are made of.
BATCHES_IN_FLIGHT = 3


@dataclass(frozen=True)
class Cell:
    """One policy at one load and budget."""

    budget_ms: float
    load: float
    """share of the capacity at r = 0"""
    policy: str
    rate: float
    requests: int
    attainment: float
    effective_accuracy: float
    p50_ms: float | None
    p99_ms: float | None
    mean_r: float | None
    mean_batch: float | None
    on_schedule: bool
    """whether the load generator kept its own times"""


@dataclass(frozen=True)
class Saturation:
    """One r driven as fast as it goes."""

    r: int
    server: float
    """images a second, median over the rounds"""
    bare: float
    """the bare loop's"""
    ratio: float
    """of the two in each round, median"""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.bare is not None:
        print(json.dumps(_bare_loop(args.bare, args)))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = stack.enter_context(_server("price", folder, args))
        with Client(first.target) as client:
            model = client.model()
        last = model.r_grid[-1].r
        policies = {"price": first.target}
        for policy in ("fixed:0", f"fixed:{last}"):
            policies[policy] = stack.enter_context(_server(policy, folder, args)).target
        capacity = _bare(0, args)
        image = model.r_grid[0].latency
        if image is None:
            sys.exit("the server did not say how long one image takes")
        budgets = [
            *(round(times * image, 3) for times in args.images),
            round(args.budget * args.max_batch / capacity, 3),
        ]
        setting = {
            "model": model.summary.name, "policies": list(policies), "threads": args.threads, "dtype": args.dtype,
            "max_batch": args.max_batch,
            "capacity_r0": round(capacity, 1), "image_ms": round(image * 1e3, 1),
            "seconds": args.seconds, "seed": args.seed,
        }  # fmt: skip
        if not args.json:
            print("  ".join(f"{name} {value}" for name, value in setting.items()))
            print(_HEAD)
        cells = []
        for budget, load, (policy, target) in product(budgets, args.loads, policies.items()):
            cells.append(_drive(load, policy, target, capacity, budget, model, args))
            if not args.json:
                print(_line(cells[-1]), flush=True)
        promises = _promises(first)
        saturation = [_saturation(policies[f"fixed:{r}"], r, args) for r in (0, last)]
    if args.json:
        report = {
            **setting, "cells": [asdict(cell) for cell in cells], "promises": promises,
            "saturation": [asdict(s) for s in saturation],
        }  # fmt: skip
        print(json.dumps(report, indent=2))
        return
    kept, batches = promises["kept"], sum(promises.values())
    print(f"price: {kept:.0f} of {batches:.0f} batches took no longer than promised: {kept / batches:.1%}")
    for one in saturation:
        print(f"saturated at r = {one.r}: {one.server:.1f} images/s, bare loop {one.bare:.1f}: {one.ratio:.1%}")


def _server(policy: str, folder: Path, args: argparse.Namespace) -> AbstractContextManager[Server]:
    """Run a server of the bundled model with `policy`. All servers share the profile that the first measured."""
    return tome_server(
        *("--policy", policy, "--threads", str(args.threads), "--max-batch", str(args.max_batch)),
        *("--dtype", args.dtype, "--profiles", str(folder), "--profile-time", "15s"),
    )


def _drive(
    load: float, policy: str, target: str, capacity: float, budget: float, model: ModelInfo, args: argparse.Namespace
) -> Cell:
    plan = LoadPlan(
        read_samples(SAMPLES),
        Renewal(load * capacity),
        parse_budgets(f"{budget * 1e3:.0f}ms"),
        duration=args.seconds,
        warmup=args.warmup,
        seed=args.seed,
    )
    with asyncio.Runner(loop_factory=event_loop) as runner:
        result = runner.run(run_load(target, plan))
    summary = summarize(result)
    total = summary.total
    return Cell(
        budget_ms=budget * 1e3,
        load=load,
        policy=policy,
        rate=round(summary.rate, 1),
        requests=total.sent,
        attainment=total.attainment.share,
        effective_accuracy=_effective(result, model),
        p50_ms=total.latency.p50 * 1e3 if total.latency else None,
        p99_ms=total.latency.p99 * 1e3 if total.latency else None,
        mean_r=total.mean_r,
        mean_batch=_mean([one.timing.batch_size for one in result.outcomes if one.timing]),
        on_schedule=not any("schedule" in reason for reason in summary.verdict.reasons),
    )


def _promises(server: Server) -> dict[str, float]:
    """Return the server's counts of batches by promise, kept and broken."""
    name = "tome_latency_promises_total"
    return {sample.labels["promise"]: sample.value for sample in server.samples() if sample.name == name}


def _effective(result: LoadResult, model: ModelInfo) -> float:
    top1 = {level.r: level.top1 or 0.0 for level in model.r_grid}
    earned = sum(top1[one.merging.r] for one in result.outcomes if one.attained and one.merging)
    return earned / len(result.outcomes)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _saturation(target: str, r: int, args: argparse.Namespace) -> Saturation:
    # In turn, since over minutes the speed of a machine changes by more than what is measured.
    rounds = [(_saturate(target, r, args), _bare(r, args)) for _ in range(ROUNDS)]
    server, bare = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    return Saturation(r, server, bare, statistics.median(ours / alone for ours, alone in rounds))


def _saturate(target: str, r: int, args: argparse.Namespace) -> float:
    """Return images a second of a closed loop that always has enough in flight."""
    images = [sample.data for sample in read_samples(SAMPLES)]

    async def run() -> float:
        done = 0
        began = time.perf_counter() + args.warmup
        seconds = min(args.seconds, WINDOW)
        end = began + seconds

        async def ask(client: AsyncClient, first: int) -> None:
            nonlocal done
            turn = first
            while time.perf_counter() < end:
                await client.predict(images[turn % len(images)], r=r, top_k=1, budget=60.0)
                done += began <= time.perf_counter() < end
                turn += 1

        async with AsyncClient(target, timeout=60) as client, asyncio.TaskGroup() as tasks:
            for first in range(BATCHES_IN_FLIGHT * args.max_batch):
                tasks.create_task(ask(client, first))
        return done / seconds

    return asyncio.run(run())


def _bare(r: int, args: argparse.Namespace) -> float:
    """Run `_bare_loop` in a process of its own, as the server is; returns images a second."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--bare",
        str(r),
        "--seconds",
        str(min(args.seconds, WINDOW)),
    ]
    command += ["--threads", str(args.threads), "--max-batch", str(args.max_batch), "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def _bare_loop(r: int, args: argparse.Namespace) -> float:
    # Imported here to keep the load generator's process light: only the loop's own process needs torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import tome_server.merging.timm_import  # noqa: F401  isort: skip
    import torch

    from tome_server.execution.batch import BatchItem, Outputs
    from tome_server.execution.executor import run_batch
    from tome_server.models.loading import load
    from tome_server.models.spec import bundled_spec

    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    model = load(bundled_spec("fashion", args.dtype), device)
    samples = sorted(SAMPLES.glob("*.png"))[: args.max_batch]
    images = [model.info.preprocess.encoded(path.read_bytes()) for path in samples]
    works = [BatchItem(torch.from_numpy(image), Outputs(top_k=1)) for image in images]
    for _ in range(5):
        run_batch(model, works, r, device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + args.seconds:
        run_batch(model, works, r, device)
        count += len(works)
    return count / (time.perf_counter() - began)


_HEAD = (
    f"{'budget':>7} {'load':>6} {'policy':<10} {'rate':>7} {'sent':>6} {'attained':>9} {'eff. accuracy':>14}"
    f" {'p50':>8} {'p99':>8} {'mean r':>7} {'batch':>6}"
)


def _line(cell: Cell) -> str:
    def number(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    return (
        f"{cell.budget_ms:>5.0f}ms {cell.load:>6.0%} {cell.policy:<10} {cell.rate:>7.1f} {cell.requests:>6}"
        f" {cell.attainment:>9.2%} {cell.effective_accuracy:>14.2%}"
        f" {number(cell.p50_ms, 8, 1)} {number(cell.p99_ms, 8, 1)}"
        f" {number(cell.mean_r, 7, 1)} {number(cell.mean_batch, 6, 1)}"
        f"{'' if cell.on_schedule else '  (the load generator was late)'}"
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loads", type=_numbers, default=[0.5, 0.9, 1.2, 1.5], metavar="X,X,…", help="of r = 0 capacity"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="measured in each cell (default: %(default)g)")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds before that (default: %(default)g)")
    parser.add_argument("--budget", type=float, default=3.0, help="in full batches at r = 0 (default: %(default)g)")
    parser.add_argument(
        "--images", type=_numbers, default=[3, 6, 12], metavar="K,K,…", help="budgets, in images at r = 0"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each server (default: %(default)d)")
    parser.add_argument("--max-batch", type=int, default=8, help="(default: %(default)d)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=100, help="of arrivals (default: %(default)d)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--bare", type=int, metavar="R", help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


if __name__ == "__main__":
    main()
