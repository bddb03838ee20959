"""Tries the default policy's constants, each in turn at other values, on cells and seeds that nothing is judged on.

The cells lie between those of `benchmarks.policies` (budgets of 2.5, 5 and 10 images, loads of 60 to 220 %, CV² 2, 6),
on the same devices; the seeds are 1 and 2. A line says, for one value of one constant, how far below the bound the
policy is on average, how far it falls behind the best of the other policies on average over all cells (where it leads
counts 0), and how far in its worst cell. Another value of a constant is worth taking if both fall clearly.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from benchmarks.devices import devices
from benchmarks.policies import BLIND, DEFAULT, Cell, policies, requests, serve
from tome_server.scheduling.policy import policy_named, price
from tome_server.simulation.bound import clairvoyant_bound

KS = (2.5, 5, 10)
LOADS = (0.6, 0.9, 1.3, 2.2)
CV2S = (2, 6)
SEEDS = (1, 2)
# What is tried beside the present value of each constant of policy/price.py.
TRIED = {
    "_RESERVE": (0.0, 0.05, 0.2, 0.3),
    "_EFFICIENT": (0.8, 0.9, 0.98),
    "_LEAST_SHARE": (0.0, 0.001, 0.005, 0.01),
    "_CHEAP": (0.0, 0.01, 0.05),
    "_BURSTS": (1.0, 1.2, 2.0, 3.0),
    "_PATIENCE": (0.0, 0.005, 0.01, 0.03, 0.05),
    "_CLOSE": (0.0, 0.001, 0.005, 0.01),
    "_EACH": (4, 8),
    "_COARSER": (0.6, 0.7, 0.9),
}


@dataclass(frozen=True)
class Others:
    """What the bound and the best of the other policies reached in a cell."""

    bound: float
    best: float


@dataclass(frozen=True)
class Trial:
    """One value of one constant, over all cells."""

    constant: str
    """Empty for the constants as they are."""
    value: float
    below: float
    """Points below the bound, mean."""
    behind: float
    """Points behind the best other where that is ahead, mean over all cells."""
    worst: float
    """The same in the worst cell."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    cells = [
        Cell(device.name, k, load, cv2, classes)
        for device in devices()
        for k in KS
        for load in LOADS
        for cv2 in CV2S
        for classes in (1, 2)
    ][:: args.every]
    # Spawned, so that a worker has the constants as they are but for the one that it is told.
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        tell = partial(tqdm, total=len(cells), unit="cell", leave=False, disable=not sys.stderr.isatty())
        others = list(tell(pool.imap(_others, cells)))
        for constant, value in _tried(args.constants):
            reached = list(tell(pool.imap(_reached, [(cell, constant, value) for cell in cells])))
            behind = [max(0.0, other.best - accuracy) for other, accuracy in zip(others, reached, strict=True)]
            below = [other.bound - accuracy for other, accuracy in zip(others, reached, strict=True)]
            trial = Trial(constant, value, statistics.fmean(below), statistics.fmean(behind), max(behind))
            print(json.dumps(trial.__dict__) if args.json else _line(trial), flush=True)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("constants", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(TRIED)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth cell (default: 1)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a CPU")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each value")
    return parser


def _tried(constants: Sequence[str]) -> Iterator[tuple[str, float]]:
    yield "", 0.0
    for constant in constants or TRIED:
        for value in TRIED[constant]:
            yield constant, value


def _others(cell: Cell) -> Others:
    """Return what the others reach, mean over the seeds."""
    [device] = [device for device in devices() if device.name == cell.device]
    runs = [(requests(cell, device, seed), seed) for seed in SEEDS]
    means = [
        statistics.fmean(serve(one, device, partial(policy_named, policy), seed).accuracy for one, seed in runs)
        for name, policy in policies(device).items()
        if name not in (DEFAULT, BLIND)
    ]
    bound = statistics.fmean(clairvoyant_bound(one, device.profile, device.quality) for one, _ in runs)
    return Others(bound, max(means))


def _reached(task: tuple[Cell, str, float]) -> float:
    """Return what the default policy reaches with one constant changed, mean over the seeds."""
    cell, constant, value = task
    [device] = [device for device in devices() if device.name == cell.device]
    kept = getattr(price, constant) if constant else None
    try:
        if constant:
            setattr(price, constant, value)
        return statistics.fmean(
            serve(requests(cell, device, seed), device, partial(policy_named, DEFAULT), seed).accuracy for seed in SEEDS
        )
    finally:
        if constant:
            setattr(price, constant, kept)


def _line(trial: Trial) -> str:
    name = f"{trial.constant} = {trial.value:g}" if trial.constant else "as it is"
    return f"{name:24}{trial.below:7.2f} below the bound{trial.behind:8.3f} behind others, {trial.worst:.2f} at worst"


if __name__ == "__main__":
    main()
