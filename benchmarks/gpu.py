"""What a GPU makes of merging: ours by CUDA graphs, against timm's own model under torch.compile, in turn in one run.

For each batch size these sides, each timed once a round, all in turn:

- `timm`, and `timm compiled` (torch.compile, static shapes);
- `ours r`, launched kernel by kernel, and `graph r`, by a CUDA graph of it;
- `graph folded r`, with sizes folded into the keys, for FlashAttention, in place of a mask;
- `graph cudnn r`, with attention by cuDNN, where torch prefers that: timm's sides have what torch prefers, a server and
  all other sides of ours do without (`execution/choose_device.py` says why);
- `served r`: all that a server does for a batch, from bytes in host memory to classes, with graphs;
- `served ahead r`: the same, where another thread brings the next batch's images to the device meanwhile.

`ms` is the median over the rounds. `vs r = 0` is how many times faster a side is than the same at the first r in the
same round, `vs timm` than the faster of timm's two sides: median, and quartiles. Weights are random: they don't change
the time. On the CPU there are no graphs, and the rest can be tried out.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from timm.data import resolve_data_config
from tqdm import tqdm

from benchmarks.merging import integers, repeats, seconds
from tome_server.device.prefetch import Prefetcher
from tome_server.device.shared_images import SharedImages
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.cuda_graphs import CudaRecorder, GraphedModel
from tome_server.execution.executor import run_batch
from tome_server.merging import merge
from tome_server.merging.families.eva import fix_positions
from tome_server.models.loaded import LoadedModel, loaded_model
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings

Side = Callable[[], object]
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One side at one batch size; `low` and `high` are quartiles over the rounds."""

    batch: int
    side: str
    ms: float
    images_per_second: float
    vs_first: Spread | None
    """low, median, high of how many times faster it is than the same kind of side at the first r"""
    vs_timm: Spread
    """the same against the fastest side of timm's"""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    plain = timm.create_model(args.model).to(device, dtype).eval().requires_grad_(False)
    model, folded = (_loaded(plain, args.model, fold) for fold in (False, True))
    setting = {
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "timm": timm.__version__,
        "python": platform.python_version(),
        "rounds": args.rounds,
    }
    if not args.json:
        print("\n".join(f"{name}: {value}" for name, value in setting.items()) + "\n")
        print("| batch | side | ms | images/s | vs r = 0 | vs timm |\n|---|---|---|---|---|---|", flush=True)
    rows: list[Row] = []
    progress = tqdm(total=len(args.batch) * args.rounds, unit="round", disable=not sys.stderr.isatty())
    with torch.inference_mode(), progress:
        for batch in args.batch:
            sides = _sides(plain, model, folded, device, batch, args.r, args.compile)
            timed = _rows(batch, args.r[0], measure(sides, args.rounds, progress.update))
            rows += timed
            if not args.json:
                # As they come, so that a run that is cut short leaves those that it has.
                print("\n".join(map(_line, timed)), flush=True)
    if args.json:
        print(json.dumps({**setting, "rows": [asdict(row) for row in rows]}, indent=2))


def _loaded(plain: torch.nn.Module, name: str, fold_sizes: bool) -> LoadedModel:
    merged = merge(copy.deepcopy(plain), fold_sizes=fold_sizes)
    settings = ImageSettings.from_timm(resolve_data_config({}, model=plain))
    model = loaded_model(merged, Preprocess(settings, Limits()), name=name, architecture=name)
    fix_positions(merged.model, model.info.patch_grid)
    return model


def _sides(
    plain: torch.nn.Module,
    model: LoadedModel,
    folded: LoadedModel,
    device: torch.device,
    batch: int,
    rs: Sequence[int],
    mode: str,
) -> dict[str, Side]:
    shape = model.info.preprocess.settings.input_size
    pixels = torch.randint(256, (batch, *shape), dtype=torch.uint8)
    images = model.input(pixels, device)
    works = [BatchItem(each, Outputs(top_k=5)) for each in pixels]
    sides: dict[str, Side] = {"timm": partial(plain, images)}
    if mode != "none":
        compiled = partial(torch.compile(plain, mode=mode, dynamic=False), images)
        try:
            compiled()
            sides["timm compiled"] = compiled
        except Exception as error:
            # Without a compiler, the other sides can still be timed.
            print(f"timm compiled is left out: {error}".partition("\n")[0], file=sys.stderr)
    ours: dict[str, Side] = {f"ours {r}": partial(model.run, images, r) for r in rs}
    if device.type == "cuda":
        with _without_cudnn():
            kinds = {"graph": _graphs(model, images, rs), "graph folded": _graphs(folded, images, rs)}
        kinds["graph cudnn"] = _graphs(model, images, rs)
        for kind, graphs in kinds.items():
            if graphs is None:
                print(f"{kind} is left out for {batch} images: it can't be recorded", file=sys.stderr)
                continue
            ours |= {f"{kind} {r}": partial(graphs, images, r) for r in rs}
        model = replace(model, graphs=kinds["graph"])
    ours |= {f"served {r}": partial(run_batch, model, works, r, device) for r in rs}
    ours |= {f"served ahead {r}": _ahead(model, pixels, r, device) for r in rs}
    return sides | {name: _as_served(side) for name, side in ours.items()}


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Leave out cuDNN's attention, which `choose_device` does in a server."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _as_served(side: Side) -> Side:
    def run() -> object:
        with _without_cudnn():
            return side()

    return run


def _ahead(model: LoadedModel, pixels: torch.Tensor, r: int, device: torch.device) -> Side:
    """Return what runs batches of `pixels`, each of which was brought to the device while the one before ran."""
    batch = len(pixels)
    shared = SharedImages(pixels.shape[1:], 2 * batch)
    slots = [shared.put(each.numpy()) for each in (*pixels, *pixels)]
    turns = cycle((slots[:batch], slots[batch:]))
    uploads, thread = Prefetcher(shared.mapped, device), ThreadPoolExecutor(1)
    following = next(turns)

    def run() -> None:
        nonlocal following
        now, following = following, next(turns)
        works = [BatchItem(uploads.take(slot.place), Outputs(top_k=5)) for slot in now]
        bringing = [thread.submit(uploads.prefetch, slot.place) for slot in following]
        run_batch(model, works, r, device)
        for brought in bringing:
            brought.result()

    return run


def _graphs(model: LoadedModel, images: torch.Tensor, rs: Sequence[int]) -> GraphedModel | None:
    """Record batches like `images` at each r; None if one can't be, and the log says why."""
    graphs = GraphedModel(model.run, torch.zeros_like(images), CudaRecorder(images.device))
    graphs.record([len(images)], rs, sys.maxsize, nullcontext())
    return graphs if graphs.kinds == tuple((len(images), r) for r in sorted(rs)) else None


def measure(
    sides: Mapping[str, Side], rounds: int, done: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds a call of each side took in each round; in every other round in the opposite order."""
    for call in sides.values():
        seconds(call, 3)
    calls = {name: repeats(call) for name, call in sides.items()}
    took: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            took[name].append(seconds(sides[name], calls[name]))
        order.reverse()
        done()
    return took


def _rows(batch: int, first: int, took: Mapping[str, Sequence[float]]) -> list[Row]:
    timms = [values for name, values in took.items() if name.startswith("timm")]
    best = min(timms, key=statistics.median)
    rows = []
    for name, values in took.items():
        kind, _, r = name.rpartition(" ")
        of_first = took[f"{kind} {first}"] if r.isdigit() else None
        median = statistics.median(values)
        rows.append(
            Row(
                batch, name, median * 1e3, batch / median,
                vs_first=None if of_first is None else _spread(of_first, values),
                vs_timm=_spread(best, values),
            )
        )  # fmt: skip
    return rows


def _spread(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, median, high = statistics.quantiles(ratios, n=4)
    return low, median, high


def _line(row: Row) -> str:
    ratios = " | ".join(_shown(spread) for spread in (row.vs_first, row.vs_timm))
    return f"| {row.batch} | {row.side} | {row.ms:.3f} | {row.images_per_second:.0f} | {ratios} |"


def _shown(spread: Spread | None) -> str:
    return "" if spread is None else "{1:.2f} ({0:.2f}–{2:.2f})".format(*spread)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--batch", type=integers, default=[1, 8, 64], help="batch sizes (default: 1,8,64)")
    parser.add_argument("--r", type=integers, default=[0, 8, 13], help="default: 0,8,13; the first is compared with")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each side (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--compile", default="reduce-overhead", choices=["reduce-overhead", "max-autotune", "default", "none"],
        help="mode of torch.compile for timm's side; reduce-overhead has CUDA graphs too (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
