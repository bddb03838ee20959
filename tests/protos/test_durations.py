"""The one grammar of durations and budgets, which client and server share."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_api.durations import (
    BudgetClass,
    duration_text,
    parse_budget,
    parse_budgets,
    parse_duration,
    parse_positive_duration,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        ("0.2s", 0.2),
        ("1.5s", 1.5),
        (" 12.5 ms ", 0.0125),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("2m", 120.0),
        ("250us", 0.00025),
        ("0ms", 0.0),
        ("0", 0.0),
        ("0.0", 0.0),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["500", "0.5", ".5", "2.", " 7 "])
def test_a_number_without_a_unit_is_refused_with_both_ways_to_write_it(text: str) -> None:
    number = text.strip()
    for parse in (parse_duration, parse_positive_duration, parse_budget, parse_budgets):
        with pytest.raises(ValueError, match=f"^{number} needs a unit: {number}ms or {number}s$"):
            parse(text)


@pytest.mark.parametrize(
    "text", ["", "ms", "fast", "50 min", "1h", "-1s", "1e3", "1e3ms", "nan", "inf", "9" * 400 + "s"]
)
def test_anything_else_is_refused_with_the_forms_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration; write for example 50ms, 1\.5s or 2m"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0", "0ms", "0.0s"])
def test_nothing_is_refused_where_there_must_be_something(text: str) -> None:
    for parse in (parse_positive_duration, parse_budget, parse_budgets):
        with pytest.raises(ValueError, match="must be above 0"):
            parse(text)


def test_a_budget_may_be_none_and_then_never_ends() -> None:
    assert parse_budget("none") == parse_budget(" none ") == math.inf
    assert parse_budget("50ms") == 0.05
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration("none")


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("100ms", [BudgetClass(0.1)]),
        ("none", [BudgetClass(math.inf)]),
        ("mix:50ms,0.2s", [BudgetClass(0.05), BudgetClass(0.2)]),
        ("mix:50ms=3,200ms=0.5", [BudgetClass(0.05, 3), BudgetClass(0.2, 0.5)]),
        ("mix:50ms,none=2", [BudgetClass(0.05), BudgetClass(math.inf, 2)]),
    ],
)
def test_budgets_are_one_or_a_mix(text: str, classes: list[BudgetClass]) -> None:
    assert list(parse_budgets(text)) == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "'soon' is not a duration"),
        ("50ms,200ms", "'50ms,200ms' is not a duration"),
        ("max:50ms", "'max:50ms' is not a budget; write for example 50ms, mix:"),
        ("mix:", "'mix:' is not a budget; write for example 50ms, mix:"),
        ("mix:50ms,", "'mix:50ms,' is not a budget"),
        ("mix:50ms=much", "'mix:50ms=much' is not a budget"),
        ("mix:50ms=", "'mix:50ms=' is not a budget"),
        ("mix:50ms=nan", "'mix:50ms=nan' is not a budget"),
        ("mix:50ms=0", "weight of a budget must be above 0; got '50ms=0'"),
        ("mix:50ms=-1", "weight of a budget must be above 0; got '50ms=-1'"),
        ("mix:50ms=inf", "weight of a budget must be above 0; got '50ms=inf'"),
        ("mix:50,200ms", "50 needs a unit: 50ms or 50s"),
        ("mix:soon", "'soon' is not a duration"),
    ],
)
def test_other_budgets_are_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_budgets(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.05, "50ms"),
        (1.5, "1.5s"),
        (120, "120s"),
        (0.00025, "250us"),
        (1e-9, "0.001us"),
        (0.29, "290ms"),
        (1 / 3, "333.334ms"),
        (0, "0s"),
        (math.inf, "none"),
    ],
)
def test_a_duration_is_shown_as_one_would_write_it(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.floats(1e-9, 1e7))
def test_what_is_shown_of_a_duration_is_never_shorter_and_can_be_read_again(seconds: float) -> None:
    assert seconds * (1 - 1e-12) <= parse_budget(duration_text(seconds)) <= seconds * (1 + 2e-5)
