"""Durations as people write them, the same in settings, flags and traces."""

import math
import re

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
# The client has the same, for it imports nothing of the server.
PATTERN = r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(us|ms|s|m)?"


def seconds_in(text: str) -> float:
    """Return the seconds that a text such as "50ms", "1.5s", "2m" or "1.5" stands for. Raises ValueError for others."""
    found = re.fullmatch(PATTERN, text.strip())
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else math.inf
    if not seconds < math.inf:
        raise ValueError(f"{text!r} is no duration; write for example 50ms, 1.5s or 2m")
    return seconds
