"""Durations and latency budgets in flags, settings files and traces.

The client and the server read them by this one grammar: a number and its unit. A number without a unit is refused,
since 500 may be meant in milliseconds or in seconds; 0 needs no unit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

NO_DEADLINE = "none"
"""The text for no deadline."""

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_WRITTEN = re.compile(rf"({_NUMBER})\s*(us|ms|s|m)?")

PATTERN = rf"{_NUMBER}\s*(?:us|ms|s|m)|0+\.?0*|\.0+"
"""The grammar of durations as a regular expression, without what JSON Schema does not support."""

_MIX_FORMS = "write for example 50ms, mix:50ms,200ms or mix:50ms=3,200ms=1"


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests that have the same latency budget."""

    budget: float
    """Seconds; infinite for requests without a deadline."""
    weight: float = 1.0
    """How many requests there are of this class, relative to the other classes."""


def parse_duration(text: str) -> float:
    """Returns the seconds that a text such as "50ms", "1.5s", "2m" or "0" stands for.

    Raises:
        ValueError: The text is not a duration, or is a number without a unit.
    """
    written = _WRITTEN.fullmatch(text.strip())
    seconds = float(written[1]) * _UNITS[written[2] or "s"] if written else math.inf
    if written is None or not seconds < math.inf:
        raise ValueError(f"{text!r} is not a duration; write for example 50ms, 1.5s or 2m")
    if written[2] is None and seconds > 0:
        raise ValueError(needs_unit(written[1]))
    return seconds


def needs_unit(number: object) -> str:
    """Returns the message for a number without a unit."""
    return f"{number} needs a unit: {number}ms or {number}s"


def parse_positive_duration(text: str) -> float:
    """Returns the seconds that a text stands for, which must be above 0.

    Raises:
        ValueError: The text is not a duration, is a number without a unit, or is 0.
    """
    if seconds := parse_duration(text):
        return seconds
    raise ValueError(f"{text!r} must be above 0; write for example 50ms, 1.5s or 2m")


def parse_budget(text: str) -> float:
    """Returns the seconds of a latency budget such as "50ms"; for "none", which means no deadline, infinity.

    Raises:
        ValueError: The text is not a duration above 0, or is a number without a unit.
    """
    return math.inf if text.strip() == NO_DEADLINE else parse_positive_duration(text)


def parse_budgets(text: str) -> tuple[BudgetClass, ...]:
    """Returns the classes of a budget or a mix: "100ms", "mix:50ms,200ms,none" or "mix:50ms=3,200ms=1".

    In the last, three of four requests have 50 ms.

    Raises:
        ValueError: The text is neither.
    """
    kind, colon, classes = text.partition(":")
    if not colon:
        return (BudgetClass(parse_budget(text)),)
    if kind != "mix":
        raise ValueError(f"{text!r} is not a budget; {_MIX_FORMS}")
    return tuple(_budget_class(one, text) for one in classes.split(","))


def duration_text(seconds: float) -> str:
    """Returns a duration in the form that `parse_budget` reads, such as "50ms"; beyond six digits it is rounded up."""
    if seconds == math.inf:
        return NO_DEADLINE
    if seconds == 0:
        return "0s"
    unit = "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"
    number = seconds / _UNITS[unit]
    # The division may add a digit in the sixteenth place, which must not be rounded up.
    digits = 5 - math.floor(math.log10(number))
    rounded = math.ceil(round(number * 10.0**digits, 6)) / 10.0**digits
    return f"{rounded:.12f}".rstrip("0").rstrip(".") + unit


def _budget_class(text: str, mix: str) -> BudgetClass:
    budget, equals, weight = text.partition("=")
    try:
        times = float(weight) if equals else 1.0
    except ValueError:
        times = math.nan
    if not budget.strip() or math.isnan(times):
        raise ValueError(f"{mix!r} is not a budget; {_MIX_FORMS}")
    if not 0 < times < math.inf:
        raise ValueError(f"the weight of a budget must be above 0; got {text!r}")
    return BudgetClass(parse_budget(budget), times)
