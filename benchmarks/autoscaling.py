"""The chart's autoscaling under traffic that rises, jumps and falls, in simulation, and beside it one by utilisation.

Kubernetes' HorizontalPodAutoscaler is simulated by its documented algorithm. Every 15 s each metric proposes a number
of pods in the ratio of value to target, unless that is within 10 % of 1. The largest proposal counts; going down, the
largest within the stabilisation window. Both ways the policies bound how fast pods change. Targets, window and policies
are read from the chart's values.yaml. A new pod serves after 45 s. The state of a number of pods at a rate is that of
`tome-server plan`, with 1,500 requests for each pair. Each 15 s are thus in the steady state of their rate: a queue
that builds up for longer is not simulated.

The model is the bundled one as measured on a CPU (benchmarks/profiles/fashion.json); budgets are 120 ms.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tqdm import tqdm

from tome_server.simulation.capacity import Plan, Question, load_replica

STORED = Path(__file__).parent / "profiles" / "fashion.json"
VALUES = Path(__file__).parents[1] / "deploy/helm/tome-serving/values.yaml"
TICK, START = 15, 45
TOLERANCE = 0.1
SECONDS = 4800
BUDGET = 0.12
REQUESTS = 1500


def ramp(at: int) -> int:
    """Return requests a second: from 300 to 1000 within twenty minutes, in steps of 50."""
    return 300 + 50 * (14 * min(max(at - 600, 0), 1200) // 1200)


def jump(at: int) -> int:
    """Return requests a second: 300, and 1000 from one moment to the next."""
    return 300 if at < 600 else 1000


def fall(at: int) -> int:
    """Return requests a second: 1000, and 300 from one moment to the next."""
    return 1000 if at < 600 else 300


TRAFFIC: Mapping[str, tuple[Callable[[int], int], int]] = {"ramp": (ramp, 5), "jump": (jump, 5), "fall": (fall, 14)}


@dataclass(frozen=True)
class Pace:
    """How fast pods may be added, or removed."""

    stabilizationSeconds: int  # noqa: N815 - named as in the chart
    pods: int
    percent: int
    periodSeconds: int  # noqa: N815


@dataclass(frozen=True)
class Autoscaler:
    """Settings of an autoscaler."""

    targets: Mapping[str, float]
    window: int
    """Seconds that metrics are averaged over."""
    up: Pace
    down: Pace
    most: int = 40
    least: int = 2

    @classmethod
    def of_the_chart(cls) -> "Autoscaler":
        """Return the chart's, at its defaults."""
        values = yaml.safe_load(VALUES.read_text())["autoscaling"]
        window = {"s": 1, "m": 60}[values["window"][-1]] * int(values["window"][:-1])
        return cls(values["targets"], window, Pace(**values["scaleUp"]), Pace(**values["scaleDown"]))


@dataclass(frozen=True)
class State:
    """The state of a number of pods at a rate."""

    rShare: float  # noqa: N815
    refusedShare: float  # noqa: N815
    busy: float
    effective_accuracy: float


@dataclass
class Pods:
    """The states of numbers of pods at rates, each simulated once."""

    known: dict[tuple[int, int], State] = field(default_factory=dict)

    @cached_property
    def _replica(self) -> tuple[Any, tuple[float, ...]]:
        _, profile, quality = load_replica(STORED, None)
        return profile, quality

    def state(self, rate: int, pods: int) -> State:
        """Return the state of `pods` at `rate` requests a second."""
        if (rate, pods) not in self.known:
            profile, quality = self._replica
            question = Question(rate=rate, budgets=(BUDGET,), attainment=0.99, requests=REQUESTS)
            result = Plan(question, profile, quality).point("price", pods).result
            self.known[rate, pods] = State(
                rShare=result.mean_r / profile.rs[-1],
                refusedShare=(result.refused + result.shed) / result.requests,
                busy=result.busy,
                effective_accuracy=result.effective_accuracy,
            )
        return self.known[rate, pods]


@dataclass(frozen=True)
class Moment:
    """Fifteen seconds of a run."""

    at: int
    rate: int
    wanted: int
    """The number of pods that the autoscaler wants."""
    serving: int
    state: State


def run(autoscaler: Autoscaler, traffic: Callable[[int], int], pods: int, known: Pods) -> list[Moment]:
    """Return the moments of a run that begins with `pods`."""
    moments: list[Moment] = []
    proposals: list[tuple[int, int]] = []
    changes: list[tuple[int, int]] = []
    starting: list[int] = []
    for at in range(0, SECONDS, TICK):
        starting = [ready for ready in starting if ready > at]
        serving = pods - len(starting)
        rate = traffic(at)
        moments.append(Moment(at, rate, pods, serving, known.state(rate, serving)))
        seen = moments[-max(1, autoscaler.window // TICK) :]
        proposal = 0
        for name, target in autoscaler.targets.items():
            ratio = fmean(getattr(moment.state, name) for moment in seen) / target
            proposal = max(proposal, pods if abs(ratio - 1) <= TOLERANCE else math.ceil(serving * ratio))
        proposals.append((at, proposal))
        wanted = _paced(autoscaler, at, pods, proposals, changes)
        if wanted != pods:
            changes.append((at, wanted - pods))
            starting += [at + START] * (wanted - pods)
            # Pods that are still starting go first.
            starting = starting[: len(starting) + min(0, wanted - pods)]
            pods = wanted
    return moments


def _paced(
    autoscaler: Autoscaler, at: int, pods: int, proposals: Sequence[tuple[int, int]], changes: Sequence[tuple[int, int]]
) -> int:
    up, down = autoscaler.up, autoscaler.down
    lately = min(proposal for when, proposal in proposals if when >= at - up.stabilizationSeconds)
    wanted = min(max(lately, autoscaler.least), autoscaler.most)
    if wanted > pods:
        before = pods - sum(change for when, change in changes if when > at - up.periodSeconds and change > 0)
        return max(pods, min(wanted, max(before + up.pods, math.ceil(before * (1 + up.percent / 100)))))
    wanted = max(proposal for when, proposal in proposals if when >= at - down.stabilizationSeconds)
    wanted = min(max(wanted, autoscaler.least), pods)
    before = pods - sum(change for when, change in changes if when > at - down.periodSeconds and change < 0)
    return min(pods, max(wanted, min(before - down.pods, math.floor(before * (1 - down.percent / 100)))))


@dataclass(frozen=True)
class Outcome:
    """A run in figures. Means are over requests."""

    traffic: str
    autoscaler: str
    in_time: float
    """Share of requests that were not refused."""
    worst: float
    """The same of the worst 15 s."""
    r_share: float
    effective_accuracy: float
    pods: float
    """Mean over time."""
    most: int
    last: int


def outcome(traffic: str, autoscaler: str, moments: Sequence[Moment]) -> Outcome:
    """Return a run in figures."""
    requests = sum(moment.rate for moment in moments)

    def mean(value: Callable[[State], float]) -> float:
        return sum(moment.rate * value(moment.state) for moment in moments) / requests

    return Outcome(
        traffic,
        autoscaler,
        in_time=1 - mean(lambda state: state.refusedShare),
        worst=1 - max(moment.state.refusedShare for moment in moments),
        r_share=mean(lambda state: state.rShare),
        effective_accuracy=100 * mean(lambda state: state.effective_accuracy),
        pods=fmean(moment.wanted for moment in moments),
        most=max(moment.wanted for moment in moments),
        last=moments[-1].wanted,
    )


def autoscalers() -> dict[str, Autoscaler]:
    """Return the chart's autoscaler, and two by how busy devices are alone, at the same pace."""
    chart = Autoscaler.of_the_chart()
    pace = {"window": chart.window, "up": chart.up, "down": chart.down}
    return {
        "the chart's": chart,
        "busy 90 % alone": Autoscaler({"busy": 0.9}, **pace),  # type: ignore[arg-type]
        "busy 60 % alone": Autoscaler({"busy": 0.6}, **pace),  # type: ignore[arg-type]
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    known = Pods()
    cases = [(shape, name) for shape in TRAFFIC for name in autoscalers()]
    outcomes = []
    for shape, name in tqdm(cases, disable=not sys.stderr.isatty()):
        traffic, pods = TRAFFIC[shape]
        outcomes.append(outcome(shape, name, run(autoscalers()[name], traffic, pods, known)))
    if args.json:
        print(json.dumps([asdict(one) for one in outcomes], indent=2))
        return
    print(
        "| traffic | autoscaler | in time | worst 15 s | r, of the largest | effective accuracy | pods | most | last |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for one in outcomes:
        print(
            f"| {one.traffic} | {one.autoscaler} | {one.in_time:.2%} | {one.worst:.1%} | {one.r_share:.0%} "
            f"| {one.effective_accuracy:.2f} | {one.pods:.1f} | {one.most} | {one.last} |"
        )


if __name__ == "__main__":
    main()
