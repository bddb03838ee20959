"""The parameters of a request: its time, and bounds of r and quality."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tome_server.api.oip.messages import Parameter, shown
from tome_server.errors import InvalidRequestError

# About 10,000 years, as our own API bounds a budget.
_LONGEST = 315_576_000_000.0
_FINAL = "triton_enable_empty_final_response"
_KNOWN = (
    "latency_budget_ms", "no_deadline", "timeout", "priority", "r", "min_r", "max_r", "min_quality",
    "normalize_features", "float16_features", _FINAL,
)  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """The parameters of a request, checked."""

    budget: float | None = None
    """Seconds from arrival: None for the model's default, infinite if the request has no deadline."""
    r: int | None = None
    min_r: int | None = None
    max_r: int | None = None
    min_quality: float | None = None
    normalize_features: bool = False
    """Whether features are divided by their Euclidean length."""
    float16_features: bool = False
    """Whether features are returned as FP16."""
    mark_final: bool = False
    """Whether the response says that it is the request's last one, which it always is."""


def terms_of(parameters: Mapping[str, Parameter]) -> Terms:
    """Return a request's parameters, checked. Raises InvalidRequestError for one that is unknown or of another type.

    `latency_budget_ms` and `no_deadline` mean what they mean in our own API. `timeout` (µs, 0 for none) is that of
    Triton's schedule policy extension; the lesser of it and the budget counts. `priority` is accepted and ignored:
    deadlines decide the order.
    """
    for name in parameters:
        if name not in _KNOWN:
            raise InvalidRequestError("parameters", f"{shown(name)} is none of {', '.join(_KNOWN)}")
    if (_integer(parameters, "priority") or 0) < 0:
        raise InvalidRequestError("parameters.priority", "must be 0 or more")
    return Terms(
        budget=_budget(parameters),
        r=_integer(parameters, "r"),
        min_r=_integer(parameters, "min_r"),
        max_r=_integer(parameters, "max_r"),
        min_quality=_number(parameters, "min_quality"),
        normalize_features=_boolean(parameters, "normalize_features"),
        float16_features=_boolean(parameters, "float16_features"),
        mark_final=_boolean(parameters, _FINAL),
    )


def _budget(parameters: Mapping[str, Parameter]) -> float | None:
    milliseconds, timeout = _number(parameters, "latency_budget_ms"), _timeout(parameters)
    if _boolean(parameters, "no_deadline"):
        if milliseconds is not None or timeout is not None:
            raise InvalidRequestError("parameters.no_deadline", "can't go with latency_budget_ms or timeout")
        return math.inf
    if milliseconds is None:
        return timeout
    budget = seconds_of(milliseconds, "parameters.latency_budget_ms")
    return budget if timeout is None else min(budget, timeout)


def seconds_of(milliseconds: float, field: str) -> float:
    """Return a latency budget in seconds. Raises InvalidRequestError, naming `field`, if it can't be one."""
    if not 0 < milliseconds <= _LONGEST * 1e3:
        raise InvalidRequestError(field, f"must be above 0 and at most {_LONGEST * 1e3:.0f}, and is {milliseconds:g}")
    return milliseconds / 1e3


def _timeout(parameters: Mapping[str, Parameter]) -> float | None:
    microseconds = _integer(parameters, "timeout") or 0
    if not 0 <= microseconds <= _LONGEST * 1e6:
        raise InvalidRequestError("parameters.timeout", f"must lie in 0..{_LONGEST * 1e6:.0f} µs")
    return microseconds / 1e6 or None


def _boolean(parameters: Mapping[str, Parameter], name: str) -> bool:
    value = parameters.get(name, False)
    if isinstance(value, bool):
        return value
    raise _wrong_type(name, "true or false", value)


def _integer(parameters: Mapping[str, Parameter], name: str) -> int | None:
    value = parameters.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise _wrong_type(name, "an integer", value)


def _number(parameters: Mapping[str, Parameter], name: str) -> float | None:
    value = parameters.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _wrong_type(name, "a number", value)


def _wrong_type(name: str, wanted: str, value: Parameter) -> InvalidRequestError:
    kind = {bool: "a boolean", int: "an integer", float: "a floating-point number", str: "a string"}[type(value)]
    return InvalidRequestError(f"parameters.{name}", f"must be {wanted}, and is {kind}")
