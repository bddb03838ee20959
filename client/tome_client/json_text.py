"""The JSON that the commands print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_text(value: Any) -> str:
    """Returns indented JSON for `value`. Infinities and NaN become null, since JSON (RFC 8259) cannot express them."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def json_line(value: Any) -> str:
    """Returns the same in one line."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return value
