"""What a run sends, and when: all of it is fixed before the run begins."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tome_api.durations import BudgetClass
from tome_client.load.arrivals import Arrivals, Renewal
from tome_client.load.images import Sample
from tome_client.requests import PredictOptions


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the schedule."""

    at: float
    """Seconds since the start of the measured run; negative while warming up."""
    budget: float
    """Seconds from then within which the answer must come; infinite for a request without a deadline."""
    sample: int
    """Index of its image."""


@dataclass(frozen=True, slots=True)
class OpenInference:
    """How requests are sent over the Open Inference Protocol.

    Raises:
        ValueError: A standard deviation is not above 0, or a mean is not a number.
    """

    input: str = ""
    """Name of the input that takes the image; empty for a model with one input."""
    datatype: str = ""
    """BYTES for the encoded file, UINT8 for pixels, FP32 for normalised pixels; empty for what the model's metadata
    says. Our own server gets files then."""
    mean: Sequence[float] = (0.0,)
    """With FP32: what is subtracted from pixels scaled to [0, 1], one value for all channels or one for each."""
    std: Sequence[float] = (1.0,)
    """With FP32: what they are divided by, likewise."""

    def __post_init__(self) -> None:
        if not all(0 < one < math.inf for one in self.std):
            raise ValueError(f"a standard deviation is above 0: --std; got {min(self.std)}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError("a mean is a finite number: --mean")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A run: what to send, when, and how long each answer may take.

    Raises:
        ValueError: There are no images, the duration is not positive, or requests have no budget.
    """

    samples: Sequence[Sample]
    """Sent equally often. The order is drawn again whenever all have been sent."""
    arrivals: Arrivals
    budgets: Sequence[BudgetClass] = ()
    """Each request draws one. May be empty only if the trace gives every request its own."""
    duration: float = 30.0
    """Seconds that are measured."""
    warmup: float = 0.0
    """Seconds before the measured ones, with requests at the same rate that are not counted."""
    seed: int = 0
    """The same plan and seed send the same requests at the same times. Rates that differ by a factor draw
    the same gaps, scaled."""
    options: PredictOptions = field(default_factory=PredictOptions)
    """The model, and the bounds of r. `budget`, `top_k`, `features` and `token_map` are ignored."""
    deadline_only: bool = False
    """Send the budget as the gRPC deadline alone, like a client that knows nothing of latency budgets."""
    grace: float = 1.0
    """Seconds beyond its budget until a request is given up, so that late answers are measured and the server's own
    refusals arrive. Not used with `deadline_only` or `oip`. A request without a deadline is never given up."""
    connections: int = 1
    """Connections of each process to the server, between which its requests take turns."""
    processes: int = 1
    """Processes that send the requests. Each sends every N-th request of the same schedule."""
    oip: OpenInference | None = None
    """Send the requests over the Open Inference Protocol, with budgets as gRPC deadlines; None for our own protocol."""

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("there is no image to send")
        if not 0 < self.duration < math.inf:
            raise ValueError(f"the duration of a run must be above 0; got {self.duration} s")
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"the warm-up must not be negative; got {self.warmup} s")
        if self.connections < 1:
            raise ValueError(f"a run needs at least one connection; got {self.connections}")
        if self.processes < 1:
            raise ValueError(f"a run needs at least one process; got {self.processes}")
        # With a trace, a warm-up needs budgets as well: its requests are not those of the trace.
        lacking = isinstance(self.arrivals, Renewal) or any(one.budget is None for one in self.arrivals.arrivals)
        if not self.budgets and lacking:
            raise ValueError(
                "every request needs a budget: --budget (none for no deadline), or one on each line of the trace"
            )
        if self.deadline_only and math.inf in self.possible_budgets():
            raise ValueError("--deadline-only sends budgets as gRPC deadlines; requests without a deadline have none")

    @property
    def allowed_lateness(self) -> float:
        """Seconds beyond its budget until a request is given up."""
        return 0.0 if self.deadline_only or self.oip else self.grace

    def possible_budgets(self) -> frozenset[float]:
        """Returns every budget that a request of the run may have."""
        own = () if isinstance(self.arrivals, Renewal) else self.arrivals.arrivals
        recorded = {one.budget for one in own if one.budget is not None}
        return frozenset(recorded.union(one.budget for one in self.budgets))

    def schedule(self) -> list[PlannedRequest]:
        """Returns every request of the run in the order of sending, those of the warm-up first."""
        # Each kind of choice has a generator of its own, so that another mix of budgets does not move the arrivals.
        early, times, budgets, images = (
            random.Random(f"{kind} {self.seed}") for kind in ("warm-up", "times", "budgets", "images")
        )
        warming = self.arrivals if isinstance(self.arrivals, Renewal) else Renewal(self.arrivals.rate)
        arrivals = [(one.at - self.warmup, one.budget) for one in warming.draw(self.warmup, early)]
        arrivals += [(one.at, one.budget) for one in self.arrivals.draw(self.duration, times)]
        values, weights = self._classes()
        order = _rounds(len(self.samples), images)
        return [
            PlannedRequest(at, budgets.choices(values, weights)[0] if budget is None else budget, next(order))
            for at, budget in arrivals
        ]

    def _classes(self) -> tuple[list[float], list[float]]:
        """Returns the budgets that requests without their own draw from, and how often each is drawn."""
        if self.budgets or isinstance(self.arrivals, Renewal):
            return [one.budget for one in self.budgets], [one.weight for one in self.budgets]
        # Only the warm-up of a trace needs them.
        own = [one.budget for one in self.arrivals.arrivals if one.budget is not None]
        return own, [1.0] * len(own)


def _rounds(count: int, rng: random.Random) -> Iterator[int]:
    order = list(range(count))
    while True:
        rng.shuffle(order)
        yield from order
