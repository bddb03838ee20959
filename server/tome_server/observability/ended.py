"""What is told of each request once it has ended, to logs and traces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


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
    slack: float
    """Deadline less the time of the answer."""
    batch_size: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request with its answer, or with why it has none."""

    model: str
    seconds: float
    """Since it arrived."""
    answer: Answered | None
    error: BaseException | None


# Called in the task that the request was answered in, so that what `caller` says of it holds. Must not raise or block.
Observer: TypeAlias = Callable[[Ended], None]
