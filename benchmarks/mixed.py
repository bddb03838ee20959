"""The time of batches whose images have different r: in one call, in one call for each r, and ideally.

For each mix of r values: `packed`, the batch in one call of the model; `split`, one call for each r; and `ideal`, the
mean, over the images, of the time of a whole batch of the image's r. All are timed in turn in one run. Ratios are
medians over the rounds, with their quartiles; below 1, the first is faster.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import benchmarks.environment  # noqa: F401  isort: skip  (before torch)

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.merging import integers, seconds
from tome_api.tables import table
from tome_server.merging import MergedModel, merge, pack, packable
from tome_server.models.loading import load
from tome_server.models.spec import BUNDLED_PREFIX, bundled_spec


@dataclass(frozen=True)
class Row:
    """One mix. Times in milliseconds, medians over the rounds; (low, median, high) are quartiles over the rounds."""

    mix: str
    rs: tuple[int, ...]
    packed_ms: float
    split_ms: float
    ideal_ms: float
    packed_over_split: tuple[float, float, float]
    packed_over_ideal: tuple[float, float, float]


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    merged, size = merged_model(args.model, device)
    images = torch.randn(args.batch, *size, device=device)
    with torch.inference_mode():
        rows = _measure(merged, images, sorted(args.r), args.rounds)
    setting = {
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": args.threads,
        "batch": args.batch,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("  ".join(f"{name} {value}" for name, value in setting.items()))
        _print_table(rows)


def merged_model(name: str, device: torch.device) -> tuple[MergedModel, tuple[int, int, int]]:
    """Return the model, of random weights unless it is a bundled one, and its input's [C, H, W]."""
    if name.startswith(BUNDLED_PREFIX):
        hosted = load(bundled_spec(name.removeprefix(BUNDLED_PREFIX)), device)
        return hosted.merged, hosted.info.preprocess.settings.input_size
    model = timm.create_model(name).to(device).eval().requires_grad_(False)
    merged = merge(model)
    return (pack(merged) if packable(merged) else merged), model.default_cfg["input_size"]


def _mixes(grid: Sequence[int], batch: int) -> dict[str, tuple[int, ...]]:
    """Return the r of each image of some batches: in no order, like the requests of a queue."""
    middle = len(grid) // 2
    chosen = {
        "one": grid[middle : middle + 1],
        "two, far apart": (grid[0], grid[-1]),
        "two neighbours": grid[middle - 1 : middle + 1],
        "four": grid[:: max(1, len(grid) // 4)][:4],
        "all": grid,
    }
    return {name: tuple(rs[i % len(rs)] for i in range(batch)) for name, rs in chosen.items()}


def _measure(merged: MergedModel, images: Tensor, grid: Sequence[int], rounds: int) -> list[Row]:
    mixes = _mixes(grid, len(images))
    uniform: dict[int, list[float]] = {r: [] for r in grid}
    packed: dict[str, list[float]] = {name: [] for name in mixes}
    split: dict[str, list[float]] = {name: [] for name in mixes}
    for round_ in tqdm(range(-1, rounds), unit="round", disable=not sys.stderr.isatty()):
        for r, times in uniform.items():
            times.append(seconds(lambda r=r: merged(images, r), 1))
        for name, rs in mixes.items():
            packed[name].append(seconds(lambda rs=rs: merged(images, rs), 1))
            split[name].append(seconds(lambda rs=rs: _split(merged, images, rs), 1))
        if round_ < 0:  # a warm-up
            for times in (*uniform.values(), *packed.values(), *split.values()):
                times.clear()

    rows = []
    for name, rs in mixes.items():
        ideal = [statistics.mean(uniform[r][i] for r in rs) for i in range(rounds)]
        rows.append(
            Row(
                mix=name,
                rs=rs,
                packed_ms=statistics.median(packed[name]) * 1e3,
                split_ms=statistics.median(split[name]) * 1e3,
                ideal_ms=statistics.median(ideal) * 1e3,
                packed_over_split=_quartiles(packed[name], split[name]),
                packed_over_ideal=_quartiles(packed[name], ideal),
            )
        )
    return rows


def _split(merged: MergedModel, images: Tensor, rs: Sequence[int]) -> None:
    for r in sorted(set(rs)):
        merged(images[[i for i, own in enumerate(rs) if own == r]], r)


def _quartiles(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return low, median, high


def _print_table(rows: Sequence[Row]) -> None:
    cells = []
    for row in rows:
        times = (row.packed_ms, row.split_ms, row.ideal_ms)
        ratios = (row.packed_over_split, row.packed_over_ideal)
        cells.append(
            (
                row.mix,
                ", ".join(map(str, row.rs)),
                *(f"{ms:.1f}" for ms in times),
                *(f"{median:.2f} ({low:.2f}-{high:.2f})" for low, median, high in ratios),
            )
        )
    header = ("mix", "r of the images", "packed ms", "split ms", "ideal ms", "packed/split", "packed/ideal")
    print(table(header, cells, right=range(2, len(header))))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__)
    parser.add_argument(
        "--model", default=f"{BUNDLED_PREFIX}fashion", help="bundled or timm name (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default: %(default)s)")
    parser.add_argument("--r", type=integers, default=list(range(0, 15, 2)), help="default: 0,2,4,6,8,10,12,14")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="timings of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
