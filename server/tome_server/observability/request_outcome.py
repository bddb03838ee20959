"""How a request ended: what logs and traces are given of each request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tome_server.mac_count import MacCount


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds."""

    decode: float
    queue: float
    compute: float
    predicted: float
    """What the batch was expected to take."""
    total: float
    slack: float | None
    """Deadline less the time of the answer; None without a deadline."""
    batch_size: int

    @property
    def reply(self) -> float:
        """From the end of the batch to the finished answer."""
        return self.total - self.decode - self.queue - self.compute


class Prediction(Protocol):
    """What observers read of a reply."""

    @property
    def r(self) -> int:
        """The r that the request ran at."""

    @property
    def cost(self) -> MacCount:
        """Tokens and operations."""

    @property
    def flops(self) -> int:
        """Operations done."""

    @property
    def flops_saved(self) -> int:
        """Operations the unmerged model would have done, less those done."""

    @property
    def timing(self) -> Timing:
        """Where the time went."""


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """A request with its reply, or with why it has none."""

    model: str
    seconds: float
    """Since it arrived."""
    reply: Prediction | None
    error: BaseException | None
    budget: float | None = None
    """Seconds that it might take, infinite without a deadline; None if that isn't known, as for an unknown model."""


# Called in the task that the request was answered in, so that `request_context` is the request's. Must neither raise
# nor block.
Observer: TypeAlias = Callable[[RequestOutcome], None]


class Trace(Protocol):
    """A request's part of a trace."""

    @property
    def id(self) -> str | None:
        """32 hexadecimal digits if the trace is recorded, else None."""

    def end(self, outcome: RequestOutcome) -> None:
        """Called once, in the task that the request was answered in. Must neither raise nor block."""


# Begins a request's part of a trace, in the task that the request is answered in. Takes the seconds since it arrived.
Tracer: TypeAlias = Callable[[float], Trace]
