"""What merging costs in quality, against the work and the time that it leaves: ways of spreading it over the blocks.

For each r: r in every block (`constant`), falling to nothing with depth (`falling`), rising from nothing (`rising`);
with as much work, in all blocks but the first (`late`) and in all but the first third (`later`); and as the model's
quality report has it from `tome-server tune` (`tuned`).
`macs` are those of r = 0 taken as 1; so are `time 1` and `time 8`, the seconds that batches of one and of eight take,
medians of timings in turn in one run. `shifted` is the mean probability that goes to other classes than at r = 0, with
its standard error, `vs constant` by how much more that is than with r in every block, with that difference's own, image
by image; `agreement` the share of images given the class of r = 0.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import benchmarks.environment  # noqa: F401  isort: skip  (before torch)

import numpy as np
import torch
from tqdm import tqdm

from tome_api.tables import table
from tome_server.calibration.datasets import Dataset, load_labelled
from tome_server.calibration.evaluation import class_ids_of
from tome_server.merging import Schedule
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load
from tome_server.models.repository import Repository
from tome_server.models.spec import bundled_spec, in_dtype

CPU = torch.device("cpu")
BATCH = 16
BATCHES = (1, 8)
COLOURS = {
    "constant": "#777777",
    "falling": "#d08a2e",
    "rising": "#b3589a",
    "late": "#8fc1e3",
    "later": "#2b6cb0",
    "tuned": "#1a7f37",
}


@dataclass(frozen=True)
class Row:
    """One way of merging at one r."""

    way: str
    r: int
    macs: float
    times: Mapping[int, float]
    """By batch size, as shares of the time at r = 0."""
    shifted: float
    shifted_error: float
    difference: float
    """`shifted` minus that of r in every block, with its standard error."""
    difference_error: float
    agreement: float
    top1: float | None


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    spec = Repository(args.repository).spec(args.model) if args.repository else bundled_spec(args.model)
    model = load(in_dtype(spec, args.dtype) if spec.dtype == "auto" else spec, CPU)
    images = load_labelled(args.data)
    if args.limit and args.limit < len(images):
        chosen = np.random.default_rng(args.seed).permutation(len(images))[: args.limit]
        images = images.subset(sorted(chosen.tolist()))
    ways = ways_of(model, args.r or [r for r in model.info.rs if r])
    shown = sys.stderr.isatty()
    times = _times(model, ways, args.rounds, shown)
    rows = measured(model, images, ways, times, progress=shown)
    setting = {"model": args.model, "data": args.data.name, "images": len(images), "dtype": model.info.dtype,
               "threads": args.threads, "rounds": args.rounds, "torch": torch.__version__}  # fmt: skip
    if args.picture:
        draw(rows, f"{args.model} in {model.info.dtype}, {len(images):,} images", args.picture)
    if args.json:
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("  ".join(f"{name} {value}" for name, value in setting.items()))
        print(costs_table(rows))


def ways_of(model: LoadedModel, rs: Sequence[int]) -> dict[tuple[str, int], Schedule]:
    """Return the schedules to compare, by name and r; the first is r = 0."""
    ways = {("none", 0): Schedule.constant(0)}
    for r in rs:
        ways["constant", r] = Schedule.constant(r)
        ways["falling", r] = Schedule.linear(r)
        ways["rising", r] = Schedule.linear(r, 1.0)
        for name, start in (("late", 1), ("later", model.merged.depth // 3)):
            if schedule := starting_at(model, r, start):
                ways[name, r] = schedule
        if r in model.info.schedules:
            ways["tuned", r] = model.schedule(r)
    return ways


def starting_at(model: LoadedModel, r: int, start: int) -> Schedule | None:
    """Return the least r that merges in no block before `start` and takes no more work than `r` in every block.

    None if there is none.
    """
    return next(
        (
            schedule
            for more in range(r, model.info.largest_r + 1)
            if model.count(schedule := Schedule.constant(more, start=start)).total <= model.count(r).total
        ),
        None,
    )


@torch.inference_mode()
def _times(
    model: LoadedModel, ways: Mapping[tuple[str, int], Schedule], rounds: int, progress: bool
) -> dict[tuple[str, int], dict[int, float]]:
    taken: dict[tuple[str, int], dict[int, list[float]]] = {way: {size: [] for size in BATCHES} for way in ways}
    inputs = {size: torch.randn(size, *model.info.preprocess.settings.input_size) for size in BATCHES}
    for run in tqdm(range(rounds + 1), desc="timing", unit="round", disable=not progress):
        for size, batch in inputs.items():
            for way, schedule in ways.items():
                images = model.input(batch, CPU)
                start = time.perf_counter()
                model.merged(images, schedule)
                if run:  # the first warms up
                    taken[way][size].append(time.perf_counter() - start)
    medians = {way: {size: statistics.median(own) for size, own in sizes.items()} for way, sizes in taken.items()}
    whole = medians["none", 0]
    return {way: {size: own / whole[size] for size, own in sizes.items()} for way, sizes in medians.items()}


@torch.inference_mode()
def measured(
    model: LoadedModel,
    images: Dataset,
    ways: Mapping[tuple[str, int], Schedule],
    times: Mapping[tuple[str, int], Mapping[int, float]],
    *,
    progress: bool = False,
) -> list[Row]:
    """Run all images in all ways, and return one row for each."""
    class_ids = class_ids_of(model.info, images)
    # In one piece each: thousands of small ones among a forward's large ones would keep these from being given back.
    given = {way: torch.empty(len(images), model.info.num_classes) for way in ways}
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for start in range(0, len(images), BATCH):
            part = images.subset(range(start, min(start + BATCH, len(images))))
            prepared = np.stack([model.info.preprocess.image(image) for image, _ in part])
            inputs = model.input(torch.from_numpy(prepared), CPU)
            for way, schedule in ways.items():
                given[way][start : start + len(part)] = model.merged(inputs, schedule).logits.float().softmax(dim=1)
            bar.update(len(part))
    plain = given["none", 0]
    labels = None if images.labels is None else torch.tensor([class_ids[label] for label in images.labels])
    shifts = {way: (own - plain).abs().sum(dim=1) / 2 for way, own in given.items()}
    rows = []
    for (name, r), schedule in ways.items():
        shifted = shifts[name, r]
        difference = shifted - shifts.get(("constant", r), shifted)
        classes = given[name, r].argmax(dim=1)
        rows.append(
            Row(
                way=name,
                r=r,
                macs=model.count(schedule).total / model.count(0).total,
                times=times[name, r],
                shifted=float(shifted.mean()),
                shifted_error=float(shifted.std()) / len(images) ** 0.5,
                difference=float(difference.mean()),
                difference_error=float(difference.std()) / len(images) ** 0.5,
                agreement=float((classes == plain.argmax(dim=1)).float().mean()),
                top1=None if labels is None else float((classes == labels).float().mean()),
            )
        )
    return rows


def costs_table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    cells = [
        (
            f"{row.r}",
            row.way,
            f"{row.macs:.3f}",
            f"{row.times[1]:.3f}",
            f"{row.times[8]:.3f}",
            f"{row.shifted:.5f} ± {row.shifted_error:.5f}",
            "-" if row.way in ("none", "constant") else f"{row.difference:+.5f} ± {row.difference_error:.5f}",
            f"{row.agreement:.4f}",
            "-" if row.top1 is None else f"{row.top1:.4f}",
        )
        for row in rows
    ]
    header = ("r", "way", "macs", "time 1", "time 8", "shifted", "vs constant", "agreement", "top-1")
    return table(header, cells, right=(0, *range(2, len(header))))


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw what merging costs, in each way that it was measured, against work and against time, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    across: list[tuple[str, Callable[[Row], float]]] = [("multiply-accumulates left", lambda row: row.macs)]
    across += [(f"time of a batch of {size}", lambda row, size=size: row.times[size]) for size in BATCHES]
    down: list[tuple[str, Callable[[Row], float]]] = [
        ("probability shifted, points", lambda row: row.shifted),
        ("agreement with r = 0, %", lambda row: row.agreement),
    ]
    if all(row.top1 is not None for row in rows):
        down.append(("top-1, %", lambda row: row.top1 or 0.0))
    figure = Figure(figsize=(11, 0.5 + 3.2 * len(down)), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(down), len(across), sharex="col", sharey="row")
    none = [row for row in rows if not row.r]
    for line, (label, cost) in zip(panels, down, strict=True):
        for axes, (_, value) in zip(line, across, strict=True):
            for way, colour in COLOURS.items():
                own = none + sorted((row for row in rows if row.way == way), key=lambda row: row.r)
                if len(own) > len(none):
                    axes.plot(
                        [100 * value(row) for row in own], [100 * cost(row) for row in own], marker="o", markersize=4,
                        color=colour, label=way,
                    )  # fmt: skip
            axes.grid(color="#dddddd")
        line[0].set_ylabel(label)
    for axes, (label, _) in zip(panels[-1], across, strict=True):
        axes.set_xlabel(f"{label}, % of r = 0")
    panels[0][0].legend(frameon=False)
    figure.savefig(path)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pareto", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion", help="a bundled model, or one of --repository (default: fashion)")
    parser.add_argument("--repository", type=Path, help="folder of models, as `tome-server serve` takes it")
    parser.add_argument("--data", type=Path, required=True, help="images, as of tome-server evaluate")
    parser.add_argument("--limit", type=int, metavar="N", help="only N images, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    parser.add_argument("--r", type=lambda text: [int(r) for r in text.split(",")], help="default: the model's grid")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of a model whose own is auto"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=11, help="timings of each way (default: 11)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to draw it: .svg")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
