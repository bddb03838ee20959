"""Durations as people write and read them."""

from __future__ import annotations

import math
import re

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_WRITTEN = re.compile(r"(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)\s*(?P<unit>us|ms|s|m)?")


def parse_duration(text: str) -> float:
    """Returns the seconds that a text such as "50ms", "0.2s", "2m" or "1.5" stands for.

    Raises:
        ValueError: Written otherwise, or not more than nothing.
    """
    written = _WRITTEN.fullmatch(text.strip())
    seconds = 0.0
    if written:
        seconds = float(written["number"]) * _UNITS[written["unit"] or "s"]
    if not 0 < seconds < math.inf:
        raise ValueError(f"not a duration: {text!r}; write it like 50ms, 0.2s, or 1.5 for seconds, above 0")
    return seconds


def milliseconds(seconds: float) -> str:
    """Returns a duration for a table, such as "12.3 ms"."""
    return f"{seconds * 1e3:.1f} ms"
