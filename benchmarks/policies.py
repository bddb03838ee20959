"""The default policy against every fixed r, the published policies and the clairvoyant bound, in simulation.

Each cell is a device, a load (a share of what the device can do at r = 0: max_batch / t(max_batch, 0)), the squared
coefficient of variation of the gaps between arrivals (gamma-distributed), and budgets: all one SLO, or each half of it,
it or its double at random. Every policy sees the same requests, behind the same admission and the same shedding of
those who can't be met any more; a batch takes what the profile says, give or take 2 %. Only `plain r=0` has neither: it
knows of no deadlines, as other servers don't. The figure is effective accuracy, in points: quality averaged over all
requests, where one that isn't answered in time counts 0.

Devices: `gpu` t = 2.5 ms + 1 ms * b * F(r), up to 32 images, SLO 36 ms; `cpu` t = 4 ms + 20 ms * b * F(r), up to 16
images, SLO 360 ms, both with F the share of ViT-B/16's multiply-accumulates left and its published accuracy at
r = 0, 2, … 16 (ToMe, appendix); `fashion`, the bundled model as measured on a CPU (benchmarks/profiles/fashion.json;
--measure does it anew, here) and its measured top-1, up to 8 images, SLO 120 ms.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tome_server.models.bundled import BUNDLED
from tome_server.scheduling.bound import clairvoyant_bound
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler
from tome_server.scheduling.simulator import Cluster, simulate
from tome_server.scheduling.workload import Steady
from tome_server.scheduling.workload import draw as draw_arrivals

NOTE = (
    "The default policy's constants were chosen on seeds 1 to 3 of these cells (all loads, CV² 1, 4 and 8), "
    "and looked at on seeds 100 to 104; these figures are of seeds 200 and up, which it never saw."
)
LOADS = (0.55, 0.97, 1.2, 1.4)
CV2S = (1, 4, 8)
FIRST_SEED = 200
DEFAULT = "price"
# r = 0 without admission, shedding or deadlines: first come first served, as servers do whose model has one cost.
BLIND = "plain r=0"
# Behind the first by no more than these points counts as being with it.
NEAR = 0.3
STORED = Path(__file__).parent / "profiles" / "fashion.json"
# How many wait when decisions are timed, and the most they should take, in microseconds.
DECISIONS = ((100, 100.0), (2000, 1000.0))

# ToMe, appendix: ViT-B/16 (AugReg) at r = 0, 2, … 16.
VIT_B_RS = tuple(range(0, 17, 2))
VIT_B_TOP1 = (84.57, 84.52, 84.39, 84.17, 83.94, 83.37, 82.86, 82.04, 80.38)
VIT_B_GMACS = (17.564, 16.45, 15.33, 14.21, 13.104, 12.01, 10.91, 9.83, 8.772)


@dataclass(frozen=True)
class Device:
    """What serves, and how long its clients wait."""

    name: str
    profile: Profile
    quality: tuple[float, ...]
    slo: float
    """Seconds."""
    seconds: float
    """How long to simulate."""

    @property
    def capacity(self) -> float:
        """Images a second at r = 0."""
        return self.profile.max_batch / self.profile.p50[-1][0]

    @property
    def policies(self) -> dict[str, str]:
        """The policies by what the table calls them."""
        return {
            DEFAULT: "price",
            BLIND: "fixed:0",
            "r=0": "fixed:0",
            "r_max": f"fixed:{self.profile.rs[-1]}",
            "max_acc": "max_accuracy",
            "max_batch": "max_batch",
            "slackfit": "slackfit",
        }


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    device: str
    load: float
    cv2: int
    mixed: bool

    def __str__(self) -> str:
        return f"{self.device:8}{self.load:>4.0%}  CV² {self.cv2}  {'mixed' if self.mixed else 'one'}"


@dataclass(frozen=True)
class Run:
    """What one policy, or the bound, reached on one seed."""

    accuracy: float
    attainment: float
    mean_r: float
    wasted: float


@dataclass(frozen=True)
class Row:
    """A cell and what each policy reached in it, seed by seed."""

    cell: Cell
    runs: dict[str, list[Run]]
    bound: list[float]

    @property
    def first(self) -> str:
        """The best of the others."""
        return max((name for name in self.runs if name != DEFAULT), key=self.accuracy)

    def accuracy(self, name: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(run.accuracy for run in self.runs[name])

    def ahead(self, name: str) -> tuple[float, float]:
        """Return how far the default is ahead of a policy, and the standard error of that: seed by seed, so paired."""
        pairs = zip(self.runs[DEFAULT], self.runs[name], strict=True)
        return _mean_and_error([one.accuracy - other.accuracy for one, other in pairs])

    @property
    def verdict(self) -> str:
        """Where the default stands: first, within noise of the first (two standard errors), near it, or behind."""
        ahead, error = self.ahead(self.first)
        if ahead >= 0:
            return "first"
        if ahead + 2 * error >= 0:
            return "noise"
        return "near" if ahead >= -NEAR else "BEHIND"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.picture and not importlib.util.find_spec("matplotlib"):
        sys.exit("--picture needs matplotlib: pip install 'tome-serving[plots]'")
    began = time.monotonic()
    if args.measure:
        _measure(args.threads)
    judged = {device.name: device for device in devices(args.quick)}
    cells = [
        Cell(name, load, cv2, mixed) for name in judged for mixed in (False, True) for load in LOADS for cv2 in CV2S
    ]
    rows = _run(cells, judged, 2 if args.quick else args.seeds, args.processes)
    decisions = [(waiting, decision_microseconds(waiting), target) for waiting, target in DECISIONS]
    document = _document(rows, decisions, time.monotonic() - began)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        _print_rows(rows)
        print("\n".join(["", *means_table(document), "", *document["summary"]]))
        print("\n".join([*_decision_lines(decisions), f"{document['seconds']:.0f} s", NOTE]))
    if args.picture:
        draw(document, args.picture)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the means against load; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="2 seeds of a quarter of the time: a tenth of the work")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a CPU")
    parser.add_argument("--measure", action="store_true", help=f"measure the bundled model, and write {STORED.name}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="with --measure (default: 1)")
    return parser


def devices(quick: bool = False) -> Iterator[Device]:
    """Yield what is simulated, for a quarter of the time if it is to be quick."""
    from tome_server.runtime.profile_store import read_profile

    share = 0.25 if quick else 1.0
    yield Device("gpu", _vit_b(0.0025, 0.001, 32), VIT_B_TOP1, 0.036, 8 * share)
    yield Device("cpu", _vit_b(0.004, 0.020, 16), VIT_B_TOP1, 0.360, 120 * share)
    levels = json.loads((BUNDLED / "fashion" / "quality.json").read_text())["levels"]
    yield Device("fashion", read_profile(STORED)[1], tuple(100 * level["top1"] for level in levels), 0.120, 60 * share)


def _vit_b(batch: float, image: float, largest: int) -> Profile:
    """Return the profile of a device that takes `batch` seconds, and `image` for each image at r = 0."""
    sizes = tuple(range(1, largest + 1))
    p50 = tuple(tuple(batch + image * size * macs / VIT_B_GMACS[0] for macs in VIT_B_GMACS) for size in sizes)
    # 1.034 is the 95th percentile of a batch's time where its standard deviation is 2 %.
    return Profile(sizes, VIT_B_RS, p50, tuple(tuple(1.034 * value for value in row) for row in p50))


def _measure(threads: int) -> None:
    """Measure the bundled model and store its profile."""
    # Before torch is imported: spinning threads cost more than they gain on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tome_server.config import ModelConfig, ServerConfig
    from tome_server.offline import profile_model
    from tome_server.runtime.profile_store import save_profile

    config = ServerConfig(models=(ModelConfig(dtype="float32"),), threads=threads)
    _, key, profile, _ = profile_model(config, budget=40, progress=sys.stderr.isatty())
    save_profile(STORED, key, profile)


def _run(cells: Sequence[Cell], devices: dict[str, Device], seeds: int, processes: int) -> list[Row]:
    tasks = [(cell, devices[cell.device], seed) for cell in cells for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
    rows = {cell: Row(cell, {name: [] for name in devices[cell.device].policies}, []) for cell in cells}
    # Spawned, so that it is the same on every system; workers import this module without torch.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap(run_cell, tasks)
        for cell, runs, bound in tqdm(done, total=len(tasks), unit="run", disable=not sys.stderr.isatty()):
            for name, run in runs.items():
                rows[cell].runs[name].append(run)
            rows[cell].bound.append(bound)
    return list(rows.values())


def run_cell(task: tuple[Cell, Device, int]) -> tuple[Cell, dict[str, Run], float]:
    """Let every policy serve the same requests."""
    cell, device, seed = task
    budgets = [device.slo * share for share in ((0.5, 1, 2) if cell.mixed else (1,))]
    arrivals = draw_arrivals(Steady(cell.load * device.capacity, device.seconds), budgets, cv2=cell.cv2, seed=seed)
    runs = {}
    for name, policy in device.policies.items():
        cluster = Cluster(device.profile, device.quality, partial(policy_named, policy), blind=name == BLIND)
        result = simulate(arrivals, cluster, seed=seed)
        runs[name] = Run(result.effective_accuracy, 100 * result.attainment, result.mean_r, 100 * result.wasted)
    return cell, runs, clairvoyant_bound(arrivals, device.profile, device.quality)


def decision_microseconds(waiting: int, decisions: int = 400) -> float:
    """Return the median time that the default policy takes for a decision while so many wait, all of it included."""
    profile = _vit_b(0.0025, 0.001, 32)
    image, top = profile.p50[-1][-1] / profile.max_batch, len(profile.rs) - 1
    scheduler: Scheduler[None] = Scheduler(Latency(profile), policy_named(DEFAULT, profile, VIT_B_TOP1))
    rng, now, missing, times = random.Random(0), 0.0, waiting, []
    for _ in range(decisions):
        for _ in range(missing):
            # Budgets that leave room for all who wait, so that none is given up.
            budget = rng.choice((1.5, 3.0, 6.0)) * waiting * image
            scheduler.arrived(now, budget)
            scheduler.submit(Waiting(None, now, now + budget, 0, top), now, now)
        began = time.perf_counter()
        decision = scheduler.next(now)
        times.append(time.perf_counter() - began)
        assert decision
        missing = len(decision.batch) + len(decision.shed)
        now += scheduler.latency.of_batch(decision.levels)
    return 1e6 * statistics.median(times)


def _summary(rows: Sequence[Row]) -> list[str]:
    """Return the verdict in sentences."""
    verdicts = [row.verdict for row in rows]
    lines = [
        f"{DEFAULT}: first in {verdicts.count('first')} of {len(rows)} cells, within noise (two standard errors) of "
        f"the first in {verdicts.count('noise')} more, within {NEAR} points in {verdicts.count('near')} more; "
        f"behind in {verdicts.count('BEHIND')}"
    ]
    margin, row = min(((row.ahead("r_max")[0], row) for row in rows), key=lambda pair: pair[0])
    lines.append(f"least margin over fixed r_max: {margin:+.2f} points ({row.cell})")
    busy = [row for row in rows if row.cell.load >= 1.2]
    for name in (BLIND, "r=0"):
        margin, row = min(((row.ahead(name)[0], row) for row in busy), key=lambda pair: pair[0])
        most = statistics.fmean(row.bound) - row.accuracy(name)
        lines.append(
            f"least margin over {name} at 120 % and up: {margin:+.2f} points ({row.cell}; the bound's is {most:+.2f})"
        )
    worst = sorted(rows, key=lambda row: row.ahead(row.first)[0])[:5]
    lines.append("worst cells, by how far the best other is ahead:")
    for row in worst:
        ahead, error = row.ahead(row.first)
        lines.append(f"  {row.cell}  {ahead:+.2f} ± {error:.2f} against {row.first}")
    gap = statistics.fmean(statistics.fmean(row.bound) - row.accuracy(DEFAULT) for row in rows)
    lines.append(f"mean distance to the clairvoyant bound: {gap:.2f} points")
    return lines


def _decision_lines(decisions: Sequence[tuple[int, float, float]]) -> list[str]:
    return [
        f"a decision with {waiting} waiting: {measured:.0f} µs, median (at most {target:.0f})"
        for waiting, measured, target in decisions
    ]


def _print_rows(rows: Sequence[Row]) -> None:
    names = list(rows[0].runs)
    print("effective accuracy in points ± standard error over seeds, and attainment in % below\n")
    print(f"{'device':8}load  CV²    SLO  " + "".join(f"{name:>15}" for name in names) + f"{'bound':>8}  verdict")
    for row in rows:
        accuracy = [_mean_and_error([run.accuracy for run in row.runs[name]]) for name in names]
        attainment = [statistics.fmean(run.attainment for run in row.runs[name]) for name in names]
        ahead = f"{row.ahead(row.first)[0]:+.2f} {row.first}"
        print(
            f"{row.cell!s:27}"
            + "".join(f"{mean:>8.2f} ± {error:4.2f}" for mean, error in accuracy)
            + f"{statistics.fmean(row.bound):>8.2f}  {row.verdict}, {ahead}"
        )
        print(" " * 27 + "".join(f"{share:>8.2f} %     " for share in attainment))


def _document(rows: Sequence[Row], decisions: Sequence[tuple[int, float, float]], seconds: float) -> dict[str, Any]:
    return {
        "note": NOTE,
        "seconds": round(seconds, 1),
        "summary": _summary(rows),
        "decision_microseconds": {str(waiting): round(measured, 1) for waiting, measured, _ in decisions},
        "cells": [
            {
                **asdict(row.cell),
                "verdict": row.verdict,
                "ahead_of_best_other": [row.first, *(round(value, 3) for value in row.ahead(row.first))],
                "bound": round(statistics.fmean(row.bound), 3),
                "policies": {name: _figures(runs) for name, runs in row.runs.items()},
            }
            for row in rows
        ],
    }


def means(document: Mapping[str, Any], device: str, load: float) -> dict[str, float]:
    """Return what each policy and the bound reached at a load, over all CV² and budgets."""
    cells = [cell for cell in document["cells"] if cell["device"] == device and cell["load"] == load]
    names = list(cells[0]["policies"])
    reached = {
        name: statistics.fmean(cell["policies"][name]["effective_accuracy"][0] for cell in cells) for name in names
    }
    return reached | {"bound": statistics.fmean(cell["bound"] for cell in cells)}


def means_table(document: Mapping[str, Any]) -> list[str]:
    """Return the means over CV² and budgets as lines of Markdown."""
    names = [*document["cells"][0]["policies"], "bound"]
    lines = [f"| device, load | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for device in dict.fromkeys(cell["device"] for cell in document["cells"]):
        for load in LOADS:
            reached = means(document, device, load)
            lines.append(f"| {device}, {load:.0%} | {' | '.join(f'{reached[name]:.1f}' for name in names)} |")
    return lines


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw the means over CV² and budgets against load."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    styles: dict[str, dict[str, Any]] = {DEFAULT: {"linewidth": 2.5}, "bound": {"color": "black", "linestyle": "--"}}
    devices = list(dict.fromkeys(cell["device"] for cell in document["cells"]))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, device in zip(figure.subplots(1, len(devices), squeeze=False)[0], devices, strict=True):
        reached = [means(document, device, load) for load in LOADS]
        for name in reached[0]:
            line = [values[name] for values in reached]
            axes.plot([100 * load for load in LOADS], line, marker=".", label=name, **styles.get(name, {}))
        axes.set_title(device)
        axes.set_xlabel("load, % of capacity at r = 0")
        axes.set_ylim(30, 95)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("effective accuracy, points")
    figure.axes[0].legend(fontsize=8, loc="lower left")
    # Text as text, and the same file from the same figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tome-serving"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _figures(runs: Sequence[Run]) -> dict[str, list[float] | float]:
    """Return means and, of accuracy and attainment, their standard errors."""
    return {
        "effective_accuracy": [round(value, 3) for value in _mean_and_error([run.accuracy for run in runs])],
        "attainment": [round(value, 3) for value in _mean_and_error([run.attainment for run in runs])],
        "mean_r": round(statistics.fmean(run.mean_r for run in runs), 2),
        "wasted": round(statistics.fmean(run.wasted for run in runs), 3),
    }


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


if __name__ == "__main__":
    main()
