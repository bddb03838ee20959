import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tome_server.calibration.cpu_load import LoadMeter
from tome_server.calibration.profiling import MOST_ROUNDS, TRIAL, batch_sizes, load_of_single_images, measure, monotone
from tome_server.execution.batch import BatchItem, BatchResult, Outputs
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel
from tome_server.scheduling.measured import LEAST_ROUNDS
from tome_server.scheduling.profile import Latency, Profile

CPU = torch.device("cpu")


class Device:
    """A device on a clock of its own, that counts what it runs."""

    def __init__(self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.now = 0.0
        self.longest = 0.0
        """seconds of the longest batch"""
        self.group = 0.001
        self.noise: Callable[[], float] = lambda: 1.0
        self.ran: list[tuple[tuple[int, ...], bool]] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(
        self, model: LoadedModel, batch: Sequence[BatchItem], rs: int | Sequence[int], _: torch.device, *, packed: bool
    ) -> BatchResult:
        each = (rs,) * len(batch) if isinstance(rs, int) else tuple(rs)
        assert len(each) == len(batch)
        assert all(tuple(work.image.shape) == model.info.preprocess.settings.input_size for work in batch)
        self.ran.append((each, packed))
        seconds = self.seconds(each, packed) * self.noise()
        self.now += seconds
        self.longest = max(self.longest, seconds)
        return BatchResult((), seconds)

    def seconds(self, rs: Sequence[int], packed: bool = True) -> float:
        if not packed:
            return sum(self.seconds((r,) * count) for r, count in Counter(rs).items())
        images = sum(self.model.info.cost(r).merged / self.model.info.cost(0).merged for r in rs)
        return 0.002 + 0.010 * images + self.group * (len(set(rs)) - 1)

    def restart(self, noise: Callable[[], float]) -> None:
        """Forget what was run, and take so much longer from now on."""
        self.now, self.longest, self.noise = 0.0, 0.0, noise
        self.ran.clear()

    def truth(self, profile: Profile) -> list[list[float]]:
        return [[self.seconds((r,) * size) for r in profile.rs] for size in profile.sizes]

    def sizes(self) -> list[int]:
        return sorted({len(rs) for rs, _ in self.ran})


@pytest.fixture
def device(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(model, monkeypatch)


def worst(table: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> float:
    """The largest relative error, as the log of a factor."""
    return max(abs(math.log(a / b)) for rows in zip(table, truth, strict=True) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9)), (12, (1, 2, 4, 8, 12))],
)
def test_powers_of_two_and_the_largest_batch_are_timed(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(max_batch) == sizes


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 3, 4)),
        (8, (1, 2, 3, 4, 5, 8)),
        (10, (1, 2, 3, 4, 5, 8, 9, 10)),
    ],
)
def test_where_threads_share_images_one_more_than_each_power_is_timed_too(
    max_batch: int, sizes: tuple[int, ...]
) -> None:
    assert batch_sizes(max_batch, shared=True) == sizes


def test_a_model_whose_images_threads_share_is_timed_at_those_sizes(
    model: LoadedModel, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.merged, "division", "images")
    profile = measure(model, CPU, max_batch=8, budget=60, run=device)
    assert list(profile.sizes) == device.sizes() == [1, 2, 3, 4, 5, 8]


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(st.floats(1e-6, 1e3), min_size=n, max_size=n), min_size=1))
)
def test_a_table_is_lowered_until_it_falls_and_rises_and_no_further(table: list[list[float]]) -> None:
    lowered = monotone(table)
    assert all(a >= b for row in lowered for a, b in pairwise(row))
    assert all(a <= b for column in zip(*lowered, strict=True) for a, b in pairwise(column))
    for i, row in enumerate(lowered):
        for j, value in enumerate(row):
            assert value == min(table[k][m] for k in range(i, len(table)) for m in range(j + 1))
    assert monotone(lowered) == lowered


def test_on_a_quiet_machine_a_profile_is_exact(model: LoadedModel, device: Device) -> None:
    profile = measure(model, CPU, max_batch=8, budget=1000, run=device)
    assert profile.sizes == (1, 2, 4, 8)
    assert profile.rs == tuple(level.r for level in model.info.grid)
    assert worst(profile.p50, device.truth(profile)) < 1e-9
    assert profile.p95[2][1] == pytest.approx(1.05 * profile.p50[2][1])
    assert profile.extra_group == pytest.approx(0.001)
    assert profile.one_call


def test_every_batch_is_warmed_up_and_timed_as_often(model: LoadedModel, device: Device) -> None:
    measure(model, CPU, max_batch=8, budget=1000, run=device)
    counts = Counter(device.ran)
    alone = ((0,), True)
    assert counts.pop(alone) == 4 + 1 + MOST_ROUNDS  # for the plan as well
    assert set(counts.values()) == {1 + MOST_ROUNDS}
    mixes = {rs for rs, _ in counts if len(set(rs)) > 1}
    assert {len(set(rs)) for rs in mixes} == {2, 4}
    assert all((rs, packed) in counts for rs in mixes for packed in (True, False))


@pytest.mark.parametrize(("group", "packed"), [(0.0, True), (0.0019, True), (0.0021, False), (0.02, False)])
def test_batches_of_several_r_will_run_as_was_faster(
    model: LoadedModel, device: Device, group: float, packed: bool
) -> None:
    device.group = group  # split, each further r costs another 2 ms
    profile = measure(model, CPU, max_batch=8, budget=1000, run=device)
    assert profile.one_call is packed
    assert profile.extra_group == pytest.approx(group)
    mixed = [0, 0, 1, 2, 2]
    rs = [profile.rs[level] for level in mixed]
    assert Latency(profile).of_batch(mixed) == pytest.approx(device.seconds(rs, packed), rel=0.01)


def test_where_packing_gains_nothing_is_taken_for_free(model: LoadedModel, device: Device) -> None:
    device.group = -0.001
    assert measure(model, CPU, max_batch=8, budget=1000, run=device).extra_group == 0


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5])
def test_a_profile_of_small_batches(model: LoadedModel, device: Device, max_batch: int) -> None:
    profile = measure(model, CPU, max_batch=max_batch, budget=1000, run=device)
    assert profile.max_batch == max_batch
    assert worst(profile.p50, device.truth(profile)) < 1e-9
    if max_batch == 1:
        assert (profile.extra_group, profile.one_call) == (0, True)


@pytest.mark.parametrize("budget", [0.5, 1, 2, 5, 10, 20, 40])
def test_the_budget_is_kept_and_a_short_one_gives_a_profile_too(
    model: LoadedModel, device: Device, budget: float
) -> None:
    profile = measure(model, CPU, max_batch=8, budget=budget, run=device)
    assert device.now <= budget + device.longest
    assert profile.sizes == (1, 2, 4, 8)
    # What wasn't timed follows the operations, as this device does.
    assert worst(profile.p50, device.truth(profile)) < 1e-9
    # A machine that is as fast as it was when the plan was made has time for it.
    assert profile.measured is not None
    assert profile.measured.rounds >= LEAST_ROUNDS or budget <= 1
    assert not profile.measured.extrapolated


@given(
    budget=st.floats(0.05, 20),
    slowness=st.floats(1, 1000),
    after=st.floats(0, 20),
    max_batch=st.sampled_from([1, 2, 5, 8, 16]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_machine_that_is_or_becomes_slow_makes_no_measurement_longer_than_its_budget_and_one_batch(
    model: LoadedModel, device: Device, budget: float, slowness: float, after: float, max_batch: int
) -> None:
    device.restart(lambda: slowness if device.now >= after else 1.0)
    profile = measure(model, CPU, max_batch=max_batch, budget=budget, run=device)
    # One image at both ends of the grid is timed in any case.
    alone = [rs for rs, _ in device.ran if len(rs) == 1]
    assert device.now <= budget + max(device.longest, 3 * device.seconds((0,)) * slowness)
    assert {(0,), (profile.rs[-1],)} <= {*alone}
    assert profile.measured is not None
    # What was run once was warmed up; there was no time left to time it.
    ran = Counter(device.ran)
    assert profile.measured.extrapolated == (max_batch > 1 and ran[(profile.rs[-1],) * max_batch, True] < 2)
    assert 1 <= profile.measured.rounds <= ran[(profile.rs[-1],), True]


@pytest.mark.parametrize("slowness", [30, 100, 1000])
def test_where_there_is_time_for_single_images_only_a_batch_is_taken_to_cost_as_many(
    model: LoadedModel, device: Device, slowness: float
) -> None:
    device.noise = lambda: slowness
    profile = measure(model, CPU, max_batch=8, budget=1, run=device)
    assert device.sizes() == [1]
    alone = [device.seconds((r,)) * slowness for r in profile.rs]
    assert worst(profile.p50, [[size * seconds for seconds in alone] for size in profile.sizes]) < 0.05
    assert profile.measured is not None
    assert profile.measured.extrapolated


def test_a_machine_that_slows_down_is_timed_at_as_many_batches_as_there_is_time_for(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    for slowness in (1, 3, 6, 12, 100):
        device = Device(model, monkeypatch)
        # Once it has been found out how long one image takes, and a plan made of that.
        device.noise = lambda device=device, slowness=slowness: slowness if len(device.ran) > 4 else 1.0
        profile = measure(model, CPU, max_batch=8, budget=10, run=device)
        kinds.append(len(set(device.ran)))
        assert worst(profile.p50, [[slowness * each for each in row] for row in device.truth(profile)]) < 0.35
    assert kinds == sorted(kinds, reverse=True)
    assert kinds[0] > kinds[-1]


def test_a_profile_says_how_it_was_measured(
    model: LoadedModel, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    device.noise = lambda: math.exp(rng.gauss(0, 0.05))
    monkeypatch.setattr(LoadMeter, "share", lambda _: 0.37)
    measured = measure(model, CPU, max_batch=8, budget=1000, run=device).measured
    assert measured is not None
    assert (measured.rounds, measured.load, measured.extrapolated) == (MOST_ROUNDS, 0.37, False)
    assert measured.spread == pytest.approx(math.exp(1.645 * 0.05), rel=0.02)
    device.noise = lambda: 1.0
    quiet = measure(model, CPU, max_batch=8, budget=1000, run=device).measured
    assert quiet is not None
    assert quiet.spread == pytest.approx(1)


def test_who_stops_it_is_obeyed_at_the_next_batch(model: LoadedModel, device: Device) -> None:
    stop = threading.Event()

    def noise() -> float:
        if len(device.ran) == 20:
            stop.set()
        return 1.0

    device.noise = noise
    with pytest.raises(InterruptedError):
        measure(model, CPU, max_batch=8, budget=1000, run=device, stop=stop)
    assert len(device.ran) == 20


def test_the_less_time_there_is_the_fewer_batches_are_timed(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    for budget in (0.1, 3, 7, 11):
        device = Device(model, monkeypatch)
        measure(model, CPU, max_batch=16, budget=budget, run=device)
        kinds.append(len(set(device.ran)))
    assert kinds == sorted(set(kinds))


def test_more_time_than_is_of_use_is_not_spent(model: LoadedModel, device: Device) -> None:
    measure(model, CPU, max_batch=8, budget=1000, run=device)
    assert device.now < 30


@pytest.mark.parametrize("seed", range(5))
def test_noise_averages_out(model: LoadedModel, device: Device, seed: int) -> None:
    rng = random.Random(seed)
    device.noise = lambda: math.exp(rng.gauss(0, 0.05))
    profile = measure(model, CPU, max_batch=8, budget=1000, run=device)
    assert worst(profile.p50, device.truth(profile)) < 0.07
    assert profile.p95[0][0] / profile.p50[0][0] == pytest.approx(math.exp(1.645 * 0.05), rel=0.02)


@pytest.mark.parametrize("budget", [4, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_a_neighbour_that_halves_the_speed_for_seconds_does_not_bend_the_profile(
    model: LoadedModel, device: Device, seed: int, budget: float
) -> None:
    rng = random.Random(seed)
    changes = [0.0]
    while changes[-1] < 100:
        changes.append(changes[-1] + rng.uniform(0.3, 2))

    def noise() -> float:
        busy = sum(change <= device.now for change in changes) % 2
        return (1 + busy) * math.exp(rng.gauss(0, 0.02))

    device.noise = noise
    profile = measure(model, CPU, max_batch=8, budget=budget, run=device)
    truth = device.truth(profile)
    factor = profile.p50[3][0] / truth[3][0]
    assert 0.9 < factor < 2.2
    shape = worst(profile.p50, [[factor * value for value in row] for row in truth])
    assert shape < (0.1 if budget > 100 else 0.25)


def test_a_machine_that_slows_down_meanwhile_wrongs_no_batch(model: LoadedModel, device: Device) -> None:
    device.noise = lambda: 1 + 0.05 * device.now
    profile = measure(model, CPU, max_batch=8, budget=1000, run=device)
    truth = device.truth(profile)
    factor = profile.p50[0][0] / truth[0][0]
    assert worst(profile.p50, [[factor * value for value in row] for row in truth]) < 0.03


def test_an_r_that_costs_more_than_a_lesser_one_is_predicted_as_that(
    model: LoadedModel, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = device.seconds
    monkeypatch.setattr(
        device, "seconds", lambda rs, packed=True: plain(rs, packed) + (0.004 if set(rs) != {0} and packed else 0)
    )
    profile = measure(model, CPU, max_batch=8, budget=1000, run=device)
    assert profile.p50[0][0] == pytest.approx(plain((0,)), rel=0.01)
    assert profile.p50[0][1] == profile.p50[0][0]
    assert profile.p50[3][-1] == pytest.approx(plain((profile.rs[-1],) * 8) + 0.004, rel=0.01)


def test_it_is_measured_in_a_new_thread_with_as_many_threads_as_were_set(model: LoadedModel, device: Device) -> None:
    seen: set[tuple[bool, int]] = set()

    def noise() -> float:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return 1.0

    device.noise = noise
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.clear()
            measure(model, CPU, max_batch=1, budget=1, run=device)
            assert seen == {(False, threads)}
    finally:
        torch.set_num_threads(before)


def test_a_model_that_fails_says_so(model: LoadedModel, device: Device) -> None:
    def noise() -> float:
        raise MemoryError("no room for 8 images")

    device.noise = noise
    with pytest.raises(MemoryError, match="no room for 8 images"):
        measure(model, CPU, max_batch=8, budget=1, run=device)


def test_progress_is_shown_on_standard_error(
    model: LoadedModel, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(model, CPU, max_batch=2, budget=1000, run=device, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err
    measure(model, CPU, max_batch=2, budget=1000, run=device)
    assert capsys.readouterr().err == ""


def test_real_batches_can_be_measured(model: LoadedModel) -> None:
    profile = measure(model, CPU, max_batch=4, budget=1)
    assert profile.sizes == (1, 2, 4)
    assert 0 < profile.p50[0][-1] < 1


@pytest.fixture
def _cpu_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches on one thread, timed by what they take of the CPU, however busy it is with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_cpu_time")
def test_predictions_follow_a_real_device_that_takes_twice_as_long(model: LoadedModel) -> None:
    def seconds(r: int) -> float:
        return run_batch(model, [BatchItem(image, Outputs(top_k=1))] * 8, r, CPU).seconds

    image = torch.rand(model.info.preprocess.settings.input_size)
    latency = Latency(measure(model, CPU, max_batch=8, budget=2))
    levels = [i % latency.levels for i in range(20)]
    # The first of each level finds nothing of it in the caches, and is left out.
    ran = [min([seconds(latency.profile.rs[level]) for _ in range(4)][1:]) for level in levels]

    def drift(factor: float) -> float:
        for level, took in zip(levels, ran, strict=True):
            latency.observe([level] * 8, factor * took)
        return latency.drift

    before, slowed, after = drift(1.0), drift(2.0), drift(1.0)
    assert 1.5 < slowed / before < 2.7
    assert 1.5 < slowed / after < 2.7


def test_single_images_show_how_busy_the_machine_is(
    model: LoadedModel, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadMeter, "share", lambda _: 0.6)
    assert load_of_single_images(model, CPU, run=device, stop=threading.Event()) == 0.6
    assert device.sizes() == [1]
    assert TRIAL <= device.now <= TRIAL + device.longest
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        load_of_single_images(model, CPU, run=device, stop=stop)
