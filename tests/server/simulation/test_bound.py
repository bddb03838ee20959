import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.scheduling.cases import NAMES, QUALITY, device, named, profiles
from tome_server.scheduling.profile import Profile
from tome_server.simulation.bound import clairvoyant_bound
from tome_server.simulation.simulator import Cluster, simulate
from tome_server.simulation.workload import Arrival, Steady, draw

arrivals = st.lists(st.tuples(st.floats(0, 0.2), st.floats(0.001, 1)), min_size=1, max_size=25).map(
    lambda pairs: [
        Arrival(at, budget)
        for at, (_, budget) in zip(itertools.accumulate(gap for gap, _ in pairs), pairs, strict=True)
    ]
)


def test_an_idle_device_loses_nothing() -> None:
    assert clairvoyant_bound([Arrival(float(at), 0.1) for at in range(20)], device(), QUALITY) == pytest.approx(84.57)


def test_nobody_is_worth_nothing() -> None:
    assert clairvoyant_bound([], device(), QUALITY) == 0


def test_a_device_without_time_is_worth_what_is_left() -> None:
    # One image at a time, a second each, whatever r; four ask for the same second.
    profile = Profile((1,), (0, 4), ((1.0, 1.0),), ((1.0, 1.0),))
    assert clairvoyant_bound([Arrival(0.0, 1.0)] * 4, profile, (0.8, 0.7)) == pytest.approx(0.2)


@pytest.mark.parametrize("name", NAMES)
@given(profiles(), arrivals, st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_no_policy_does_better(name: str, profile: Profile, requests: list[Arrival], replicas: int) -> None:
    cluster = Cluster(profile, QUALITY, named(name), replicas=replicas, dispatch="least_loaded", jitter=0.0)
    reached = simulate(requests, cluster).effective_accuracy
    assert reached <= clairvoyant_bound(requests, profile, QUALITY, replicas=replicas) + 1e-6


@given(profiles(), arrivals)
@settings(deadline=None)
def test_more_replicas_more_time_and_more_quality_raise_it(profile: Profile, requests: list[Arrival]) -> None:
    one = clairvoyant_bound(requests, profile, QUALITY)
    assert clairvoyant_bound(requests, profile, QUALITY, replicas=2) >= one - 1e-6
    patient = [Arrival(at, 1.5 * budget) for at, budget in requests]
    assert clairvoyant_bound(patient, profile, QUALITY) >= one - 1e-6
    assert clairvoyant_bound(requests, profile, [1.1 * worth for worth in QUALITY]) == pytest.approx(1.1 * one)
    assert one <= max(QUALITY) + 1e-6


def best_fluid(requests: list[tuple[int, int]], gains: list[float]) -> float:
    """The best that whole seconds of work can earn; the k-th of a request earns gains[k]. Tries every assignment."""
    seconds = range(max(end for _, end in requests))
    choices = [
        [None, *(number for number, (start, end) in enumerate(requests) if start <= second < end)] for second in seconds
    ]
    best = 0.0
    for assignment in itertools.product(*choices):
        worth = sum(sum(gains[: assignment.count(number)]) for number in range(len(requests)))
        best = max(best, worth)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_assignments_of_seconds(seed: int) -> None:
    rng = random.Random(seed)
    # An image takes 1, 2 or 3 s, and each further second is worth less: the optimum is one of whole seconds.
    gains = sorted((rng.uniform(0.1, 1) for _ in range(3)), reverse=True)
    quality = list(itertools.accumulate(gains))[::-1]
    profile = Profile((1,), (0, 4, 8), ((3.0, 2.0, 1.0),), ((3.0, 2.0, 1.0),))
    requests = []
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, 5)
        requests.append((start, rng.randint(start + 1, 7)))
    requests.sort()
    bound = clairvoyant_bound([Arrival(start, end - start) for start, end in requests], profile, quality)
    assert bound * len(requests) == pytest.approx(best_fluid(requests, gains))


def test_a_dent_in_quality_is_bridged() -> None:
    # Level 1 is worse than a mix of its neighbours, and level 3 worse and slower than none.
    profile = Profile((1,), (0, 2, 4, 6), ((4.0, 3.0, 2.0, 2.0),), ((4.0, 3.0, 2.0, 2.0),))
    requests = [Arrival(0.0, 3.0)]
    assert clairvoyant_bound(requests, profile, (1.0, 0.81, 0.8, 0.7)) == pytest.approx(0.9)


def test_it_lies_little_above_what_the_default_reaches_in_ordinary_traffic() -> None:
    requests = draw(Steady(900.0, 3.0), (0.036,), seed=5)
    reached = simulate(requests, Cluster(device(), QUALITY, named("price"))).effective_accuracy
    assert reached <= clairvoyant_bound(requests, device(), QUALITY) + 0.01
    assert reached >= clairvoyant_bound(requests, device(), QUALITY) - 1.5
