"""Durations as people write and read them."""

from __future__ import annotations

import math
import re

_WRITTEN = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>ms|s)?")


def parse_duration(text: str) -> float:
    """Returns the seconds that a text such as "50ms", "0.2s" or "1.5" stands for.

    Raises:
        ValueError: Written otherwise, or not more than nothing.
    """
    written = _WRITTEN.fullmatch(text.strip())
    seconds = 0.0
    if written:
        seconds = float(written["number"]) / (1000 if written["unit"] == "ms" else 1)
    if not 0 < seconds < math.inf:
        raise ValueError(f"not a duration: {text!r}; write it like 50ms, 0.2s, or 1.5 for seconds, above 0")
    return seconds


def milliseconds(seconds: float) -> str:
    """Returns a duration for a table, such as "12.3 ms"."""
    return f"{seconds * 1e3:.1f} ms"
