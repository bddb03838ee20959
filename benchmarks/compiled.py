"""What torch.compile would gain: our compiled forward pass, and timm's own, against ours as it is served.

For each batch size and r, in turn in one process: milliseconds a batch, and `gain` = time of ours as it is served over
the compiled one's, median of the rounds with its quartiles. `compiling` is the CPU time, in seconds, that it took
before the first batch could run, the C++ compiler's included; `MiB` what the process then held more. A graph is made
for one number of images and one r; `--freezing` folds the weights into it, packed for the processor. timm's own, which
doesn't merge, is at r = 0 alone.

Needs a C++ compiler. Minutes for each batch size and r.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import benchmarks.environment  # noqa: F401  isort: skip  (before torch)

import timm
import torch
from torch import Tensor

from benchmarks.merging import integers, repeats, seconds
from tome_server.merging import merge, pack, packable


@dataclass(frozen=True)
class Row:
    """One side at one batch size and r."""

    batch: int
    r: int
    side: str
    ms: float
    gain: float
    gain_quartiles: tuple[float, float]
    compiling: float | None = None
    mib: float | None = None


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    import torch._inductor.config as inductor

    inductor.freezing = args.freezing
    rows = []
    # A frozen graph can't be made in inference mode.
    with torch.no_grad() if args.freezing else torch.inference_mode():
        plain = timm.create_model(args.model).to(getattr(torch, args.dtype)).eval().requires_grad_(False)
        for batch in args.batch:
            for r in args.r:
                rows += _measure(plain, batch, r, args)
                if not args.json:
                    for row in rows[-3 if r == 0 else -2 :]:
                        print(_line(row), flush=True)
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        print(json.dumps({**setting, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}, indent=2))


def _measure(plain: torch.nn.Module, batch: int, r: int, args: argparse.Namespace) -> list[Row]:
    torch._dynamo.reset()
    images = torch.randn(batch, *plain.default_cfg["input_size"]).to(next(plain.parameters()))
    merged = merge(plain)
    served = pack(merged) if packable(merged) else merged
    sides: dict[str, Callable[[], object]] = {"served": lambda: served(images, r).logits}
    costs: dict[str, tuple[float, float]] = {}
    own = merge(copy.deepcopy(plain))

    def forward_merged(x: Tensor) -> Tensor:
        logits: Tensor = own(x, r).logits
        return logits

    forwards: dict[str, Callable[[Tensor], Tensor]] = {"compiled": forward_merged}
    if r == 0:
        forwards["timm, compiled"] = copy.deepcopy(plain)
    for name, forward in forwards.items():
        cpu, held = sum(os.times()[:4]), _resident()
        run = torch.compile(forward, dynamic=False)
        run(images)
        run(images)
        costs[name] = (sum(os.times()[:4]) - cpu, _resident() - held)
        sides[name] = lambda run=run: run(images)
    timings: dict[str, list[float]] = {name: [] for name in sides}
    calls = repeats(sides["served"])
    for _ in range(args.rounds):
        for name, call in sides.items():
            timings[name].append(seconds(call, calls))
    rows = []
    for name, took in timings.items():
        gains = [usual / one for usual, one in zip(timings["served"], took, strict=True)]
        low, middle, high = statistics.quantiles(gains, n=4)
        compiling, mib = costs.get(name, (None, None))
        rows.append(Row(batch, r, name, statistics.median(took) * 1e3, middle, (low, high), compiling, mib))
    return rows


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _line(row: Row) -> str:
    low, high = row.gain_quartiles
    cost = "" if row.compiling is None else f"   compiling {row.compiling:.0f} s, {row.mib:.0f} MiB"
    return (
        f"batch {row.batch}  r {row.r:>2}  {row.side:<15}{row.ms:>8.1f} ms  {row.gain:.2f} ({low:.2f}-{high:.2f}){cost}"
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--batch", type=integers, default=[1, 8], help="batch sizes (default: 1,8)")
    parser.add_argument("--r", type=integers, default=[0, 13], help="default: 0,13")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)d)")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side (default: %(default)d)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--freezing", action="store_true", help="fold the weights into each graph")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
