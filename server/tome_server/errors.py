"""Why a request or a model is refused. `api.status` says which gRPC status each becomes."""

import math
from collections.abc import Sequence


class RequestError(Exception):
    """A request that gets no prediction; the message is for the caller to act on."""


class InvalidRequestError(RequestError):
    """The request itself is wrong, and would be on any server."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        """Name of the request's field."""
        self.description = description


class EncodingError(InvalidRequestError):
    """The request is encoded in a way that isn't taken."""


class SlowBodyError(InvalidRequestError):
    """The body of the request did not arrive in time."""


class ClientGoneError(RequestError):
    """The client closed its connection before there was an answer."""

    def __init__(self) -> None:
        super().__init__("the client closed its connection")


class UnknownModelError(RequestError):
    """No model of that name is hosted."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no model is named {name!r}; this server hosts {', '.join(known)}")
        self.name = name


class UnknownVersionError(RequestError):
    """A model is hosted in another version than the one asked for."""

    def __init__(self, name: str, version: str, served: int) -> None:
        super().__init__(f"{name} has no version {version!r} in service; version {served} is")
        self.name = f"{name}/{version}"


class InfeasibleError(RequestError):
    """The deadline can't be met, as far as the server can tell."""

    def __init__(self, smallest: float) -> None:
        # Upwards, so that a request with just that budget isn't refused for a rounding.
        milliseconds = max(1, math.ceil(smallest * 1e3))
        super().__init__(f"the deadline can't be met; the smallest latency possible now is {milliseconds} ms")
        self.smallest = smallest
        """The smallest latency budget, in seconds from arrival, that could be promised."""
        self.smallest_ms = milliseconds
        """The same as callers are told it, in whole milliseconds."""


class ExpiredError(RequestError):
    """The deadline passed before there was an answer."""

    def __init__(self, stage: str, budget: float) -> None:
        milliseconds = f"{budget * 1e3:.0f}" if budget >= 0.01 else f"{budget * 1e3:.2g}"
        super().__init__(f"the deadline passed during {stage}, {milliseconds} ms after arrival")
        self.stage = stage
        """decode, queue or compute"""


class OverloadedError(RequestError):
    """The server holds as many requests as it may."""

    def __init__(self, pending: int, retry_after: float) -> None:
        super().__init__(f"{pending} requests are waiting already; retry in {retry_after * 1e3:.0f} ms")
        self.retry_after = retry_after
        """seconds"""


class CrowdedError(OverloadedError):
    """The bodies of requests hold as much memory as they may together."""

    def __init__(self, most: int, retry_after: float) -> None:
        text = f"the bodies of requests may hold {most:,} bytes together; retry in {retry_after * 1e3:.0f} ms"
        RequestError.__init__(self, text)
        self.retry_after = retry_after


class TooLargeError(RequestError):
    """The request holds more than the server would hold at once, however idle; asking again won't help."""


class UnsupportedError(RequestError):
    """A part of a protocol that this server doesn't have."""


class ClientLimitError(RequestError):
    """The client has as many requests in the server as one client may."""

    def __init__(self, most: int, retry_after: float) -> None:
        super().__init__(f"{most} requests of this client are waiting already; retry in {retry_after * 1e3:.0f} ms")
        self.retry_after = retry_after
        """seconds"""


class UnavailableError(RequestError):
    """The server is loading or draining; another replica may answer now."""


class ModelFailedError(RequestError):
    """The model raised on this very input."""


class NoMemoryError(RequestError):
    """The device lacks the memory to run even this one image alone; it may have it later, or elsewhere."""


class ConfigError(Exception):
    """The configuration can't be used; the message is for the person who wrote it."""


class ModelLoadError(Exception):
    """A model can't be hosted as configured; the message is for the operator to act on."""


class DeviceDiedError(Exception):
    """The process that owns the device has ended by itself; the server ends with it, to be started anew."""


class OutOfMemoryError(Exception):
    """The device has not the memory for what it was told to do; what was there before is unharmed."""


class DatasetError(ValueError):
    """A data set cannot be read; the message says which file and what is wrong."""


class PortInUseError(Exception):
    """An address can't be listened on."""
