"""Requests and responses of the protocol, as values that gRPC's messages and HTTP's bodies are converted to."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tome_server.errors import InvalidRequestError, TooLargeError

Parameter: TypeAlias = bool | int | float | str

# NumPy's types for the datatypes in use, in the protocol's byte order. Elements of BYTES have no fixed size.
DTYPES: dict[str, np.dtype[Any]] = {
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
}
BYTES = "BYTES"
# A request with more is refused before any work is done for each: the elements of BYTES, the dimensions of a shape, and
# the parameters or outputs of a request.
MOST_ELEMENTS = 2**14
MOST_DIMENSIONS = 8
MOST_NAMED = 64
# Elements of a request or response that don't travel as bytes, and so are converted one by one.
MOST_TYPED = 4 * 2**20
# Bytes of such tensors that are converted in the event loop; more are converted in a thread.
MUCH = 2**18
# Elements that are converted at once.
_PART = 4096
# Characters of a caller's text that an error repeats: gRPC drops statuses of more than a few kilobytes.
_SHOWN = 60


@dataclass(frozen=True)
class Tensor:
    """A named array in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | Sequence[bytes]
    """Little-endian elements, or for BYTES one item for each element."""

    @property
    def raw(self) -> bytes:
        """All elements in the protocol's binary form."""
        return self.data if isinstance(self.data, bytes) else joined(self.data)

    def parts(self) -> Iterator[list[Any]]:
        """Yield the elements in parts, so that other threads get the interpreter between them."""
        data = self.data
        elements = np.frombuffer(data, DTYPES[self.datatype]) if isinstance(data, bytes) else data
        for start in range(0, len(elements), _PART):
            part = elements[start : start + _PART]
            yield part.tolist() if isinstance(part, np.ndarray) else list(part)


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request names."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class AsBytes:
    """Which outputs are returned as bytes instead of element by element."""

    every: bool
    """Applies to outputs that aren't named."""
    named: Mapping[str, bool] = field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Return whether an output is returned as bytes."""
        return self.named.get(name, self.every)


@dataclass(frozen=True)
class InferRequest:
    """Images for one model, which are answered together."""

    model: str
    """Empty for the first model."""
    input: Tensor
    version: str = ""
    """Empty for any version."""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: Sequence[RequestedOutput] = ()
    """Empty for the default outputs."""
    as_bytes: AsBytes = AsBytes(every=False)


@dataclass(frozen=True)
class InferResponse:
    """The outputs, and what was done for them in `parameters`."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    outputs: Sequence[Tensor]


def excerpt(text: str) -> str:
    """Return the start of a caller's text for an error's message, with unprintable characters escaped."""
    return shown(text)[1:-1]


def shown(text: str) -> str:
    """Return the same excerpt in quotes."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def check_datatype(datatype: str) -> None:
    """Raise InvalidRequestError unless the input can have this datatype."""
    if datatype not in ("FP32", "UINT8", BYTES):
        raise InvalidRequestError("image.datatype", f"must be FP32, UINT8 or BYTES, not {shown(datatype)}")


def check_count(field: str, count: int, most: int) -> None:
    """Raise InvalidRequestError if `field` holds more than `most` items."""
    if count > most:
        raise InvalidRequestError(field, f"holds {count:,}; at most {most:,} are taken")


def joined(elements: Sequence[bytes]) -> bytes:
    """Join elements of BYTES, each preceded by its length in four bytes."""
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def split(data: bytes, count: int) -> list[bytes]:
    """Split joined elements of BYTES, at most `count` of them.

    Raises InvalidRequestError if `data` holds more or is cut off, TooLargeError if `count` exceeds MOST_ELEMENTS.
    """
    if count > MOST_ELEMENTS:
        raise TooLargeError(f"{count:,} elements of BYTES; at most {MOST_ELEMENTS:,} are taken")
    elements: list[bytes] = []
    at = 0
    while at < len(data):
        if len(elements) == count:
            raise InvalidRequestError("image", f"holds more than the {count:,} elements that its shape says")
        start = at + 4
        if start > len(data):
            raise InvalidRequestError("image", f"ends within the length of element {len(elements)}")
        at = start + struct.unpack_from("<I", data, at)[0]
        if at > len(data):
            raise InvalidRequestError("image", f"ends within element {len(elements)}; lengths are four bytes each")
        elements.append(data[start:at])
    return elements
