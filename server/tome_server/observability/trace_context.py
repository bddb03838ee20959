"""Which trace a call belongs to, as W3C Trace Context says (https://www.w3.org/TR/trace-context/)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class ParentSpan:
    """The caller's span, which a `traceparent` names."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    sampled: bool
    """Whether the caller records the trace."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A call's header `traceparent`."""

    traceparent: str
    """The header as it came."""
    parent: ParentSpan | None
    """What it says; None if it is malformed, which the specification wants ignored."""

    @property
    def recorded_id(self) -> str | None:
        """Id of the caller's trace, if the caller records it: no other can be looked up."""
        return self.parent.trace_id if self.parent and self.parent.sampled else None


def trace_context(traceparents: Sequence[str]) -> TraceContext | None:
    """Return the context that a call's `traceparent` headers give; None unless there is exactly one."""
    return TraceContext(traceparents[0], _parent(traceparents[0])) if len(traceparents) == 1 else None


def _parent(traceparent: str) -> ParentSpan | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    valid = version != "ff" and not (version == "00" and more) and int(trace_id, 16) and int(span_id, 16)
    return ParentSpan(trace_id, span_id, bool(int(flags, 16) & _SAMPLED)) if valid else None
