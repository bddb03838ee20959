"""A traceparent is read as W3C Trace Context says."""

import pytest

from tome_server.observability.trace_context import ParentSpan, TraceContext, trace_context

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def recorded_id(*traceparents: str) -> str | None:
    context = trace_context(traceparents)
    return context.recorded_id if context else None


@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_a_recorded_trace_is_named(flags: str) -> None:
    assert recorded_id(f"00-{TRACE}-{PARENT}-{flags}") == TRACE


def test_later_versions_may_add_fields() -> None:
    assert recorded_id(f"01-{TRACE}-{PARENT}-01-what-comes-next") == TRACE


@pytest.mark.parametrize("flags", ["00", "01"])
def test_the_callers_span_is_known_whether_it_is_recorded_or_not(flags: str) -> None:
    context = trace_context([f"00-{TRACE}-{PARENT}-{flags}"])
    assert context is not None
    assert context.parent == ParentSpan(TRACE, PARENT, sampled=flags == "01")


def test_a_malformed_one_is_kept_as_it_came_and_names_no_span() -> None:
    assert trace_context(["nonsense"]) == TraceContext("nonsense", None)


def test_of_several_none_holds() -> None:
    """The specification has a receiver ignore them, as it can't know which one is true."""
    assert trace_context([f"00-{TRACE}-{PARENT}-01"] * 2) is None


def test_without_any_there_is_no_context() -> None:
    assert trace_context([]) is None


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}-00",  # not recorded
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f" 00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
    ],
)
def test_any_other_names_none(traceparent: str) -> None:
    assert recorded_id(traceparent) is None
