"""How requests ended: what a run returns, and what it reports while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tome_client.load.plan import LoadPlan
from tome_client.results import Merging, ModelInfo, Timing


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one request."""

    at: float
    """When it was meant to be sent, in seconds since the start of the measured run."""
    lag: float
    """Seconds between then and when it was sent."""
    latency: float
    """Seconds from `at` to its answer or failure."""
    budget: float
    """Seconds from `at` within which the answer had to come; infinite for a request without a deadline."""
    image: str
    code: str
    """Name of the gRPC status code, "OK" for an answer."""
    reason: str | None = None
    """The server's reason for a failure, such as "INFEASIBLE"; None where it gave none."""
    merging: Merging | None = None
    """How much was merged; None without an answer, and for a server that does not report it."""
    timing: Timing | None = None
    """Where the server's time went; None without an answer, and over the Open Inference Protocol."""
    right: bool | None = None
    """Whether it was answered with the image's label; None for an image without a label, and for a model whose answers
    cannot be compared with it."""
    process: int = 0
    """Index of the load generator's process that sent it."""

    @property
    def answered(self) -> bool:
        """Whether there was an answer, late or not."""
        return self.code == "OK"

    @property
    def has_deadline(self) -> bool:
        """Whether the request had a finite budget."""
        return math.isfinite(self.budget)

    @property
    def attained(self) -> bool:
        """Whether there was an answer within the budget, or any answer if there was no deadline."""
        return self.answered and self.latency <= self.budget


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    at: float
    """Seconds since the start of the measured run; negative while warming up."""
    duration: float
    """Seconds that the measured run takes."""
    sent: int
    """Requests sent since then."""
    ended: int
    """Those of `sent` that were answered or failed."""
    judged: int
    """Those of `ended` that had a deadline."""
    attained: int
    """Those of `judged` that were answered in time."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A run and the ends of its requests, without those of the warm-up."""

    plan: LoadPlan
    model: ModelInfo
    """The model, as the server described it before the run. Over the Open Inference Protocol only its name, platform
    (as `architecture`) and input are known, and its number of classes if the shape of an output says it."""
    outcomes: tuple[Outcome, ...]
    """In order of completion."""
    duration: float
    """Seconds measured: those of the plan, or fewer if the run was stopped."""
    stopped: bool
    """Whether `stop` ended it early. Requests that had no answer by then are left out."""
