"""The status contract in HTTP's terms: the gRPC status of each refusal, and what it is called here."""

import json
import math

from google.rpc import code_pb2
from starlette.responses import Response

from tome_server.errors import ClientLimitError, InfeasibleError, OverloadedError, TooLargeError
from tome_server.rpc.errors import code_name, status_of

# As google.rpc.Code says that its codes map to HTTP.
_HTTP = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}
_TOO_LARGE = 413
_INTERNAL = 500


def refusal(error: Exception) -> Response:
    """Return the answer for `error`: why, in words and as a gRPC code, and where it helps what to ask instead."""
    status = status_of(error)
    answer: dict[str, object] = {"error": status.message, "code": code_name(status)}
    headers = {}
    if isinstance(error, InfeasibleError):
        answer["smallest_latency_ms"] = math.ceil(error.smallest * 1e3)
    if isinstance(error, OverloadedError | ClientLimitError):
        headers["Retry-After"] = str(math.ceil(error.retry_after))  # whole seconds is all that HTTP can say
    code = _TOO_LARGE if isinstance(error, TooLargeError) else _HTTP.get(status.code, _INTERNAL)
    return Response(json.dumps(answer), code, headers, "application/json")
