import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.api.oip.attempts import attempt
from tome_server.api.oip.parameters import Terms, terms_of
from tome_server.errors import InvalidRequestError


def test_nothing_asked_is_nothing_bound() -> None:
    assert terms_of({}) == Terms(budget=None)


def test_each_parameter_arrives() -> None:
    given = {"r": 1, "min_r": 2, "max_r": 3, "min_quality": 1, "priority": 5, "latency_budget_ms": 1500}
    assert terms_of(given) == Terms(budget=1.5, r=1, min_r=2, max_r=3, min_quality=1.0)
    assert terms_of({"triton_enable_empty_final_response": True}).mark_final
    assert terms_of({"normalize_features": True}) == Terms(normalize_features=True)
    assert terms_of({"float16_features": True}) == Terms(float16_features=True)


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({}, None),
        ({"timeout": 0}, None),
        ({"timeout": 2_500_000}, 2.5),
        ({"timeout": 0, "latency_budget_ms": 0.5}, 0.0005),
        ({"timeout": 1_000_000, "latency_budget_ms": 2000}, 1.0),
        ({"timeout": 3_000_000, "latency_budget_ms": 2000}, 2.0),
        ({"no_deadline": True}, math.inf),
        ({"no_deadline": True, "timeout": 0}, math.inf),
        ({"no_deadline": False, "latency_budget_ms": 2000}, 2.0),
    ],
)
def test_the_least_time_counts(given: dict[str, Any], budget: float | None) -> None:
    assert terms_of(given).budget == budget


@pytest.mark.parametrize("other", [{"latency_budget_ms": 5.0}, {"timeout": 5}])
def test_a_request_has_a_budget_or_no_deadline(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        terms_of({"no_deadline": True, **other})
    assert caught.value.field == "parameters.no_deadline"


FLAGS = ("no_deadline", "normalize_features", "float16_features")
NAMES = ("latency_budget_ms", "timeout", "priority", "r", "min_r", "max_r", "min_quality", *FLAGS)
VALUES = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20))


@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=100)), VALUES, max_size=5))
def test_any_parameters_are_taken_or_refused_by_name(given: dict[str, Any]) -> None:
    terms, error = attempt(lambda: terms_of(given))
    if terms is None:
        assert isinstance(error, InvalidRequestError)
        assert error.field.split(".")[0] == "parameters"
        assert len(str(error)) < 400
    else:
        assert set(given) <= {*NAMES, "triton_enable_empty_final_response"}
        assert terms.budget is None or terms.budget > 0
