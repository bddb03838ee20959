"""Traces: text files of recorded requests, for the load generator and the simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tome_api.durations import parse_budget


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at: float
    """Seconds since the start."""
    budget: float | None = None
    """Seconds until the answer must be there; infinite for no deadline; None if the line names no budget."""


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """Reads a trace. A line has the seconds since the start and, optionally, a budget: `0.0132 50ms` or `0.02 none`.

    Empty lines, and what follows a `#`, are ignored. The file is UTF-8, with or without a byte order mark.

    Raises:
        ValueError: A line is wrong or goes back in time, in which case the message has its number; or the file has no
            request, or is not UTF-8.
        OSError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the file is not UTF-8 text: {error.reason}") from error
    requests: list[Arrival] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split(maxsplit=1)
        if not words:
            continue
        try:
            requests.append(_request(words, requests[-1].at if requests else 0.0))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not requests:
        raise ValueError(f"{path}: there is no request in it")
    return tuple(requests)


def _request(words: Sequence[str], earliest: float) -> Arrival:
    try:
        at = float(words[0])
    except ValueError:
        raise ValueError(
            f"{words[0]!r} is not a number of seconds; write the time and perhaps a budget, such as `0.0132 50ms`"
        ) from None
    if not earliest <= at < math.inf:
        raise ValueError(f"times must not be negative, infinite or go back; got {words[0]} after {earliest:g}")
    return Arrival(at, parse_budget(words[1]) if len(words) == 2 else None)
