"""A traceparent is read as W3C Trace Context says."""

import pytest

from tome_server.observability.trace_context import sampled_trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_a_recorded_trace_is_named(flags: str) -> None:
    assert sampled_trace_id(f"00-{TRACE}-{PARENT}-{flags}") == TRACE


def test_later_versions_may_add_fields() -> None:
    assert sampled_trace_id(f"01-{TRACE}-{PARENT}-01-what-comes-next") == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
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
def test_any_other_names_none(traceparent: str | None) -> None:
    assert sampled_trace_id(traceparent) is None
