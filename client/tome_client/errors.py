"""The client's exception: a gRPC status and the details that came with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tome_client.proxy import proxy_of

_CODES = {code.value[0]: code for code in grpc.StatusCode}

# The codes with which gRPC itself ends a call.
_UNANSWERED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

# Parts of gRPC's messages. They only shorten a message: if another release has other words, it is shown in full.
_TIMED_OUT = "Deadline Exceeded"
_PREFIX = re.compile(r".*; last error: (?:[A-Z_]+: )?")
_UNHEALTHY = "backend unhealthy"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that the server did not accept, and why."""

    field: str
    description: str


class TomeError(Exception):
    """A call, or one item of a stream, that got no answer.

    Attributes:
        code: The gRPC status code.
        message: A sentence for people.
        field_violations: The fields that were wrong, with INVALID_ARGUMENT.
        reason: Why a deadline could not be kept, with DEADLINE_EXCEEDED: "INFEASIBLE" if the server
            saw at once that it could not be, "EXPIRED" if it passed while the server worked on the
            request. None where the server gave no reason.
        metadata: Details of the reason, such as the stage in which the deadline passed.
        retry_delay: Seconds to wait before trying again, with RESOURCE_EXHAUSTED; None if the server named none.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        field_violations: tuple[FieldViolation, ...] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.field_violations = field_violations
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_delay = retry_delay

    @property
    def smallest_latency(self) -> float | None:
        """The smallest budget, in seconds, that the server could have kept at that time; None if it named none.

        It comes with the reason "INFEASIBLE".
        """
        try:
            return float(self.metadata["smallest_latency_ms"]) / 1e3
        except (KeyError, ValueError):
            return None

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def error_from_status(status: status_pb2.Status) -> TomeError:
    """Returns the error that a google.rpc.Status describes, as the items of a stream carry it."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return TomeError(code, status.message, **_details(status.details))


def error_from_rpc(error: grpc.RpcError, target: str) -> TomeError:
    """Returns the error that a failed call to `target` ended with."""
    code = error.code()
    message = error.details() or "no message"
    try:
        status = rpc_status.from_call(error)
        # Our servers send details with every error.
        answered = status is not None
    except (ValueError, DecodeError):  # A proxy rewrote the status; the details don't belong to it.
        status, answered = None, True
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{target} is unavailable: {message if answered else _shortened(message)}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not answered:
        said = "" if message == _TIMED_OUT else f": {message}"
        message = f"no answer from {target} within the timeout{said}"
    if code in _UNANSWERED and not answered and (proxy := proxy_of(target)):
        message += (
            f"; it was called through the proxy {proxy.address} ({proxy.variable}): "
            f"to connect directly, {proxy.way_out}"
        )
    return TomeError(code, message, **(_details(status.details) if status else {}))


def _shortened(message: str) -> str:
    if message.endswith(_UNHEALTHY):
        return "no server there is serving; what was reached is loading or stopping"
    return _PREFIX.sub("", message)


def ended_early(target: str) -> TomeError:
    """Returns the error of a stream that `target` ended with OK before it had answered every item."""
    return TomeError(grpc.StatusCode.UNKNOWN, f"{target} ended the stream before it had answered every item")


def _details(packed: Iterable[Any]) -> dict[str, Any]:
    """Returns TomeError's optional arguments, from the google.rpc messages that are known."""
    found: dict[str, Any] = {}
    for detail in packed:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            found["field_violations"] = tuple(
                FieldViolation(violation.field, violation.description) for violation in bad_request.field_violations
            )
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            found["reason"] = info.reason
            found["metadata"] = dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            found["retry_delay"] = retry.retry_delay.ToNanoseconds() / 1e9
    return found
