"""Measures how long batches take on a device, by batch size and r, and how batches of several r are best run."""

import logging
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from tome_server.calibration.cpu_load import LoadMeter
from tome_server.execution.batch import BatchItem, BatchResult, Outputs
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel
from tome_server.scheduling.measured import LEAST_ROUNDS, Measured
from tome_server.scheduling.profile import Profile

T = TypeVar("T")

log = logging.getLogger(__name__)

# More rounds change little.
MOST_ROUNDS = 15
# Seconds of running single images to see how busy the machine is.
TRIAL = 0.5
PROMISE = 0.95
# The least ratio of the 95th percentile to the median: a few rounds, or a machine at rest, show too little of it.
LEAST_SPREAD = 1.05
# How many batches before and after one show how fast the machine was at that time.
_NEIGHBOURS = 4
_SETTLED = 5


class Run(Protocol):
    """Runs a batch and measures how long it takes, like `run_batch`."""

    def __call__(
        self,
        model: LoadedModel,
        batch: Sequence[BatchItem[Tensor]],
        rs: int | Sequence[int],
        device: torch.device,
        *,
        packed: bool,
    ) -> BatchResult:
        """Run `batch` in the calling thread."""


@dataclass(frozen=True)
class _Kind:
    """A batch to time."""

    rs: tuple[int, ...]
    """One for each image."""
    packed: bool = True


# One image without merging.
_ALONE = _Kind((0,))


class _Timing(NamedTuple):
    kind: _Kind
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """The batches to time; all others are interpolated."""

    sizes: tuple[int, ...]
    rs: tuple[int, ...]
    mixes: tuple[tuple[int, ...], ...]
    """Batches of several r, each of which is run packed and split."""

    @property
    def kinds(self) -> list[_Kind]:
        uniform = [_Kind((r,) * size) for size in self.sizes for r in self.rs]
        return uniform + [_Kind(mix, packed) for mix in self.mixes for packed in (True, False)]


def measure(
    model: LoadedModel,
    device: torch.device,
    *,
    max_batch: int,
    budget: float,
    progress: bool = False,
    run: Run = run_batch,
    stop: threading.Event | None = None,
) -> Profile:
    """Time batches of a model, of the sizes that `batch_sizes` gives and at each r of its grid.

    If the budget doesn't suffice for three rounds of all batches, fewer are timed, and the others interpolated in
    proportion to their operations. One image at both ends of the grid is timed in any case, however long that takes; if
    there is no time for larger batches, a batch is assumed to take as many times as long as it has images. The
    profile's `measured` tells which.

    Blocks. The batches run in a thread of its own, with as many torch threads as were set last.

    Args:
        model: The model, on `device`.
        device: Where it runs.
        max_batch: The largest batch to predict.
        budget: The most seconds to take, apart from the batch that runs then. It takes less if more would change
            little.
        progress: Whether to show a progress bar.
        run: Runs a batch.
        stop: Ends the measurement at the next batch once it is set.

    Raises:
        InterruptedError: If `stop` is set.
        Exception: What the model raises.
    """
    stop = stop or threading.Event()
    return _in_thread(partial(_measure, model, device, max_batch, budget, progress, run, stop), stop)


def load_of_single_images(model: LoadedModel, device: torch.device, *, run: Run, stop: threading.Event) -> float | None:
    """Run single images for half a second, and return the share of that time for which they waited for a CPU.

    None if the kernel doesn't say. Blocks, and raises the same errors as `measure`.
    """
    return _in_thread(partial(_load, _timer(model, device, run, stop)), stop)


def batch_sizes(max_batch: int, *, shared: bool = False) -> tuple[int, ...]:
    """Return the sizes of batches to time: the powers of two below `max_batch`, and `max_batch`.

    If threads share the images of a batch (`shared`), one image more than a power of two is an additional size: some
    thread then has an image more than the others, so that the latency isn't between those of the sizes around it.
    """
    powers = {2**i for i in range((max_batch - 1).bit_length())}
    odd = {size + 1 for size in powers if size > 1} if shared else set[int]()
    return tuple(sorted(size for size in powers | odd | {max_batch} if size <= max_batch))


def monotone(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return `table` with each value lowered to the least value to its left and below: rows fall and columns rise.

    Merging a little can cost a small batch more than it saves. An r that takes longer than a lesser one isn't worth
    choosing, so its prediction matters little. That of r = 0, which matters most, stays as measured.
    """
    rows = [list(accumulate(row, min)) for row in table]
    columns = [list(accumulate(column[::-1], min))[::-1] for column in _turned(rows)]
    return _turned(columns)


def _in_thread(call: Callable[[], T], stop: threading.Event) -> T:
    """Return what `call` returns, which runs in a thread of its own."""
    with ThreadPoolExecutor(1, thread_name_prefix="profile") as thread:
        try:
            return thread.submit(call).result()
        except BaseException:  # KeyboardInterrupt, which only the waiting thread gets
            stop.set()
            raise


def _load(timed: Callable[[_Kind], float]) -> float | None:
    load, end = LoadMeter(), time.perf_counter() + TRIAL
    timed(_ALONE)
    while time.perf_counter() < end:
        timed(_ALONE)
    return load.share()


def _measure(
    model: LoadedModel,
    device: torch.device,
    max_batch: int,
    budget: float,
    progress: bool,
    run: Run,
    stop: threading.Event,
) -> Profile:
    load, end = LoadMeter(), time.perf_counter() + budget
    began = end - budget

    def left() -> float:
        return end - time.perf_counter()

    timed = _timer(model, device, run, stop)
    one = timed(_ALONE)
    for _ in range(3):
        if left() > 0:
            one = min(one, timed(_ALONE))
    parts = _parts(_plan(model, max_batch, lambda kind: one * _share(model, kind.rs), budget), max_batch)
    kinds, least = list(dict.fromkeys(kind for part in parts for kind in part.kinds)), parts[0].kinds
    timings = list[_Timing]()
    with tqdm(total=(1 + MOST_ROUNDS) * len(kinds), unit="batch", disable=not progress) as bar:

        def once(kind: _Kind) -> _Timing:
            bar.update()
            return _Timing(kind, timed(kind))

        # The most important kinds come first, since time may be up before the first round is over.
        for kind in kinds:
            if left() > 0:
                once(kind)  # kernels are made at first use
            if left() > 0 or kind in least:
                timings.append(once(kind))
            else:
                break
        plan = _affordable(parts, dict(timings), left())
        kinds = [kind for kind in kinds if kind in plan.kinds]
        order, rounds = random.Random(0), 1
        took = sum(seconds for kind, seconds in timings if kind in kinds)
        while rounds < MOST_ROUNDS and left() > (took if rounds >= LEAST_ROUNDS else 0):
            bar.total = bar.n + min(MOST_ROUNDS - rounds, max(1, int(left() / took))) * len(kinds)
            # Every second round runs backwards, so that a machine that slows down treats all kinds alike. The others
            # are shuffled, since a batch is judged against its neighbours, which should be others each time.
            if rounds % 2 == 1:
                kinds.reverse()
            else:
                order.shuffle(kinds)
            started, before = time.perf_counter(), len(timings)
            timings += (once(kind) for kind in kinds if left() > 0)
            if len(timings) - before < len(kinds):
                break
            took, rounds = time.perf_counter() - started, rounds + 1
        bar.total = bar.n
    seconds = time.perf_counter() - began
    log.info("timed %d rounds of %d kinds of batch of %s in %.1f s", rounds, len(kinds), model.info.name, seconds)
    return _profile(model, max_batch, plan, [each for each in timings if each.kind in kinds], rounds, load.share())


def _timer(model: LoadedModel, device: torch.device, run: Run, stop: threading.Event) -> Callable[[_Kind], float]:
    """Return a function that runs a batch and returns its seconds, and raises InterruptedError once `stop` is set."""
    image = torch.randint(256, model.info.preprocess.settings.input_size, dtype=torch.uint8)
    work = BatchItem(image, Outputs(top_k=min(5, model.info.num_classes)))

    def timed(kind: _Kind) -> float:
        if stop.is_set():
            raise InterruptedError
        return run(model, [work] * len(kind.rs), kind.rs, device, packed=kind.packed).seconds

    return timed


def _plan(model: LoadedModel, max_batch: int, cost: Callable[[_Kind], float], budget: float) -> _Plan:
    """Return the most complete plan that `budget` seconds should suffice for, including a round to warm up."""
    sizes, rs = _sizes(model, max_batch), tuple(level.r for level in model.info.grid)
    ends = tuple(sorted({1, max_batch}))
    halves, four = _mixes(max_batch, rs)
    plans = [
        _Plan(sizes, rs, halves + four),
        _Plan(sizes, _some(rs, (len(rs) + 2) // 2), halves + four),
        _Plan(ends, _some(rs, 3), halves),
        _Plan(ends, _some(rs, 2), halves),
    ]
    for plan in plans[:-1]:
        if (1 + LEAST_ROUNDS) * sum(map(cost, plan.kinds)) <= budget:
            return plan
    return plans[-1]


def _parts(plan: _Plan, max_batch: int) -> list[_Plan]:
    """Return ever larger parts of a plan, of which the last is all of it, for a machine that is too slow for that."""
    ends, halves = tuple(sorted({1, max_batch})), plan.mixes[:1]
    parts = [
        _Plan((1,), _some(plan.rs, 2), ()),
        _Plan(ends, _some(plan.rs, 2), ()),
        _Plan(ends, _some(plan.rs, 2), halves),
        _Plan(ends, _some(plan.rs, 3), halves),
        _Plan(ends, plan.rs, halves),
        plan,
    ]
    return list(dict.fromkeys(parts))


def _affordable(parts: Sequence[_Plan], took: dict[_Kind, float], left: float) -> _Plan:
    """Return the largest of `parts` that was timed once and can be timed `LEAST_ROUNDS` times in the seconds left.

    If there is none, return the smallest part that was timed with a batch of several images, or else of one.
    """
    timed = [part for part in parts if all(kind in took for kind in part.kinds)]
    for part in reversed(timed[1:]):
        if (LEAST_ROUNDS - 1) * sum(took[kind] for kind in part.kinds) <= left:
            return part
    return timed[:2][-1]


def _sizes(model: LoadedModel, max_batch: int) -> tuple[int, ...]:
    return batch_sizes(max_batch, shared=bool(model.merged.division))


def _mixes(size: int, rs: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return a batch of two r and one of four, if size and grid allow them."""
    halves = (rs[0],) * (size - size // 2) + (rs[-1],) * (size // 2)
    four = tuple(_some(rs, 4)[i * 4 // size] for i in range(size)) if size >= 4 and len(rs) >= 4 else ()
    return ((halves,) if size > 1 and len(rs) > 1 else ()), ((four,) if four else ())


def _some(rs: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return up to `count` of `rs`, about evenly spaced, with the first and the last."""
    last, steps = len(rs) - 1, max(1, count - 1)
    return tuple(rs[i] for i in sorted({round(step * last / steps) for step in range(steps + 1)}))


def _share(model: LoadedModel, rs: Sequence[int]) -> float:
    """Return the operations of a batch in units of one image at r = 0, without those of merging itself."""
    return sum(model.info.cost(r).merged for r in rs) / model.info.cost(0).merged


def _profile(
    model: LoadedModel, max_batch: int, plan: _Plan, timings: Sequence[_Timing], rounds: int, load: float | None
) -> Profile:
    """Return the profile that follows from timings: how kinds of batch compare, their medians and 95th percentiles.

    The level of the medians and the spread are taken from all kinds together, since a few rounds don't show them for
    each.
    """
    sizes, rs = _sizes(model, max_batch), tuple(level.r for level in model.info.grid)
    usual = _usual_seconds(timings)
    measured = [[usual[_Kind((r,) * size)] for r in plan.rs] for size in plan.sizes]
    costs = [_share(model, (r,)) for r in reversed(plan.rs)]  # reversed, so that they rise
    every_r = [[_interpolate(_share(model, (r,)), costs, row[::-1]) for r in rs] for row in measured]
    known = plan.sizes
    if extrapolated := known[-1] < max_batch:
        known, every_r = (1, max_batch), [every_r[0], [max_batch * seconds for seconds in every_r[0]]]
    every_size = [[_interpolate(size, known, column) for size in sizes] for column in _turned(every_r)]
    table = monotone(_turned(every_size))
    predicted = {_Kind((r,) * size): table[i][j] for i, size in enumerate(sizes) for j, r in enumerate(rs)}
    uniform = [timing for timing in timings if timing.kind in predicted]
    level = statistics.median(seconds / predicted[kind] for kind, seconds in uniform)
    scatter = sorted(seconds / usual[kind] for kind, seconds in uniform)
    scattered = scatter[int(PROMISE * len(scatter))] / statistics.median(scatter)
    spread = max(LEAST_SPREAD, scattered)
    return Profile(
        sizes=sizes,
        rs=rs,
        p50=tuple(tuple(value * level for value in row) for row in table),
        p95=tuple(tuple(value * level * spread for value in row) for row in table),
        extra_group=_extra_group(plan, usual, predicted) * level,
        one_call=sum(usual[_Kind(mix)] for mix in plan.mixes) <= sum(usual[_Kind(mix, False)] for mix in plan.mixes),
        measured=Measured(rounds, load, scattered, extrapolated),
    )


def _usual_seconds(timings: Sequence[_Timing]) -> dict[_Kind, float]:
    """Return the seconds of each kind of batch as if the speed of the machine hadn't changed meanwhile.

    Other work on a machine slows down many batches in a row, and seldom all kinds alike. So each timing is divided by
    how slow the machine was at that time: the median, over its neighbours, of their seconds relative to what they
    usually take. Each of the two follows from the other, and a few iterations settle both.
    """
    logs = [math.log(seconds) for _, seconds in timings]
    places: dict[_Kind, list[int]] = {}
    for place, (kind, _) in enumerate(timings):
        places.setdefault(kind, []).append(place)
    usual = {kind: min(logs[place] for place in own) for kind, own in places.items()}
    for _ in range(_SETTLED):
        slow = [log - usual[kind] for log, (kind, _) in zip(logs, timings, strict=True)]
        around = [
            statistics.median(slow[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]) for place in range(len(logs))
        ]
        usual = {kind: statistics.median(logs[place] - around[place] for place in own) for kind, own in places.items()}
    return {kind: math.exp(log) for kind, log in usual.items()}


def _extra_group(plan: _Plan, usual: dict[_Kind, float], predicted: dict[_Kind, float]) -> float:
    """Return the seconds that each additional r in a batch costs, fitted to the packed mixes."""
    if not plan.mixes:
        return 0.0
    further = [len(set(mix)) - 1 for mix in plan.mixes]
    more = [usual[_Kind(mix)] - statistics.fmean(predicted[_Kind((r,) * len(mix))] for r in mix) for mix in plan.mixes]
    return max(0.0, sum(n * m for n, m in zip(further, more, strict=True)) / sum(n * n for n in further))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at `x`, interpolated linearly. `xs` must rise, and `x` lie within them."""
    above = next(i for i, known in enumerate(xs) if known >= x)
    if xs[above] == x:
        return ys[above]
    share = (x - xs[above - 1]) / (xs[above] - xs[above - 1])
    return ys[above - 1] + share * (ys[above] - ys[above - 1])


def _turned(table: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*table, strict=True)]
