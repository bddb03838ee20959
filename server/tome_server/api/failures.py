"""What ends a call for an error that no part of the server foresaw: the contract's status, and one line of log."""

import logging

from google.rpc import status_pb2

from tome_server.api.status import status_of
from tome_server.errors import RequestError

log = logging.getLogger(__name__)


def final_status(error: Exception) -> status_pb2.Status:
    """Return the status with which a call ends for `error`. Anything but a RequestError is logged with its trace.

    To be called once for each call, or for each message of a stream.
    """
    if not isinstance(error, RequestError):
        log.error("unexpected error", exc_info=error)
    return status_of(error)
