"""The status contract: the gRPC status and details of each error."""

import asyncio
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from tome_server.errors import (
    ClientGoneError,
    ClientLimitError,
    CrowdedError,
    EncodingError,
    ExpiredError,
    InfeasibleError,
    InvalidRequestError,
    ModelFailedError,
    NoMemoryError,
    OverloadedError,
    RequestError,
    SlowBodyError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
    UnsupportedError,
)

DOMAIN = "tome-serving"
_CODES = {
    InvalidRequestError: code_pb2.INVALID_ARGUMENT,
    EncodingError: code_pb2.INVALID_ARGUMENT,
    SlowBodyError: code_pb2.INVALID_ARGUMENT,
    ClientGoneError: code_pb2.CANCELLED,
    UnknownModelError: code_pb2.NOT_FOUND,
    UnknownVersionError: code_pb2.NOT_FOUND,
    InfeasibleError: code_pb2.DEADLINE_EXCEEDED,
    ExpiredError: code_pb2.DEADLINE_EXCEEDED,
    OverloadedError: code_pb2.RESOURCE_EXHAUSTED,
    CrowdedError: code_pb2.RESOURCE_EXHAUSTED,
    TooLargeError: code_pb2.RESOURCE_EXHAUSTED,
    NoMemoryError: code_pb2.RESOURCE_EXHAUSTED,
    UnsupportedError: code_pb2.UNIMPLEMENTED,
    ClientLimitError: code_pb2.RESOURCE_EXHAUSTED,
    UnavailableError: code_pb2.UNAVAILABLE,
    ModelFailedError: code_pb2.INTERNAL,
}


def status_of(error: Exception) -> status_pb2.Status:
    """Return the status for `error`. Anything but a RequestError becomes INTERNAL, without its text."""
    if not isinstance(error, RequestError):
        return status_pb2.Status(code=code_pb2.INTERNAL, message="the server failed; its log says why")
    return status_pb2.Status(code=_CODES[type(error)], message=str(error), details=_details(error))


def code_name(status: status_pb2.Status) -> str:
    """Return a status's code in words, as in INVALID_ARGUMENT."""
    return str(code_pb2.Code.Name(status.code))


async def abort(context: "grpc.aio.ServicerContext[object, object]", status: status_pb2.Status) -> NoReturn:
    """End the call with `status` and its details. If the queue is full, a trailer says when clients may retry."""
    trailers = [*(rpc_status.to_status(status).trailing_metadata or ())]
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            trailers.append(("grpc-retry-pushback-ms", str(max(1, info.retry_delay.ToMilliseconds()))))
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    try:
        await context.abort(code, status.message, tuple(trailers))
    except grpc.aio.InternalError:
        # gRPC has ended the call itself meanwhile, for a message that is too large. A call that is cancelled ends
        # without a line in the log.
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")


def _details(error: RequestError) -> list[Any]:
    match error:
        case InvalidRequestError():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
            return _packed(error_details_pb2.BadRequest(field_violations=[violation]))
        case UnknownModelError() | UnknownVersionError():
            return _packed(
                error_details_pb2.ResourceInfo(resource_type="model", resource_name=error.name, description=str(error))
            )
        case InfeasibleError():
            metadata = {"smallest_latency_ms": str(error.smallest_ms)}
            return _packed(error_details_pb2.ErrorInfo(reason="INFEASIBLE", domain=DOMAIN, metadata=metadata))
        case ExpiredError():
            return _packed(
                error_details_pb2.ErrorInfo(reason="EXPIRED", domain=DOMAIN, metadata={"stage": error.stage})
            )
        case OverloadedError() | ClientLimitError():
            delay = Duration()
            delay.FromNanoseconds(round(error.retry_after * 1e9))
            return _packed(error_details_pb2.RetryInfo(retry_delay=delay))
        case _:
            return []


def _packed(detail: Message) -> list[Any]:
    packed = Any()
    packed.Pack(detail)
    return [packed]
