"""The chart's autoscaling, played by Kubernetes' documented algorithm on the simulator of servers."""

import pytest
from benchmarks.autoscaling import TRAFFIC, Autoscaler, Moment, Pace, Pods, State, autoscalers, outcome, run

CHART = "the chart's"


@pytest.fixture(scope="module")
def known() -> Pods:
    return Pods()


def moments(shape: str, name: str, known: Pods) -> list[Moment]:
    traffic, pods = TRAFFIC[shape]
    return run(autoscalers()[name], traffic, pods, known)


def test_pods_come_before_anybody_is_refused(known: Pods) -> None:
    rising = outcome("ramp", CHART, moments("ramp", CHART, known))
    assert rising.in_time > 0.999
    assert rising.worst > 0.99


def test_utilisation_alone_sees_too_late_what_merging_hides(known: Pods) -> None:
    """At 90 % a device may be merging everything or hardly anything: what a pod more is worth can't be told."""
    name = "busy 90 % alone"
    assert outcome("ramp", name, moments("ramp", name, known)).in_time < 0.99


@pytest.mark.parametrize("shape", ["ramp", "fall"])
def test_the_number_of_pods_comes_to_rest_where_quality_is_kept(shape: str, known: Pods) -> None:
    chart = autoscalers()[CHART]
    last = moments(shape, CHART, known)[-80:]
    assert len({moment.wanted for moment in last}) == 1
    assert last[-1].state.rShare <= 1.1 * chart.targets["rShare"]
    assert last[-1].state.refusedShare == 0
    # And no more pods than that takes.
    assert last[-1].state.busy > 0.7


class Told(Pods):
    """Does as it is told, whatever the rate."""

    def __init__(self, **shares: float) -> None:
        super().__init__()
        self.shares = {"rShare": 0.0, "refusedShare": 0.0, "busy": 0.0, "effective_accuracy": 1.0} | shares

    def state(self, rate: int, pods: int) -> State:  # noqa: ARG002
        return State(**self.shares)


def steps(told: Told, pods: int, **settings: Pace) -> list[int]:
    slow = Pace(stabilizationSeconds=0, pods=1, percent=10, periodSeconds=60)
    paces = {"up": slow, "down": slow} | settings
    scaler = Autoscaler({"busy": 0.5}, 15, most=12, **paces)
    return [moment.wanted for moment in run(scaler, lambda _: 100, pods, told)]


def test_proposals_are_in_the_ratio_of_value_to_target() -> None:
    fast = Pace(stabilizationSeconds=0, pods=100, percent=100, periodSeconds=60)
    assert steps(Told(busy=0.8), 4, up=fast)[1] == 7
    assert steps(Told(busy=1.0), 4, up=fast)[-1] == 12
    assert steps(Told(busy=0.2), 4, down=fast)[1] == 2


def test_what_is_within_a_tenth_of_the_target_changes_nothing() -> None:
    assert set(steps(Told(busy=0.54), 4)) == set(steps(Told(busy=0.46), 4)) == {4}


def test_pods_change_no_faster_than_the_pace_allows() -> None:
    assert steps(Told(busy=1.0), 4)[:9] == [4, 5, 5, 5, 5, 6, 6, 6, 6]
    assert steps(Told(busy=0.0), 6)[:9] == [6, 5, 5, 5, 5, 4, 4, 4, 4]


def test_going_down_waits_for_the_stabilisation_window() -> None:
    class Drops(Told):
        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def state(self, rate: int, pods: int) -> State:  # noqa: ARG002
            self.asked += 1
            return State(0.0, 0.0, 0.5 if self.asked < 5 else 0.1, 1.0)

    patient = Pace(stabilizationSeconds=120, pods=10, percent=100, periodSeconds=15)
    wanted = steps(Drops(), 10, down=patient)
    first = wanted.index(next(number for number in wanted if number != 10))
    # The fifth moment is the first that asks for less.
    assert first * 15 >= 4 * 15 + 105
