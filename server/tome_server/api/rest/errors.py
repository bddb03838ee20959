"""The status contract over HTTP: the HTTP status and the JSON body for each error."""

import json
import math

from google.rpc import code_pb2
from starlette.responses import Response

from tome_server.api.rest.body import CODINGS
from tome_server.api.status import code_name, status_of
from tome_server.errors import (
    ClientLimitError,
    EncodingError,
    InfeasibleError,
    OverloadedError,
    SlowBodyError,
    TooLargeError,
)

# As google.rpc.Code says that its codes map to HTTP.
_HTTP = {
    code_pb2.CANCELLED: 499,  # as nginx has it in its logs; no client receives it
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
_TIMEOUT = 408
_TOO_LARGE = 413
_UNSUPPORTED_MEDIA = 415
_INTERNAL = 500


def refusal(error: Exception) -> Response:
    """Return the response for `error`: its message, its gRPC code, and what the client can do about it."""
    status = status_of(error)
    answer: dict[str, object] = {"error": status.message, "code": code_name(status)}
    headers = {}
    if isinstance(error, InfeasibleError):
        answer["smallest_latency_ms"] = error.smallest_ms
    if isinstance(error, OverloadedError | ClientLimitError):
        headers["Retry-After"] = str(math.ceil(error.retry_after))  # whole seconds is all that HTTP can say
    code = _HTTP.get(status.code, _INTERNAL)
    if isinstance(error, TooLargeError):
        code = _TOO_LARGE
    if isinstance(error, SlowBodyError):
        code, headers["Connection"] = _TIMEOUT, "close"
    if isinstance(error, EncodingError):
        code, headers["Accept-Encoding"] = _UNSUPPORTED_MEDIA, ", ".join(CODINGS)
    return Response(json.dumps(answer), code, headers, "application/json")
