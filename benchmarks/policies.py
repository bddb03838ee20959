"""The default policy beside the published ones and the clairvoyant bound, in simulation, over a surface of cells.

A cell is a device (benchmarks/devices.py); a budget, in multiples k of one image's time at r = 0; a load, as a share of
what the device can do at r = 0 in its largest batches; the squared coefficient of variation of the gaps between
arrivals (gamma-distributed); and the classes of budgets, equally likely: one, two (k, 8 k) or three (k, 3 k, 8 k).

Every policy serves the same requests behind the same admission and the same shedding of requests that can't be met any
more; a batch takes what the profile says, give or take 2 %. Only `plain r=0` has neither: it knows of no deadlines, as
other servers don't. The figure is effective accuracy, in points: quality averaged over all requests, where one that is
not answered in time counts 0.

A cell is *behind* if another policy's mean is better by more than 0.3 points and two standard errors of the difference,
seed by seed. The error of two or three seeds is itself a guess, and among thousands of cells some look far behind by
chance. So every cell in which another policy leads by more than 0.3 points is run again on further seeds, and judged by
all its seeds, the first included.
"""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.devices import STORED, VIT_B_TOP1, Device, devices, vit_b_profile
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.policy.view import Policy
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler
from tome_server.simulation.bound import clairvoyant_bound
from tome_server.simulation.simulator import Cluster, simulate
from tome_server.simulation.workload import Arrival, Steady
from tome_server.simulation.workload import draw as draw_arrivals

NOTE = (
    "The default policy's constants were chosen on seed 1 of such cells; benchmarks/tune_policy.py tries others on "
    "budgets and loads between them. These figures are of seeds 200 and up, on which none was chosen."
)
KS = (2, 3, 4, 6, 8, 12, 20, 40)
LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
CV2S = (1, 4, 8)
# Of each number of classes, the budgets as multiples of the tightest.
CLASSES = {1: (1,), 2: (1, 8), 3: (1, 3, 8)}
FIRST_SEED = 200
DEFAULT = "price"
# r = 0 without admission, shedding or deadlines: first come first served, as servers do whose model has one cost.
BLIND = "plain r=0"
# Behind the first by no more than these points counts as being with it.
NEAR = 0.3
CONFIRM = 12
# Requests of a run; more where that is less than so many times the longest budget, up to a multiple. A shorter run ends
# before what a policy puts off is due.
REQUESTS, BUDGETS_LONG, MOST = 1500, 12.0, 12
# How many wait when decisions are timed, and the most they should take, in microseconds.
DECISIONS = ((100, 100.0), (2000, 1000.0))


@dataclass(frozen=True)
class Cell:
    """One point of the surface."""

    device: str
    k: float
    """The tightest budget, in multiples of one image's time at r = 0."""
    load: float
    cv2: int
    classes: int

    def __str__(self) -> str:
        return f"{self.device:8}{self.k:>4g} images{self.load:>6.0%}  CV² {self.cv2}  {self.classes} of budgets"


@dataclass(frozen=True)
class Run:
    """What one policy reached on one seed."""

    accuracy: float
    attainment: float
    mean_r: float
    mean_batch: float


@dataclass(frozen=True)
class Row:
    """A cell and what each policy, and the bound, reached in it, seed by seed."""

    cell: Cell
    runs: dict[str, list[Run]]
    bound: list[float]

    @property
    def first(self) -> str:
        """The best of the others that are behind the same admission."""
        return max((name for name in self.runs if name not in (DEFAULT, BLIND)), key=self.accuracy)

    def accuracy(self, name: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(run.accuracy for run in self.runs[name])

    def ahead(self, name: str) -> tuple[float, float]:
        """Return how far the default is ahead of a policy, and the standard error of that: seed by seed, so paired."""
        pairs = zip(self.runs[DEFAULT], self.runs[name], strict=True)
        return _mean_and_error([one.accuracy - other.accuracy for one, other in pairs])

    def extended(self, more: "Row") -> "Row":
        """Return the row with the seeds of another of the same cell added."""
        return Row(
            self.cell, {name: [*runs, *more.runs[name]] for name, runs in self.runs.items()}, self.bound + more.bound
        )

    @property
    def below(self) -> float:
        """How far the default is below the bound."""
        return statistics.fmean(self.bound) - self.accuracy(DEFAULT)

    @property
    def verdict(self) -> str:
        """Where the default stands: first, near the first (in points, or within noise), or behind."""
        ahead, error = self.ahead(self.first)
        if ahead >= 0:
            return "first"
        return "near" if ahead + 2 * error >= -NEAR else "BEHIND"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    if args.picture and not importlib.util.find_spec("matplotlib"):
        sys.exit("--picture needs matplotlib: pip install 'tome-serving[plots]'")
    began = time.monotonic()
    if args.measure:
        _measure(args.threads)
    cells = surface(quick=args.quick)
    seeds = args.seeds or (2 if args.quick else 3)
    rows = run(cells, range(FIRST_SEED, FIRST_SEED + seeds), args.processes)
    rows = confirmed(rows, args.confirm, args.processes)
    decisions = [(waiting, decision_microseconds(waiting), target) for waiting, target in DECISIONS]
    document = _document(rows, decisions, time.monotonic() - began)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        for by in ("device", "k", "load", "cv2", "classes"):
            print("\n".join([*means_table(document, by), ""]))
        print("\n".join(document["summary"]))
        print("\n".join([*_decision_lines(decisions), f"{document['seconds']:.0f} s", NOTE]))
    if args.picture:
        draw(document, args.picture)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON, cell by cell")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the surface; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="a tenth of the cells, 2 seeds")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many (default: 3)")
    parser.add_argument(
        "--confirm",
        type=int,
        default=CONFIRM,
        metavar="N",
        help=f"further seeds of doubtful cells (default: {CONFIRM})",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a CPU")
    parser.add_argument("--measure", action="store_true", help=f"measure the bundled model, and write {STORED.name}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="with --measure (default: 1)")
    return parser


def surface(*, quick: bool = False) -> list[Cell]:
    """Return the cells."""
    ks, loads, cv2s, classes = (KS, LOADS, CV2S, tuple(CLASSES))
    if quick:
        ks, loads, cv2s, classes = (2, 3, 4, 6, 12), (0.5, 0.8, 1.2, 2.0), (1, 4), (1, 2)
    cells = [
        Cell(device.name, k, load, cv2, many)
        for device in devices()
        for k in ks
        for load in loads
        for cv2 in cv2s
        for many in classes
    ]
    # Of a quick run, every other cell, like the squares of one colour.
    return [cell for place, cell in enumerate(cells) if not quick or sum(_digits(place, (2, 2, 4, 5))) % 2 == 0]


def _digits(place: int, bases: Sequence[int]) -> list[int]:
    digits = []
    for base in bases:
        place, digit = divmod(place, base)
        digits.append(digit)
    return [*digits, place]


def policies(device: Device) -> dict[str, str]:
    """Return the policies by what the tables call them."""
    return {
        DEFAULT: "price",
        BLIND: "fixed:0",
        "r=0": "fixed:0",
        "r_max": f"fixed:{device.profile.rs[-1]}",
        "max_acc": "max_accuracy",
        "max_batch": "max_batch",
        "slackfit": "slackfit",
    }


def run(cells: Iterable[Cell], seeds: Iterable[int], processes: int) -> list[Row]:
    """Return a row for each cell, with a run for each seed."""
    rows: dict[Cell, Row] = {}
    tasks = list(itertools.product(cells, seeds))
    # Spawned, so that it is the same on every system; workers import this module without torch.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap(run_cell, tasks, chunksize=4)
        for cell, runs, bound in tqdm(done, total=len(tasks), unit="run", disable=not sys.stderr.isatty()):
            row = rows.setdefault(cell, Row(cell, {name: [] for name in runs}, []))
            for name, one in runs.items():
                row.runs[name].append(one)
            row.bound.append(bound)
    return list(rows.values())


def confirmed(rows: Sequence[Row], further: int, processes: int) -> list[Row]:
    """Return the rows; those in which another policy leads by more than `NEAR` have `further` seeds added."""
    doubtful = {row.cell: row for row in rows if row.ahead(row.first)[0] < -NEAR}
    if not doubtful or not further:
        return list(rows)
    first = FIRST_SEED + len(rows[0].bound)
    added = {row.cell: row for row in run(doubtful, range(first, first + further), processes)}
    return [row.extended(added[row.cell]) if row.cell in added else row for row in rows]


def run_cell(task: tuple[Cell, int]) -> tuple[Cell, dict[str, Run], float]:
    """Let every policy serve the same requests."""
    cell, seed = task
    device = next(device for device in devices() if device.name == cell.device)
    arrivals = requests(cell, device, seed)
    runs = {
        name: serve(arrivals, device, partial(policy_named, policy), seed, blind=name == BLIND)
        for name, policy in policies(device).items()
    }
    return cell, runs, clairvoyant_bound(arrivals, device.profile, device.quality)


def requests(cell: Cell, device: Device, seed: int) -> list[Arrival]:
    """Return the requests of a run."""
    budgets = [cell.k * device.image * times for times in CLASSES[cell.classes]]
    rate = cell.load * device.capacity
    seconds = min(max(REQUESTS / rate, BUDGETS_LONG * max(budgets)), MOST * REQUESTS / rate)
    return draw_arrivals(Steady(rate, seconds), budgets, cv2=cell.cv2, seed=seed)


def serve(
    arrivals: Sequence[Arrival],
    device: Device,
    policy: Callable[[Profile, Sequence[float]], Policy],
    seed: int,
    *,
    blind: bool = False,
) -> Run:
    """Let one policy serve the requests."""
    result = simulate(arrivals, Cluster(device.profile, device.quality, policy, blind=blind), seed=seed)
    return Run(result.effective_accuracy, 100 * result.attainment, result.mean_r, result.mean_batch)


def _measure(threads: int) -> None:
    """Measure the bundled model and store its profile."""
    # Before torch is imported: spinning threads cost more than they gain on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tome_server.calibration.profile_store import save_profile
    from tome_server.cli.offline import Machine, profile_model
    from tome_server.models.spec import bundled_spec

    spec, machine = bundled_spec("fashion", "float32"), Machine(threads=threads)
    key, profile, _ = profile_model(spec, machine, budget=40, progress=sys.stderr.isatty())
    save_profile(STORED, key, profile)


def decision_microseconds(waiting: int, decisions: int = 400) -> float:
    """Return the median time that the default policy takes for a decision while so many wait, all of it included."""
    profile = vit_b_profile(32, lambda size, work: 0.0025 + 0.001 * size * work)
    image, top = profile.p50[-1][-1] / profile.max_batch, len(profile.rs) - 1
    scheduler: Scheduler[None] = Scheduler(Latency(profile), policy_named(DEFAULT, profile, VIT_B_TOP1))
    rng, now, missing, times = random.Random(0), 0.0, waiting, []
    for _ in range(decisions):
        for _ in range(missing):
            # Budgets that leave room for all queued requests, so that none is given up.
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


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the verdict in sentences."""
    verdicts = [row.verdict for row in rows]
    below, others = [row.below for row in rows], [row.below + row.ahead(row.first)[0] for row in rows]
    lines = [
        f"{DEFAULT}: first in {verdicts.count('first')} of {len(rows)} cells, near the first ({NEAR} points and two "
        f"standard errors) in {verdicts.count('near')} more; behind in {verdicts.count('BEHIND')}",
        f"mean distance to the clairvoyant bound: {statistics.fmean(below):.2f} points; "
        f"of the best other in each cell: {statistics.fmean(others):.2f}",
    ]
    for name in ("r_max", BLIND, "r=0"):
        margin, row = min(((row.ahead(name)[0], row) for row in rows), key=lambda pair: pair[0])
        lines.append(f"least margin over {name}: {margin:+.2f} points ({row.cell})")
    lines.append("worst cells, by how far the best other is ahead:")
    for row in sorted(rows, key=lambda row: row.ahead(row.first)[0])[:10]:
        ahead, error = row.ahead(row.first)
        lines.append(f"  {row.cell}  {ahead:+.2f} ± {error:.2f} against {row.first}: {row.verdict}")
    return lines


def _decision_lines(decisions: Sequence[tuple[int, float, float]]) -> list[str]:
    return [
        f"a decision with {waiting} waiting: {measured:.0f} µs, median (at most {target:.0f})"
        for waiting, measured, target in decisions
    ]


def _document(rows: Sequence[Row], decisions: Sequence[tuple[int, float, float]], seconds: float) -> dict[str, Any]:
    return {
        "note": NOTE,
        "seconds": round(seconds, 1),
        "summary": summary(rows),
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


def means(cells: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return what each policy and the bound reached in these cells, and in how many the default is behind."""
    cells = list(cells)
    reached = {
        name: statistics.fmean(cell["policies"][name]["effective_accuracy"][0] for cell in cells)
        for name in cells[0]["policies"]
    }
    bound = statistics.fmean(cell["bound"] for cell in cells)
    return reached | {"bound": bound, "behind": sum(cell["verdict"] == "BEHIND" for cell in cells)}


def means_table(document: Mapping[str, Any], by: str) -> list[str]:
    """Return the means for each value of one dimension of the surface as lines of Markdown."""
    names = [*document["cells"][0]["policies"], "bound"]
    lines = [f"| {by} | {' | '.join(names)} | cells behind |", "|---" * (len(names) + 2) + "|"]
    for value in dict.fromkeys(cell[by] for cell in document["cells"]):
        cells = [cell for cell in document["cells"] if cell[by] == value]
        reached = means(cells)
        figures = " | ".join(f"{reached[name]:.1f}" for name in names)
        lines.append(f"| {_label(by, value)} | {figures} | {reached['behind']:.0f} of {len(cells)} |")
    return lines


def _label(by: str, value: Any) -> str:
    return f"{value:.0%}" if by == "load" else str(value)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw budget against load for each device: how far the default is ahead of the best other, and below the bound."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cells = document["cells"]
    names, ks, loads = (list(dict.fromkeys(cell[by] for cell in cells)) for by in ("device", "k", "load"))
    ks, loads = sorted(ks), sorted(loads)
    panels: list[tuple[str, str, float, float, Callable[[Mapping[str, Any]], float]]] = [
        ("ahead of the best other", "RdBu", -10, 10, lambda cell: cell["ahead_of_best_other"][1]),
        ("below the bound", "YlOrRd", 0, 30, lambda cell: cell["bound"] - _accuracy(cell)),
    ]
    figure = Figure(figsize=(2.1 * len(names) + 1, 5.2), layout="constrained")
    grid = figure.subplots(len(panels), len(names), squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    for line, (title, colours, least, most, value) in zip(grid, panels, strict=True):
        for axes, name in zip(line, names, strict=True):
            table = [[_mean_of(cells, name, k, load, value) for load in loads] for k in ks]
            image = axes.imshow(table, cmap=colours, vmin=least, vmax=most, origin="lower", aspect="auto")
            for y, row in enumerate(table):
                for x, points in enumerate(row):
                    label = str(round(points)) if math.isfinite(points) else "-"
                    axes.text(x, y, label, ha="center", va="center", fontsize=6)
            axes.set_xticks(range(len(loads)), [f"{100 * load:.0f}" for load in loads], fontsize=6)
            axes.set_yticks(range(len(ks)), [f"{k:g}" for k in ks], fontsize=7)
        line[0].set_ylabel("budget, images", fontsize=8)
        figure.colorbar(image, ax=list(line), label=f"points {title}")
    figure.supxlabel("load, % of capacity at r = 0", fontsize=8)
    # Text as text, and the same file from the same figures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tome-serving"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _mean_of(
    cells: Iterable[Mapping[str, Any]], device: str, k: float, load: float, value: Callable[[Mapping[str, Any]], float]
) -> float:
    here = [value(cell) for cell in cells if (cell["device"], cell["k"], cell["load"]) == (device, k, load)]
    return statistics.fmean(here) if here else math.nan


def _accuracy(cell: Mapping[str, Any]) -> float:
    accuracy: float = cell["policies"][DEFAULT]["effective_accuracy"][0]
    return accuracy


def _figures(runs: Sequence[Run]) -> dict[str, list[float] | float]:
    """Return means and, of accuracy and attainment, their standard errors."""
    return {
        "effective_accuracy": [round(value, 3) for value in _mean_and_error([run.accuracy for run in runs])],
        "attainment": [round(value, 3) for value in _mean_and_error([run.attainment for run in runs])],
        "mean_r": round(statistics.fmean(run.mean_r for run in runs), 2),
        "mean_batch": round(statistics.fmean(run.mean_batch for run in runs), 2),
    }


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


if __name__ == "__main__":
    main()
