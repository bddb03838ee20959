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

# Beyond these, further rounds change little.
MOST_ROUNDS = 15
# Seconds for which single images show how busy the machine is.
TRIAL = 0.5
PROMISE = 0.95
# The 95th percentile is at least so many medians: what a few rounds, or a machine at rest, show too little of.
LEAST_SPREAD = 1.05
# Batches before and after one that show how fast the machine was meanwhile.
_NEIGHBOURS = 4
_SETTLED = 5


class Run(Protocol):
    """Runs a batch at one r, or at one for each image, and says how long it took; `run_batch` is the real one."""

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


# One image as the model is without merging.
_ALONE = _Kind((0,))


class _Timing(NamedTuple):
    kind: _Kind
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """What is to be timed; what isn't is interpolated."""

    sizes: tuple[int, ...]
    rs: tuple[int, ...]
    mixes: tuple[tuple[int, ...], ...]
    """Batches of several r, each to be run packed and split."""

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
    """Time batches of `model` of the sizes that `batch_sizes` gives, at each r of its grid.

    Takes at most `budget` seconds and what is left of the batch that runs then; less once more would change little.
    Where that isn't enough for three rounds of all, it times fewer batches and interpolates between them, in proportion
    to the operations. At the least it times one image at both ends of the grid, however long that takes; where there is
    no time for larger batches, each is taken to cost as many times one image. What the profile says of how it was
    `measured` tells.
    Blocks; runs in a thread of its own, with as many torch threads as were set last. Raises what the model raises, and
    InterruptedError at the next batch once `stop` is set.
    """
    stop = stop or threading.Event()
    return _in_thread(partial(_measure, model, device, max_batch, budget, progress, run, stop), stop)


def load_of_single_images(model: LoadedModel, device: torch.device, *, run: Run, stop: threading.Event) -> float | None:
    """Return how busy the machine is: the share of the time that single images wait for a CPU in the next half second.

    None where the kernel doesn't say. Blocks and raises as `measure` does.
    """
    return _in_thread(partial(_load, _timer(model, device, run, stop)), stop)


def batch_sizes(max_batch: int, *, shared: bool = False) -> tuple[int, ...]:
    """Return the powers of two below `max_batch`, and that.

    Where threads share a batch's images out, what one image more than a power of two takes is not between the two
    sizes around it: some thread has one more. Those sizes are given as well.
    """
    powers = {2**i for i in range((max_batch - 1).bit_length())}
    odd = {size + 1 for size in powers if size > 1} if shared else set[int]()
    return tuple(sorted(size for size in powers | odd | {max_batch} if size <= max_batch))


def monotone(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return `table` with each value lowered to the least of those to its left and below: rows fall and columns rise.

    Merging a little can cost a small batch more than it saves. What then costs more than a lesser r is not worth
    choosing, so that its own prediction matters little; that of r = 0, the most wanted, stays as measured.
    """
    rows = [list(accumulate(row, min)) for row in table]
    columns = [list(accumulate(column[::-1], min))[::-1] for column in _turned(rows)]
    return _turned(columns)


def _in_thread(call: Callable[[], T], stop: threading.Event) -> T:
    """Return what `call` returns in a thread of its own."""
    with ThreadPoolExecutor(1, thread_name_prefix="profile") as thread:
        try:
            return thread.submit(call).result()
        except BaseException:  # an interrupt, which only the waiting thread gets
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

        # What is needed most comes first, since time may be up before the first round is over.
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
            # There and back again, so that a machine that slows down meanwhile wrongs none; and each time among others,
            # since it is against its neighbours that a batch is judged.
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
    """Return a function that runs a batch and returns the seconds it took. Raises InterruptedError if `stop` is set."""
    image = torch.randint(256, model.info.preprocess.settings.input_size, dtype=torch.uint8)
    work = BatchItem(image, Outputs(top_k=min(5, model.info.num_classes)))

    def timed(kind: _Kind) -> float:
        if stop.is_set():
            raise InterruptedError
        rs = kind.rs[0] if len(set(kind.rs)) == 1 else kind.rs
        return run(model, [work] * len(kind.rs), rs, device, packed=kind.packed).seconds

    return timed


def _plan(model: LoadedModel, max_batch: int, cost: Callable[[_Kind], float], budget: float) -> _Plan:
    """Return the most complete plan for which `budget` seconds should do, a round to warm up included."""
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
    """Return plans within `plan`, each a part of the next and the last all of it, for a machine that is too slow."""
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
    """Return the largest of `parts` that was timed once, and can be for the least rounds in the seconds that are left.

    Where there is time for that with none, the least that says what a batch of several images costs.
    """
    timed = [part for part in parts if all(kind in took for kind in part.kinds)]
    for part in reversed(timed[1:]):
        if (LEAST_ROUNDS - 1) * sum(took[kind] for kind in part.kinds) <= left:
            return part
    return timed[:2][-1]


def _sizes(model: LoadedModel, max_batch: int) -> tuple[int, ...]:
    return batch_sizes(max_batch, shared=bool(model.merged.division))


def _mixes(size: int, rs: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Return a batch of two r, and one of four, where size and grid allow them."""
    halves = (rs[0],) * (size - size // 2) + (rs[-1],) * (size // 2)
    four = tuple(_some(rs, 4)[i * 4 // size] for i in range(size)) if size >= 4 and len(rs) >= 4 else ()
    return ((halves,) if size > 1 and len(rs) > 1 else ()), ((four,) if four else ())


def _some(rs: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Return about evenly spaced ones of `rs`, the first and the last among them."""
    last, steps = len(rs) - 1, max(1, most - 1)
    return tuple(rs[i] for i in sorted({round(step * last / steps) for step in range(steps + 1)}))


def _share(model: LoadedModel, rs: Sequence[int]) -> float:
    """Operations of a batch, in images at r = 0; merging's own, which needn't fall with r, left out."""
    return sum(model.info.cost(r).merged for r in rs) / model.info.cost(0).merged


def _profile(
    model: LoadedModel, max_batch: int, plan: _Plan, timings: Sequence[_Timing], rounds: int, load: float | None
) -> Profile:
    """Return what the timings say: how kinds of batch compare, and how much the median and the 95th percentile are.

    The latter are taken from all of them together, since a few rounds show neither for each.
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
    """Return what each kind of batch takes, as it would compare on a machine whose speed doesn't change.

    What else a machine does slows many batches in a row down, and seldom all kinds alike. So each timing is divided by
    how slow the machine was around it: the median, over its neighbours, of what they took against what they usually
    take. Each of the two follows from the other; a few rounds settle both.
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
    """Return the seconds for each further r that fit the packed mixes best."""
    if not plan.mixes:
        return 0.0
    further = [len(set(mix)) - 1 for mix in plan.mixes]
    more = [usual[_Kind(mix)] - statistics.fmean(predicted[_Kind((r,) * len(mix))] for r in mix) for mix in plan.mixes]
    return max(0.0, sum(n * m for n, m in zip(further, more, strict=True)) / sum(n * n for n in further))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at `x`, which lies within `xs`; these rise."""
    above = next(i for i, known in enumerate(xs) if known >= x)
    if xs[above] == x:
        return ys[above]
    share = (x - xs[above - 1]) / (xs[above] - xs[above - 1])
    return ys[above - 1] + share * (ys[above] - ys[above - 1])


def _turned(table: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*table, strict=True)]
