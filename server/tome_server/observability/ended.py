"""What is told of each request once it has ended, to logs and traces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Answered:
    """A prediction that was made, and what it took."""

    r: int
    tokens_in: int
    tokens_out: int
    flops: int
    flops_saved: int
    decode: float
    """seconds, as are the next four"""
    queue: float
    compute: float
    total: float
    slack: float | None
    """Deadline less the time of the answer; None without a deadline."""
    batch_size: int


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """A request with its answer, or with why it has none."""

    model: str
    seconds: float
    """Since it arrived."""
    answer: Answered | None
    error: BaseException | None
    budget: float | None = None
    """Seconds that it might take, infinite without a deadline; None where that isn't known, as of an unknown model."""


# Called in the task that the request was answered in, so that what `request_context` says of it holds. Must not raise
# or block.
Observer: TypeAlias = Callable[[RequestOutcome], None]


class Trace(Protocol):
    """A request's part of a trace."""

    @property
    def id(self) -> str | None:
        """32 hexadecimal digits, if the trace is recorded."""

    def end(self, ended: RequestOutcome) -> None:
        """Called once, in the task that the request was answered in. Must not raise or block."""


# Begins what a request is of a trace, so many seconds after it arrived, in the task that it is answered in.
Tracer: TypeAlias = Callable[[float], Trace]
