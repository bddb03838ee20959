"""How much of the saved work becomes saved time: the merged model against timm's own, timed in turn in one run.

For each batch size, thread count and r: `mac_ratio` (multiply-accumulates of the unmerged model over the merged),
`speedup` (time of timm's model over ours, median of the rounds) and `efficiency` = speedup / mac_ratio, with the
quartiles over the rounds. Weights are random: they don't change the time.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import benchmarks.environment  # noqa: F401  isort: skip  (before torch)

import timm
import torch
from tqdm import tqdm

from tome_api.tables import table
from tome_server.merging import macs, merge, pack, packable


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds a batch; (low, high) are quartiles over the rounds."""

    threads: int
    batch: int
    r: int
    mac_ratio: float
    timm_ms: float
    merged_ms: float
    speedup: float
    efficiency: float
    efficiency_quartiles: tuple[float, float]


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    device = torch.device(args.device)
    plain: torch.nn.Module = timm.create_model(args.model).to(device).eval().requires_grad_(False)
    ours = copy.deepcopy(plain).to(getattr(torch, args.dtype))
    plain = plain.to(getattr(torch, args.timm_dtype or args.dtype))
    rows: list[Row] = []
    settings = [(threads, batch) for threads in args.threads for batch in args.batch]
    progress = tqdm(total=len(settings) * args.rounds, unit="round", disable=not sys.stderr.isatty())
    with torch.inference_mode(), progress:
        for threads, batch in settings:
            torch.set_num_threads(threads)
            rows += _measure(plain, ours, threads, batch, args.r, args.rounds, progress)
    setting = {
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": args.dtype,
        "timm dtype": args.timm_dtype or args.dtype,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("  ".join(f"{name} {value}" for name, value in setting.items()))
        _print_table(rows)


def _measure(
    model: torch.nn.Module,
    ours: torch.nn.Module,
    threads: int,
    batch: int,
    grid: Sequence[int],
    rounds: int,
    progress: "tqdm[None]",
) -> list[Row]:
    images = torch.randn(batch, *model.default_cfg["input_size"]).to(next(model.parameters()))
    our_images = images.to(next(ours.parameters()))
    merged = merge(ours)
    if packable(merged):
        merged = pack(merged)
    # timm's own model is timed beside each r, so that both sides of a ratio saw the same machine.
    pairs: dict[int, tuple[list[float], list[float]]] = {r: ([], []) for r in grid}
    for r in grid:
        seconds(lambda: model(images), 2)
        seconds(lambda r=r: merged(our_images, r=r), 2)
    calls = repeats(lambda: model(images))
    for _ in range(rounds):
        for r, (theirs_took, ours_took) in pairs.items():
            theirs_took.append(seconds(lambda: model(images), calls))
            ours_took.append(seconds(lambda r=r: merged(our_images, r=r), calls))
        progress.update()

    rows = []
    for r, (theirs_took, ours_took) in pairs.items():
        ratio = macs(model, r).ratio
        speedups = [theirs / own for theirs, own in zip(theirs_took, ours_took, strict=True)]
        low, _, high = statistics.quantiles([s / ratio for s in speedups], n=4)
        speedup = statistics.median(speedups)
        rows.append(
            Row(
                threads=threads,
                batch=batch,
                r=r,
                mac_ratio=ratio,
                timm_ms=statistics.median(theirs_took) * 1e3,
                merged_ms=statistics.median(ours_took) * 1e3,
                speedup=speedup,
                efficiency=speedup / ratio,
                efficiency_quartiles=(low, high),
            )
        )
    return rows


def seconds(call: Callable[[], object], times: int) -> float:
    """Seconds a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def repeats(call: Callable[[], object], least: float = 0.1) -> int:
    """How many calls take at least `least` seconds together, so that the clock's noise is small."""
    return max(1, round(least / seconds(call, 2)))


def _print_table(rows: Sequence[Row]) -> None:
    cells = []
    for row in rows:
        low, high = row.efficiency_quartiles
        cells.append(
            (
                *(f"{value}" for value in (row.threads, row.batch, row.r)),
                f"{row.mac_ratio:.3f}",
                f"{row.timm_ms:.1f}",
                f"{row.merged_ms:.1f}",
                f"{row.speedup:.3f}",
                f"{row.efficiency:.3f}",
                f"{low:.3f}-{high:.3f}",
            )
        )
    header = ("threads", "batch", "r", "mac_ratio", "timm ms", "merged ms", "speedup", "efficiency", "quartiles")
    print(table(header, cells, right=range(len(header))))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--batch", type=integers, default=[1, 8], help="batch sizes (default: 1,8)")
    parser.add_argument("--r", type=integers, default=[0, 8, 13, 16], help="default: 0,8,13,16")
    parser.add_argument("--threads", type=integers, default=[1, 2], help="CPU threads (default: 1,2)")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each pair (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--timm-dtype", choices=["float32", "bfloat16", "float16"], help="of timm's side, if another")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
