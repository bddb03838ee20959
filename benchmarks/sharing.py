"""Two models on one device, in simulation: what is gained when each model's scheduler counts the other's requests too.

`gpu` and `cpu` are pairs of ViT-B/16, as benchmarks/devices.py has it, and a model five times as slow at five times
the SLO; `fashion` the bundled model as measured on a CPU and one three times as slow, at an SLO of 120 and of 240 ms.
Each gives half of the load, which is in shares of what the device can do at r = 0; requests come in bursts of CV² 4. A
batch takes just what the profile says. The device goes to the model whose earliest deadline is the earliest. `apart`,
each scheduler knows its own requests alone; `together`, all.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.devices import Device, devices
from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler, share_device
from tome_server.simulation.workload import Arrival, Steady, draw

LOADS = (0.55, 0.97, 1.2, 1.4)
CV2 = 4
SLOWER = {"gpu": 5.0, "cpu": 5.0, "fashion": 3.0}
LATER = {"gpu": 5.0, "cpu": 5.0, "fashion": 2.0}
FIGURES = {
    "admitted in time": ("kept", 100, "%"),
    "all in time": ("attainment", 100, "%"),
    "accuracy": ("effective_accuracy", 1, ""),
}


@dataclass(frozen=True)
class Model:
    """One of the models, and the requests for it."""

    profile: Profile
    quality: Sequence[float]
    """By level of the profile."""
    arrivals: Sequence[Arrival]


@dataclass(frozen=True)
class Result:
    """What became of the requests of all models."""

    requests: int
    refused: int
    shed: int
    in_time: int
    effective_accuracy: float

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered in time."""
        return self.in_time / self.requests

    @property
    def kept(self) -> float:
        """Share of those admitted that were answered in time."""
        return self.in_time / max(1, self.requests - self.refused)


class _Device:
    """A device that several models share, each with a scheduler of its own: what a server has."""

    def __init__(self, models: Sequence[Model], policy: str, *, together: bool) -> None:
        self.models = models
        self.schedulers: list[Scheduler[int]] = [
            Scheduler(Latency(model.profile), policy_named(policy, model.profile, model.quality)) for model in models
        ]
        if together:
            share_device(self.schedulers)
        self.running = False
        self.ends = -math.inf
        """When the batch that runs will end, or the last one ended."""
        self.refused = self.shed = self.in_time = 0
        self.worth = 0.0

    def submit(self, place: int, now: float, budget: float) -> None:
        """Take or refuse a request for one of the models."""
        scheduler = self.schedulers[place]
        scheduler.arrived(now, budget)
        try:
            scheduler.submit(Waiting(place, now, now + budget, 0, scheduler.latency.levels - 1), now, self.ends)
        except InfeasibleError:
            self.refused += 1

    def start(self, now: float) -> None:
        """Begin the next batch if nothing runs: the model with the earliest deadline has the device."""
        while not self.running and any(map(len, self.schedulers)):
            urgent = min((one for one in self.schedulers if len(one)), key=lambda one: one.deadline)
            decision = urgent.next(now)
            assert decision is not None
            self.shed += len(decision.shed)
            if not decision.batch:
                continue
            self.running, self.ends = True, now + urgent.latency.of_batch(decision.levels)
            for request, level in zip(decision.batch, decision.levels, strict=True):
                if self.ends <= request.deadline + 1e-9:
                    self.in_time += 1
                    self.worth += self.models[request.item].quality[level]


def serve(models: Sequence[Model], policy: str, *, together: bool) -> Result:
    """Return what becomes of the models' requests on one device, whose batches take what the profiles say."""
    device = _Device(models, policy, together=together)
    coming = sorted((one.at, place, one.budget) for place, model in enumerate(models) for one in model.arrivals)
    number, now = 0, 0.0
    while device.running or number < len(coming):
        following = coming[number][0] if number < len(coming) else math.inf
        if device.running and device.ends < following:
            now, device.running = device.ends, False
        else:
            now, place, budget = coming[number]
            number += 1
            device.submit(place, now, budget)
            # The decision sees all requests that arrive at the same moment.
            if number < len(coming) and coming[number][0] == now:
                continue
        device.start(now)
    requests = len(coming)
    return Result(requests, device.refused, device.shed, device.in_time, device.worth / max(1, requests))


def pair(device: Device, load: float, seed: int, seconds: float) -> list[Model]:
    """Return the device's model and its slower companion, each with half of the load."""
    profile, slower = device.profile, SLOWER[device.name]
    companion = replace(
        profile,
        p50=tuple(tuple(slower * value for value in row) for row in profile.p50),
        p95=tuple(tuple(slower * value for value in row) for row in profile.p95),
        extra_group=slower * profile.extra_group,
    )
    rate, rng = load / 2 * device.capacity, random.Random(seed)
    return [
        Model(one, device.quality, draw(Steady(speed, seconds), [slo], cv2=CV2, seed=rng.randrange(2**32)))
        for one, speed, slo in (
            (profile, rate, device.slo),
            (companion, rate / slower, device.slo * LATER[device.name]),
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="price", help="what chooses r (default: price)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to simulate each (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    rows = []
    for device in (device for device in devices() if device.name in SLOWER):
        for load in LOADS:
            pairs = [pair(device, load, seed, args.seconds) for seed in range(200, 200 + args.seeds)]
            row: dict[str, object] = {"device": device.name, "load": load}
            for name in ("apart", "together"):
                runs = [serve(models, args.policy, together=name == "together") for models in pairs]
                means = {key: sum(getattr(run, key) for run in runs) / len(runs) for key in ("attainment", "kept")}
                accuracy = sum(run.effective_accuracy for run in runs) / len(runs)
                row[name] = means | {"effective_accuracy": accuracy, "runs": [asdict(run) for run in runs]}
            rows.append(row)
            if not args.json:
                _print(row, header=len(rows) == 1)
    if args.json:
        print(json.dumps(rows, indent=2))
    return 0


def _print(row: dict[str, object], *, header: bool) -> None:
    if header:
        columns = ("device, load", *(f"{what}, {how}" for what in FIGURES for how in ("apart", "together")))
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    cells = [
        f"{row[name][key] * scale:.1f}{unit}"  # type: ignore[index]
        for key, scale, unit in FIGURES.values()
        for name in ("apart", "together")
    ]
    print(f"| {row['device']}, {row['load']:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
