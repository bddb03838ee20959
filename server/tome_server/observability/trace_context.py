"""Which trace a call belongs to, as W3C Trace Context says (https://www.w3.org/TR/trace-context/)."""

import re

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


def sampled_trace_id(traceparent: str | None) -> str | None:
    """Return the trace id, 32 hexadecimal digits, of a `traceparent` that is well formed and of a recorded trace.

    None for any other: the specification wants a malformed one ignored, and a trace that its caller doesn't record
    can't be looked up.
    """
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    valid = version != "ff" and not (version == "00" and more) and int(trace_id, 16) and int(parent_id, 16)
    return trace_id if valid and int(flags, 16) & _SAMPLED else None
