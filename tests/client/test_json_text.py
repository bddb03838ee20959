from __future__ import annotations

import json
import math
from typing import NoReturn

import pytest

from tome_client.json_text import json_text


def strict(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_null(value: float) -> None:
    text = json_text({"a": [value, 1.5, (value, "NaN")], "b": {"c": value}})
    read = json.loads(text, parse_constant=strict)
    assert read == {"a": [None, 1.5, [None, "NaN"]], "b": {"c": None}}


def test_all_else_stays_as_it_is() -> None:
    value = {"a": [], "b": {}, "c": "", "d": None, "e": True, "f": 10**20, "g": 1e-300, "h": [[1.0], "[2]"]}
    assert json_text(value) == json.dumps(value, indent=2)
