"""A request and its answer in the protocol's terms; gRPC and HTTP are two ways to write them down."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tome_server.errors import InvalidRequestError, TooLargeError

Parameter: TypeAlias = bool | int | float | str

# NumPy's types of the datatypes we use, in the protocol's byte order; an element of BYTES has no fixed size.
DTYPES: dict[str, np.dtype[Any]] = {
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
}
BYTES = "BYTES"
# More than these are refused before anything is done for each of them, while nobody else is served: the elements of
# BYTES, the dimensions of a shape, and the parameters or outputs of a request.
MOST_ELEMENTS = 2**14
MOST_DIMENSIONS = 8
MOST_NAMED = 64
# Elements of a request or an answer that don't travel as bytes: they are converted one by one.
MOST_TYPED = 4 * 2**20
# Bytes of tensors that are so converted in the event loop; more take a thread.
MUCH = 2**18
# Elements that are converted in one go.
_PART = 4096
# Characters of a caller's text that a refusal repeats: gRPC drops statuses of more than a few kilobytes.
_SHOWN = 60


@dataclass(frozen=True)
class Tensor:
    """A named array in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | Sequence[bytes]
    """Little-endian elements; of BYTES, one item an element."""

    @property
    def raw(self) -> bytes:
        """All elements as they travel in one piece."""
        return self.data if isinstance(self.data, bytes) else joined(self.data)

    def parts(self) -> Iterator[list[Any]]:
        """Yield the elements one part after the other, so that other threads have the interpreter in between."""
        data = self.data
        elements = np.frombuffer(data, DTYPES[self.datatype]) if isinstance(data, bytes) else data
        for start in range(0, len(elements), _PART):
            part = elements[start : start + _PART]
            yield part.tolist() if isinstance(part, np.ndarray) else list(part)


@dataclass(frozen=True)
class RequestedOutput:
    """An output that the caller wants."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class AsBytes:
    """Which outputs are to be returned as bytes, and not element by element."""

    every: bool
    """Of those that aren't named."""
    named: Mapping[str, bool] = field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Return whether an output is."""
        return self.named.get(name, self.every)


@dataclass(frozen=True)
class InferRequest:
    """Images for one model, to be answered together."""

    model: str
    """Empty for the first."""
    input: Tensor
    version: str = ""
    """Empty for any."""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: Sequence[RequestedOutput] = ()
    """None for those that come without a wish."""
    as_bytes: AsBytes = AsBytes(every=False)


@dataclass(frozen=True)
class InferResponse:
    """The outputs, and in `parameters` what was done for them."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    outputs: Sequence[Tensor]


def excerpt(text: str) -> str:
    """Return as much of a caller's text as a refusal may repeat, with escapes for what can't be printed."""
    return shown(text)[1:-1]


def shown(text: str) -> str:
    """Return the same in quotes."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def check_datatype(datatype: str) -> None:
    """Raise InvalidRequestError unless images can come in this datatype."""
    if datatype not in ("FP32", "UINT8", BYTES):
        raise InvalidRequestError("image.datatype", f"must be FP32, UINT8 or BYTES, not {shown(datatype)}")


def check_count(field: str, count: int, most: int) -> None:
    """Raise InvalidRequestError if there are more than `most` of what `field` holds."""
    if count > most:
        raise InvalidRequestError(field, f"holds {count:,}; at most {most:,} are taken")


def joined(elements: Sequence[bytes]) -> bytes:
    """Write elements of BYTES one after another, each after its length in four bytes."""
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def split(data: bytes, count: int) -> list[bytes]:
    """Read up to `count` elements of BYTES back.

    Raises InvalidRequestError if `data` holds more or is cut off, TooLargeError if that would be too many for anyone.
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
