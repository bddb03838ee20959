"""Parses the JSON of a request within bounds that are checked before anything is built: see `api.reading`.

An input's `data` may hold millions of numbers, and all else in a request is small. So an array of numbers is cut out
of the text and converted in parts, and what remains is parsed only if it holds few values.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from tome_server.api.oip.messages import DTYPES, MOST_DIMENSIONS, shown
from tome_server.api.reading import PART
from tome_server.errors import InvalidRequestError, TooLargeError

# Bytes of JSON in one request.
MOST_JSON = 8 * 2**20
# Lists, objects and values in a request's JSON, numbers of `data` apart: parsing so many takes some 10 ms. BYTES has
# one for each of its elements.
MOST_VALUES = 2**15
# Where an array begins that is some member's `data`. No text within a string looks like this: its quotes are escaped.
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_SPACE = b" \t\r\n"
_NOT_OUTLINE = bytes({*range(256)} - {*b"[],"})
_UNBRACKETED = bytes.maketrans(b"[]", b"  ")


@dataclass(frozen=True)
class NumbersText:
    """The text of an array without strings or objects in it, which is not yet known to be valid JSON."""

    text: bytes

    def read(self, datatype: str, shape: tuple[int, ...]) -> bytes:
        """Return the numbers as little-endian bytes of `datatype`.

        Raises InvalidRequestError unless they are numbers of that type, in one list or nested as `shape` says.
        """
        self._check_nesting(shape)
        elements = b"".join(_converted(part, datatype).tobytes() for part in _parts(self.text.translate(_UNBRACKETED)))
        count = len(elements) // DTYPES[datatype].itemsize
        if count != math.prod(shape):
            raise _wrong_shape(count, shape)
        return elements

    def _check_nesting(self, shape: tuple[int, ...]) -> None:
        outline = self.text.translate(None, _NOT_OUTLINE)
        commas = len(outline) - 2
        if outline == b"[" + b"," * commas + b"]":
            if commas and commas + 1 != math.prod(shape):
                raise _wrong_shape(commas + 1, shape)
        elif outline != _outline(shape, len(outline)):
            text = f"is neither one list nor nested like the shape {list(shape)[:MOST_DIMENSIONS]}"
            raise InvalidRequestError("inputs.data", text)


def parse(text: bytes) -> tuple[Any, NumbersText | None]:
    """Return what JSON describes, with None for the numbers of the first `data` in it, and those numbers.

    Raises TooLargeError if it is too long or holds too many values, InvalidRequestError if it is not JSON.
    """
    if len(text) > MOST_JSON:
        raise TooLargeError(f"{len(text):,} bytes of JSON; at most {MOST_JSON:,} are taken, more as binary data behind")
    # Members first, which no array of numbers has: a search for "data" may find one in each.
    _check_count(text, b"{:")
    text, numbers = _cut_numbers(text)
    _check_count(text, b"{[,")
    try:
        return json.loads(text), numbers
    except UnicodeDecodeError as error:
        problem = "is not JSON; an encoded image alone goes with the header Content-Type: image/… of its kind"
        raise InvalidRequestError("request", problem) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("request", f"is not JSON: {error}"[:200]) from error


def _check_count(text: bytes, marks: bytes) -> None:
    values = sum(text.count(mark) for mark in marks)
    if values > MOST_VALUES:
        raise TooLargeError(f"the JSON holds about {values:,} values; at most {MOST_VALUES:,} and a tensor are taken")


def _cut_numbers(text: bytes) -> tuple[bytes, NumbersText | None]:
    """Return the text with null in place of the numbers."""
    found = _DATA.search(text)
    if found is None:
        return text, None
    start = found.end()
    # After the array comes the end of the object that it belongs to, or the name of the next member.
    ends = [end for mark in (b"}", b'"') if (end := text.find(mark, start)) >= 0]
    array = text[start : min(ends, default=len(text))].rstrip(_SPACE + b",")
    if not array.endswith(b"]"):
        return text, None
    return text[:start] + b"null" + text[start + len(array) :], NumbersText(array)


def _outline(shape: tuple[int, ...], length: int) -> bytes | None:
    """Return the brackets and commas of numbers nested like `shape`, None if they are not of this length."""
    if not shape or len(shape) > MOST_DIMENSIONS or min(shape) < 1:
        return None
    expected = 0
    for size in reversed(shape):
        expected = size * expected + size + 1
    if expected != length:
        return None
    outline = b""
    for size in reversed(shape):
        outline = b"[" + (outline + b",") * (size - 1) + outline + b"]"
    return outline


def _parts(numbers: bytes) -> Iterator[bytes]:
    """Yield numbers between commas in parts of at most PART bytes."""
    start = 0
    while len(numbers) - start > PART:
        comma = numbers.rfind(b",", start, start + PART)
        if comma < 0:
            raise InvalidRequestError("inputs.data", f"holds {PART:,} characters without a comma between them")
        yield numbers[start:comma]
        start = comma + 1
    yield numbers[start:]


def _converted(part: bytes, datatype: str) -> "np.ndarray[Any, Any]":
    try:
        values = np.array(from_json(b"[" + part + b"]"))
    except ValueError:
        sample = part.strip(_SPACE)[:100].decode("ascii", "replace")
        raise InvalidRequestError("inputs.data", f"is not JSON in what begins with {shown(sample)}") from None
    if not values.size:
        return values.astype(DTYPES[datatype])
    if values.dtype.kind not in ("iu" if datatype == "UINT8" else "iuf"):
        raise InvalidRequestError("inputs.data", f"of {datatype} must be numbers of that type")
    if datatype == "UINT8" and not 0 <= values.min() <= values.max() <= 255:
        raise InvalidRequestError("inputs.data", "of UINT8 must lie in 0..255")
    with np.errstate(over="ignore"):  # too large for FP32 is infinite, and refused as that
        return values.astype(DTYPES[datatype])


def _wrong_shape(count: int, shape: tuple[int, ...]) -> InvalidRequestError:
    return InvalidRequestError("inputs.data", f"is of shape [{count}]; the shape says {list(shape)[:MOST_DIMENSIONS]}")
