import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.scheduling.cases import NAMES, QUALITY, RS, device, named, profiles
from tome_server.scheduling.policy.published import Fixed
from tome_server.scheduling.policy.view import Decision, View
from tome_server.scheduling.profile import Profile
from tome_server.simulation.simulator import Cluster, Death, Result, Slowdown, simulate
from tome_server.simulation.workload import Arrival, Spike, Steady, draw

PROFILE = device()
CAPACITY = 32 / PROFILE.p50[-1][0]


def cluster(name: str = "price", **changes: Any) -> Cluster:
    return replace(Cluster(PROFILE, QUALITY, named(name)), **changes)


def poisson(share: float, seconds: float = 5.0, cv2: float = 1.0) -> list[Arrival]:
    """Requests at a share of what the device can do at r = 0, due in 36 ms."""
    return draw(Steady(share * CAPACITY, seconds), (0.036,), cv2=cv2)


def assert_whole(result: Result, requests: int) -> None:
    """Every request ended in just one way."""
    assert result.requests == requests
    assert result.in_time + result.late + result.refused + result.shed + result.lost == requests


def test_nothing_comes_of_nothing() -> None:
    result = simulate([], cluster())
    assert_whole(result, 0)
    assert result.attainment == 1
    assert math.isnan(result.p50)


def test_one_request_takes_as_long_as_the_profile_says() -> None:
    result = simulate([Arrival(1.0, 0.1)], cluster(jitter=0.0, reply=0.002))
    assert result.p50 == result.p99 == pytest.approx(PROFILE.p50[0][0] + 0.002)
    assert (result.in_time, result.mean_r, result.mean_batch) == (1, 0, 1)
    assert result.effective_accuracy == QUALITY[0]


def test_requests_of_one_moment_are_decided_on_together() -> None:
    result = simulate([Arrival(0.0, 0.1)] * 10, cluster(jitter=0.0))
    assert (result.batches, result.mean_batch) == (1, 10)


def test_a_reply_that_takes_time_makes_deadlines_earlier() -> None:
    assert simulate([Arrival(0.0, 0.005)], cluster()).in_time == 1
    assert simulate([Arrival(0.0, 0.005)], cluster(reply=0.003)).refused == 1


def test_time_between_batches_is_no_ones() -> None:
    arrivals = [Arrival(0.0, 1.0), Arrival(0.001, 1.0)]
    result = simulate(arrivals, cluster(jitter=0.0, between_batches=0.5))
    assert result.batches == 2
    assert result.p99 == pytest.approx(2 * PROFILE.p50[0][0] + 0.5 - 0.001)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seeds_give_the_same_again(name: str) -> None:
    arrivals = poisson(1.2, 1.0)
    assert simulate(arrivals, cluster(name), seed=3) == simulate(arrivals, cluster(name), seed=3)


@given(
    profiles(),
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.001, 2)), max_size=60),
    st.integers(1, 4),
    st.sampled_from(["round_robin", "least_loaded"]),
    st.lists(st.builds(Death, st.floats(0, 10), st.integers(0, 3)), max_size=4),
    st.booleans(),
    st.booleans(),
    st.floats(0, 0.5),
)
@settings(deadline=None)
def test_every_request_ends_in_just_one_way(
    profile: Profile,
    name: str,
    pairs: list[tuple[float, float]],
    replicas: int,
    dispatch: str,
    deaths: list[Death],
    retry: bool,
    blind: bool,
    jitter: float,
) -> None:
    now, arrivals = 0.0, []
    for gap, budget in pairs:
        now += gap
        arrivals.append(Arrival(now, budget))
    held = Cluster(
        profile,
        QUALITY,
        named(name),
        replicas=replicas,
        dispatch=dispatch,  # type: ignore[arg-type]
        deaths=[death for death in deaths if death.replica < replicas],
        retry=retry,
        blind=blind,
        jitter=jitter,
        between_batches=0.001,
        slowdowns=[Slowdown(1.0, 2.0, 3.0)],
    )
    result = simulate(arrivals, held)
    assert_whole(result, len(arrivals))
    assert 0 <= result.effective_accuracy <= max(QUALITY) * result.attainment + 1e-9
    assert 0 <= result.mean_r <= RS[-1]
    assert 0 <= result.busy <= 1 + 1e-9
    assert 0 <= result.wasted <= 1
    assert result.policy_failures == 0
    if not held.deaths:
        assert result.lost == 0
    if blind:
        assert result.refused == result.shed == 0


def test_fixed_r0_collapses_where_the_default_holds() -> None:
    arrivals = poisson(1.2)
    fixed, default = simulate(arrivals, cluster("fixed:0")), simulate(arrivals, cluster())
    plain = simulate(arrivals, cluster("fixed:0", blind=True))
    assert fixed.attainment < 0.6
    assert plain.attainment < 0.2
    assert default.attainment > 0.99
    assert default.effective_accuracy > fixed.effective_accuracy + 20
    assert 0 < default.mean_r < RS[-1]


@pytest.mark.parametrize("cv2", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_next_to_nothing_is_computed_in_vain_in_an_overload(name: str, cv2: float) -> None:
    result = simulate(poisson(1.5, cv2=cv2), cluster(name))
    assert result.wasted < 0.01


def test_the_default_holds_in_an_overload_that_no_merging_meets() -> None:
    arrivals = poisson(3.0, 2.0)
    result = simulate(arrivals, cluster())
    most = CAPACITY * PROFILE.p50[-1][0] / PROFILE.p50[-1][-1] / (3.0 * CAPACITY)
    assert result.attainment > 0.85 * most
    assert result.wasted < 0.01


def test_a_spike_is_merged_away() -> None:
    arrivals = draw(Spike(0.5 * CAPACITY, times=3, start=2, seconds=1, duration=4), (0.036,))
    result = simulate(arrivals, cluster())
    assert result.attainment > 0.97
    assert simulate(arrivals, cluster("fixed:0")).attainment < 0.9


def test_two_replicas_do_twice_as_much() -> None:
    arrivals = poisson(2.0)
    assert simulate(arrivals, cluster("fixed:16", replicas=2)).attainment > 0.999
    assert simulate(arrivals, cluster("fixed:16")).attainment < 0.99


def test_round_robin_goes_round_and_least_loaded_looks() -> None:
    # Each second request is long to wait for: nobody takes turns at that.
    slow = [Arrival(0.001 * number, 10.0) for number in range(200)]
    one = simulate(slow, cluster(replicas=3, jitter=0.0))
    other = simulate(slow, cluster(replicas=3, dispatch="least_loaded", jitter=0.0))
    assert one.in_time == other.in_time == 200
    spread = simulate(poisson(2.5, 2.0, cv2=4.0), cluster(replicas=3, dispatch="least_loaded"))
    blindly = simulate(poisson(2.5, 2.0, cv2=4.0), cluster(replicas=3))
    assert spread.effective_accuracy >= blindly.effective_accuracy - 0.1


def test_a_dead_replica_loses_what_it_holds() -> None:
    arrivals = [Arrival(0.0, 1.0)] * 4 + [Arrival(0.01, 1.0)] * 2
    deaths = [Death(0.002, 0)]
    lost = simulate(arrivals, cluster(replicas=2, deaths=deaths, jitter=0.0))
    assert_whole(lost, 6)
    assert (lost.in_time, lost.lost) == (4, 2)
    assert lost.wasted > 0
    saved = simulate(arrivals, cluster(replicas=2, deaths=deaths, retry=True, jitter=0.0))
    assert (saved.in_time, saved.lost) == (6, 0)


def test_when_all_are_dead_nobody_answers() -> None:
    arrivals = [Arrival(0.0, 1.0), Arrival(0.5, 1.0)]
    for retry in (False, True):
        result = simulate(arrivals, cluster(replicas=2, deaths=[Death(0.3, 1), Death(0.2, 0)], retry=retry))
        assert (result.in_time, result.lost) == (1, 1)


def test_the_rest_carry_on_when_one_dies() -> None:
    arrivals = poisson(2.2, 4.0)
    result = simulate(arrivals, cluster(replicas=3, deaths=[Death(2.0, 1)], retry=True))
    assert result.attainment > 0.99
    assert result.mean_r > simulate(arrivals, cluster(replicas=3)).mean_r


def test_a_slow_machine_is_noticed_and_so_is_its_recovery() -> None:
    arrivals = poisson(0.6, 6.0)
    slowed = simulate(arrivals, cluster(slowdowns=[Slowdown(2.0, 4.0, 1.8)]))
    assert slowed.attainment > 0.97
    assert slowed.mean_r > simulate(arrivals, cluster()).mean_r


def test_a_machine_that_was_too_slow_for_anybody_is_tried_again() -> None:
    # For a while no batch is in time, so that all are refused, and nothing is observed any more.
    arrivals = [Arrival(0.02 * number, 0.010) for number in range(2000)]
    result = simulate(arrivals, cluster(slowdowns=[Slowdown(5.0, 6.0, 50.0)], jitter=0.0))
    assert result.refused > 20
    # But for the second that was slow, and a second or so after it.
    assert result.attainment > 0.95
    assert simulate(arrivals[-100:], cluster(jitter=0.0)).attainment == 1


def test_a_policy_that_fails_is_counted_and_done_without() -> None:
    def broken(view: View) -> Decision:
        raise RuntimeError("no idea")

    result = simulate(poisson(0.5, 0.5), cluster(policy=lambda _profile, _quality: broken))
    assert result.policy_failures == result.batches > 0
    assert result.attainment == 1


def test_policies_are_made_from_profile_and_quality() -> None:
    made = []

    def policy(profile: Profile, quality: "object") -> Fixed:
        made.append((profile, quality))
        return Fixed(1)

    result = simulate([Arrival(0.0, 1.0)], cluster(policy=policy, replicas=2))
    assert made == [(PROFILE, QUALITY)] * 2
    assert result.mean_r == RS[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quality": (1.0,)}, "5 levels need as many qualities"),
        ({"replicas": 0}, "at least one replica"),
        ({"deaths": [Death(1.0, 1)]}, "counted from 0 to 0"),
        ({"jitter": -0.1}, "can't be negative"),
        ({"reply": -0.1}, "can't be negative"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cluster(**changes)


def test_an_answer_that_was_ready_outlives_its_replica() -> None:
    ready = cluster(jitter=0.0, between_batches=1.0, deaths=[Death(0.5, 0)])
    result = simulate([Arrival(0.0, 0.1)], ready)
    assert (result.in_time, result.lost) == (1, 0)


def test_waiting_a_moment_for_the_mates_of_a_burst_answers_more_than_running_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Budgets of two images' time, in bursts of gaps whose CV² is 8."""
    arrivals = draw(Steady(0.8 * CAPACITY, 20.0), (0.007,), cv2=8, seed=3)
    patient = simulate(arrivals, cluster())
    monkeypatch.setattr("tome_server.scheduling.policy.price._PATIENCE", 0.0)
    hasty = simulate(arrivals, cluster())
    assert_whole(patient, len(arrivals))
    assert patient.mean_batch > hasty.mean_batch
    assert patient.effective_accuracy > 1.03 * hasty.effective_accuracy
    assert patient.late <= hasty.late + 0.001 * len(arrivals)
