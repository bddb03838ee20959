import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.scheduling.cases import steps
from tome_server.scheduling.profile import Latency, Profile

SIZES, RS = (1, 2, 4, 8), (0, 4, 8, 16)


def profile(spread: float = 1.1, extra_group: float = 0.0, one_call: bool = True) -> Profile:
    """2 ms and 10 ms an image at r = 0, half of that at the last r."""
    p50 = tuple(tuple(0.002 + 0.010 * size * (1 - level / 6) for level in range(len(RS))) for size in SIZES)
    p95 = tuple(tuple(value * spread for value in row) for row in p50)
    return Profile(SIZES, RS, p50, p95, extra_group, one_call)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any table that falls and rises: sums of positive steps from the cheapest cell on."""
    sizes = (1, *sorted(draw(st.sets(st.integers(2, 40), max_size=5))))
    rs = (0, *sorted(draw(st.sets(st.integers(1, 60), max_size=6))))
    steps = st.one_of(st.just(0.0), st.floats(1e-6, 10))
    table = [[1e-6] * len(rs) for _ in sizes]
    for row in range(len(sizes)):
        for column in reversed(range(len(rs))):
            least = max([1e-6, *table[row][column + 1 : column + 2], *([table[row - 1][column]] if row else [])])
            table[row][column] = least + draw(steps)
    spread = draw(st.floats(1, 3))
    return Profile(
        sizes,
        rs,
        tuple(map(tuple, table)),
        tuple(tuple(value * spread for value in row) for row in table),
        draw(st.floats(0, 1)),
        draw(st.booleans()),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sizes": ()}, "batch sizes must ascend from 1"),
        ({"sizes": (2, 4, 8, 16)}, "batch sizes must ascend from 1"),
        ({"sizes": (1, 4, 2, 8)}, "batch sizes must ascend from 1"),
        ({"sizes": (1, 2, 2, 8)}, "batch sizes must ascend from 1"),
        ({"sizes": (1, 2, 4)}, "p50 must have 3 rows of 4 values"),
        ({"rs": ()}, "r values must ascend from 0"),
        ({"rs": (2, 4, 8, 16)}, "r values must ascend from 0"),
        ({"rs": (0, 8, 4, 16)}, "r values must ascend from 0"),
        ({"rs": (0, 4, 8)}, "p50 must have 4 rows of 3 values"),
        ({"p95": ((1.0,) * 4,) * 3}, "p95 must have 4 rows of 4 values"),
        ({"p95": ((1.0,) * 3,) + ((1.0,) * 4,) * 3}, "p95 must have 4 rows of 4 values"),
        ({"p50": ((0.0,) * 4,) * 4}, "p50 must hold positive seconds"),
        ({"p50": ((-1.0,) * 4,) * 4}, "p50 must hold positive seconds"),
        ({"p95": ((math.inf,) * 4,) * 4}, "p95 must hold positive seconds"),
        ({"p95": ((math.nan,) * 4,) * 4}, "p95 must hold positive seconds"),
        ({"p50": ((1.0, 2.0, 1.0, 1.0),) * 4}, "p50 must fall with r"),
        ({"p50": ((2.0,) * 4, (1.0,) * 4, (3.0,) * 4, (4.0,) * 4)}, "and rise with the batch size"),
        ({"p95": ((0.001,) * 4,) * 4}, "p95 can't be less than p50"),
        ({"extra_group": -1e-9}, "extra_group must be seconds"),
        ({"extra_group": math.nan}, "extra_group must be seconds"),
    ],
)
def test_what_no_measurement_gives_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(profile(), **change)


def test_one_size_and_one_r_make_a_profile() -> None:
    latency = Latency(Profile((1,), (0,), ((0.5,),), ((0.6,),)))
    assert latency.expected(1, 0) == 0.5
    assert latency.promised(1, 0) == pytest.approx(0.6)


@given(profiles())
def test_every_size_keeps_what_was_measured_and_falls_and_rises(profile: Profile) -> None:
    rows = profile.every_size(profile.p50)
    assert len(rows) == profile.max_batch + 1
    assert rows[0] == [0.0] * len(profile.rs)
    for size, row in zip(profile.sizes, profile.p50, strict=True):
        assert rows[size] == list(row)
    # Interpolation rounds.
    assert all(a >= b * (1 - 1e-12) for row in rows for a, b in pairwise(row))
    assert all(a <= b * (1 + 1e-12) for column in zip(*rows, strict=True) for a, b in pairwise(column))


def test_sizes_between_those_measured_are_interpolated() -> None:
    rows = profile().every_size(profile().p50)
    assert rows[3][0] == pytest.approx(0.032)
    assert rows[7][3] == pytest.approx(0.037)


@pytest.mark.parametrize(("r", "level"), [(0, 0), (1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (15, 2), (16, 3), (90, 3)])
def test_an_r_between_two_levels_costs_what_the_dearer_does(r: int, level: int) -> None:
    assert profile().level_of(r) == level


@given(profiles(), st.data())
def test_a_batch_in_one_call_costs_something_between_its_members_and_more_for_each_r(
    profile: Profile, data: Any
) -> None:
    profile = replace(profile, one_call=True)
    levels = data.draw(st.lists(st.integers(0, len(profile.rs) - 1), min_size=1, max_size=profile.max_batch))
    latency = Latency(profile)
    for promised in (False, True):
        predict = latency.promised if promised else latency.expected
        uniform = [predict(len(levels), level) for level in levels]
        given = latency.of_batch(levels, promised=promised) - (len(set(levels)) - 1) * profile.extra_group
        assert min(uniform) - 1e-9 <= given <= max(uniform) + 1e-9


@given(profiles(), st.data())
def test_a_split_batch_costs_the_sum_of_its_parts(profile: Profile, data: Any) -> None:
    profile = replace(profile, one_call=False)
    levels = data.draw(st.lists(st.integers(0, len(profile.rs) - 1), min_size=1, max_size=profile.max_batch))
    latency = Latency(profile)
    parts = [latency.expected(levels.count(level), level) for level in set(levels)]
    assert latency.of_batch(levels) == pytest.approx(sum(parts))


@given(profiles(), st.data())
def test_a_uniform_batch_costs_the_same_however_mixed_ones_run(profile: Profile, data: Any) -> None:
    level = data.draw(st.integers(0, len(profile.rs) - 1))
    size = data.draw(st.integers(1, profile.max_batch))
    latency = Latency(profile)
    assert latency.of_batch([level] * size) == latency.expected(size, level)
    assert latency.of_batch([level] * size, promised=True) == latency.promised(size, level)


def test_the_order_of_members_does_not_matter() -> None:
    for one_call in (True, False):
        latency = Latency(profile(extra_group=0.001, one_call=one_call))
        assert latency.of_batch([0, 3, 0, 3]) == pytest.approx(latency.of_batch([3, 3, 0, 0]))


@given(profiles(), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(1e-9, 1e3)), max_size=60))
def test_whatever_is_observed_predictions_stay_positive_and_promises_above_them(
    profile: Profile, observed: list[tuple[int, int, float]]
) -> None:
    latency = Latency(profile)
    for i, (size, level, seconds) in enumerate(observed):
        levels = [level % latency.levels] * (1 + size % latency.max_batch)
        levels[-1] = (level + i % 2) % latency.levels
        ratio = seconds / latency.of_batch(levels)
        assert latency.observe(levels, seconds) == pytest.approx(ratio)
        if i % 7 == 6:
            latency.forget_slowness(3)
    for size in range(1, latency.max_batch + 1):
        for level in range(latency.levels):
            assert 0 < latency.expected(size, level) <= latency.promised(size, level) < math.inf


@given(
    profiles(),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(1e-3, 1e2)), max_size=40),
    st.integers(1, 40),
)
def test_predictions_for_many_batches_at_once_are_those_of_each(
    profile: Profile, observed: list[tuple[int, int, float]], largest: int
) -> None:
    latency = Latency(profile)
    for size, level, ratio in observed:
        levels = [level % latency.levels] * (1 + size % latency.max_batch)
        latency.observe(levels, ratio * latency.of_batch(levels))
    latency.allow(largest)
    sizes = range(1, latency.max_batch + 1)
    for level in range(latency.levels):
        merged = latency.by_size(level)
        assert merged.expected == [0.0, *(latency.expected(size, level) for size in sizes)]
        assert merged.promised == [0.0, *(latency.promised(size, level) for size in sizes)]
    for size in sizes:
        rows = [latency.drift * median for median in latency.medians(size)]
        assert rows == [latency.expected(size, level) for level in range(latency.levels)]


# A virtual machine: its batches take what the profile says, times its slowness, times noise.

Noise = Callable[[random.Random], float]


def scatter(share: float) -> Noise:
    return lambda rng: math.exp(rng.gauss(0, share))


def stalls(rng: random.Random) -> float:
    """Two in a hundred batches take up to two and a half times as long."""
    return math.exp(rng.gauss(0, 0.03)) * (rng.uniform(1.5, 2.5) if rng.random() < 0.02 else 1)


def late_tail(rng: random.Random) -> float:
    return 0.95 + rng.expovariate(1 / 0.07)


class Machine:
    """Runs batches of any size and level, and counts how predictions hold."""

    def __init__(self, noise: Noise, *, spread: float = 1.1, seed: int = 0, one_call: bool = True) -> None:
        self.truth = Latency(profile(one_call=one_call))
        self.latency = Latency(profile(spread, one_call=one_call))
        self.noise, self.rng = noise, random.Random(seed)
        self.slowness = 1.0
        self.cells: dict[tuple[int, int], float] = {}
        self.kept: list[bool] = []

    def batches(self, count: int, mixed: bool = True) -> Iterator[None]:
        for _ in range(count):
            size = self.rng.randint(1, 8)
            levels = [self.rng.randrange(4)] * size
            if mixed and self.rng.random() < 0.3:
                levels = [self.rng.randrange(4) for _ in range(size)]
            self.run(levels)
            yield

    def run(self, levels: list[int]) -> None:
        own = self.cells.get((len(levels), levels[0]), 1.0) if len(set(levels)) == 1 else 1.0
        seconds = self.truth.of_batch(levels) * own * self.slowness * self.noise(self.rng)
        self.kept.append(seconds <= self.latency.of_batch(levels, promised=True))
        self.latency.observe(levels, seconds)

    def many(self, count: int) -> None:
        for _ in self.batches(count):
            pass

    def share_kept(self, since: int = 0) -> float:
        return sum(self.kept[since:]) / len(self.kept[since:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [scatter(0.01), scatter(0.05), scatter(0.2), stalls, late_tail])
@pytest.mark.parametrize("spread", [1.0, 1.1, 2.0], ids="profiled spread {}".format)
def test_95_of_100_batches_end_within_their_promise(noise: Noise, spread: float, seed: int) -> None:
    machine = Machine(noise, spread=spread, seed=seed)
    machine.many(3000)
    assert machine.share_kept(since=500) >= 0.95
    assert machine.share_kept() >= 0.94  # while it learns as well


@pytest.mark.parametrize("noise", [scatter(0.02), scatter(0.1), stalls], ids=["quiet", "noisy", "stalls"])
def test_promises_are_not_much_longer_than_they_need_be(noise: Noise) -> None:
    machine = Machine(noise, spread=1.6)
    machine.many(2000)
    rng = random.Random(1)
    needed = sorted(noise(rng) for _ in range(10_000))[9_600]
    promised = [machine.latency.promised(4, 1) / machine.truth.expected(4, 1) for _ in machine.batches(500)]
    assert sum(promised) / len(promised) < 1.1 * needed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [2, 0.5, 4], ids="times {}".format)
@pytest.mark.parametrize("one_call", [True, False], ids=["one call", "split"])
def test_within_20_batches_predictions_follow_a_machine_whose_speed_changes(
    factor: float, seed: int, one_call: bool
) -> None:
    machine = Machine(scatter(0.03), seed=seed, one_call=one_call)
    for slowness in (factor, 1.0):
        machine.many(300)
        machine.slowness = slowness
        machine.many(20)
        for size, level in ((1, 0), (3, 2), (8, 3)):
            true = slowness * machine.truth.expected(size, level)
            assert machine.latency.expected(size, level) == pytest.approx(true, rel=0.08)
            assert machine.latency.promised(size, level) < 1.3 * true
        assert machine.latency.drift == pytest.approx(slowness, rel=0.08)
        before = len(machine.kept)
        machine.many(200)
        assert machine.share_kept(before) >= 0.93


def test_two_slow_batches_are_enough_to_promise_more() -> None:
    latency = Latency(profile())
    for _ in range(2):
        latency.observe([0, 0], 3 * latency.profile.p50[1][0])
    assert latency.promised(2, 0) == pytest.approx(3 * latency.profile.p50[1][0], rel=0.02)
    assert latency.drift == 1


def test_a_single_stall_changes_nothing_to_speak_of() -> None:
    latency = Latency(profile())
    before = latency.promised(8, 0)
    latency.observe([0] * 8, 50 * latency.expected(8, 0))
    assert latency.drift == 1
    assert latency.promised(8, 0) == pytest.approx(before, rel=0.03)


def test_a_cell_that_was_measured_wrong_is_corrected_and_its_neighbours_stay() -> None:
    machine = Machine(scatter(0.03))
    machine.cells[4, 0] = 1.3
    for _ in range(6):
        machine.many(200)
        for _ in range(40):
            machine.run([0] * 4)
            for _ in machine.batches(3):
                pass
    expected = machine.latency.expected
    assert expected(4, 0) == pytest.approx(1.3 * machine.truth.expected(4, 0), rel=0.06)
    for size, level in ((4, 1), (5, 0), (8, 0), (1, 3)):
        assert expected(size, level) == pytest.approx(machine.truth.expected(size, level), rel=0.06)


def test_a_single_kind_of_batch_moves_no_other_but_through_drift() -> None:
    machine = Machine(late_tail)
    for _ in range(20_000):
        machine.run([1] * 4)
    latency = machine.latency
    ratio = latency.expected(4, 1) / machine.truth.expected(4, 1)
    assert latency.expected(8, 3) / machine.truth.expected(8, 3) == pytest.approx(ratio, rel=0.01)


def test_corrections_do_not_wander_off_in_the_long_run() -> None:
    machine = Machine(late_tail)
    machine.many(20_000)
    for size in range(1, 9):
        for level in range(4):
            ratio = machine.latency.expected(size, level) / machine.truth.expected(size, level)
            assert ratio == pytest.approx(1, abs=0.1)


def test_what_was_slow_is_forgotten_while_nothing_runs() -> None:
    latency = Latency(profile())
    for _ in range(20):
        latency.observe([0], 4 * latency.profile.p50[0][0])
    assert latency.drift == pytest.approx(4)
    latency.forget_slowness(0.5)
    assert latency.drift == pytest.approx(2)
    latency.forget_slowness(0.25)
    latency.forget_slowness(0.25)
    assert latency.drift == pytest.approx(2**0.5)
    latency.forget_slowness(60)
    assert latency.drift == pytest.approx(1, abs=0.01)


def test_what_was_fast_is_kept_while_nothing_runs() -> None:
    latency = Latency(profile())
    for _ in range(20):
        latency.observe([0], latency.profile.p50[0][0] / 8)
    latency.forget_slowness(60)
    assert latency.drift == pytest.approx(1 / 8)


@given(profiles(), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(1, 1e3)), max_size=60))
def test_however_slow_a_machine_was_its_predictions_are_those_of_the_profile_within_five_seconds(
    profile: Profile, observed: list[tuple[int, int, float]]
) -> None:
    untouched, latency = Latency(profile), Latency(profile)
    for size, level, slowness in observed:
        levels = [level % latency.levels] * (1 + size % latency.max_batch)
        latency.observe(levels, slowness * untouched.of_batch(levels))
    latency.forget_slowness(5.0)
    for size in range(1, latency.max_batch + 1):
        for level in range(latency.levels):
            assert latency.promised(size, level) <= 1.02 * untouched.promised(size, level)


def noisy() -> Latency:
    """Return predictions of a machine whose batches have broken every promise until a moment ago, at 1000 s."""
    latency = Latency(profile())
    for number in range(100):
        latency.observe([number % 4] * (1 + number % 8), 4 * latency.promised(8, 0), 1000.0)
    return latency


def longest(latency: Latency) -> float:
    """Return how much longer the promise for some batch is than at first."""
    untouched = Latency(latency.profile)
    cells = [(size, level) for size in range(1, 9) for level in range(4)]
    return max(latency.promised(*cell) / untouched.promised(*cell) for cell in cells)


def test_promises_that_a_noisy_spell_has_raised_age_though_nothing_runs() -> None:
    latency = noisy()
    assert longest(latency) > 2
    before = longest(latency)
    latency.age(1030.0)
    assert longest(latency) == before  # a pause between two batches forgets nothing
    for now in range(1030, 1000 + 3600, 60):
        latency.age(now)
    assert longest(latency) < 1.02


def test_how_often_it_is_looked_for_what_is_stale_changes_nothing() -> None:
    often, once = noisy(), noisy()
    for now in range(1000, 1901):
        often.age(now)
    once.age(1900.0)
    assert longest(once) == pytest.approx(longest(often))
    assert once.drift == pytest.approx(often.drift)


def test_a_margin_ages_also_on_a_server_that_runs_probes_and_a_batch_now_and_then() -> None:
    """Each of them keeps its promise, and would lower it by less than a thousandth."""
    latency = noisy()
    for number in range(60):
        latency.observe([3], latency.profile.p50[0][3], 1000.0 + 60 * number)
    assert longest(latency) < 1.1


def test_what_only_batches_of_other_kinds_have_confirmed_ages() -> None:
    """A correction that keeps a kind of batch from being run would never be made good."""
    latency = Latency(profile())
    for number in range(400):
        size = 4 + number % 2
        slow = 1.5 if size == 4 else 1.0
        latency.observe([0] * size, slow * latency.profile.every_size(latency.profile.p50)[size][0], 1000.0)
    assert latency.medians(4)[0] > 1.05 * Latency(latency.profile).medians(4)[0]
    for number in range(1000):
        kinds = [(5, 0), (6, 1), (7, 2)]
        size, level = kinds[number % 3]
        seconds = latency.profile.every_size(latency.profile.p50)[size][level]
        latency.observe([level] * size, seconds, 1000.0 + 5 * number)
    assert latency.medians(4)[0] == pytest.approx(Latency(latency.profile).medians(4)[0], rel=0.001)


def test_three_hundred_good_batches_bring_doubled_promises_back() -> None:
    latency = noisy()
    for number in range(320):
        level, size = number % 4, 1 + number % 8
        latency.observe([level] * size, latency.profile.every_size(latency.profile.p50)[size][level], 1000.0)
    assert latency._log_margin <= 0


def test_what_was_fast_does_not_age() -> None:
    latency = Latency(profile())
    for _ in range(20):
        latency.observe([0], latency.profile.p50[0][0] / 8, 1000.0)
    latency.age(100_000.0)
    assert latency.drift == pytest.approx(1 / 8)


def test_predictions_are_settled_once_enough_batches_took_what_the_profile_says_or_less() -> None:
    latency = Latency(profile())
    top = latency.levels - 1
    usual = latency.profile.p50[0][top]
    for _ in range(9):
        assert not latency.settled
        latency.observe([top], usual)
    assert latency.settled
    for _ in range(9):
        latency.observe([top], 4 * usual)
    assert not latency.settled
    for _ in range(9):
        latency.observe([top], usual / 8)
    assert latency.settled


def test_learning_and_predicting_take_few_steps_however_much_was_learnt() -> None:
    """Some ten million lines run in a second: these are microseconds, of a decision that is made for each batch."""
    machine = Machine(scatter(0.05))
    latency, mixed = machine.latency, [0, 1, 2, 3, 0, 1, 2, 3]
    for batches in (100, 1000):
        machine.many(batches)
        assert steps(lambda: latency.observe(mixed, 0.05)) < 200
        assert steps(lambda: latency.observe([1] * 8, 0.05)) < 200
        assert 1 < steps(lambda: latency.promised(8, 2)) < 20


def test_the_largest_batch_can_be_made_smaller_and_no_larger_again() -> None:
    latency = Latency(profile())
    before = [latency.expected(size, 2) for size in range(1, 5)]
    latency.allow(4)
    assert latency.max_batch == 4
    latency.allow(6)
    assert latency.max_batch == 4
    assert [latency.expected(size, 2) for size in range(1, 5)] == before
    latency.allow(0)
    assert latency.max_batch == 1
