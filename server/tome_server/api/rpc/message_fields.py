"""Counts the fields of a message before it is parsed: see `api.reading`.

Parsing takes some 0.6 µs and up to 150 bytes of memory for each field, and a message of 32 MiB may hold millions. Ours
hold few: images and tensors are one field each, whatever their size.
"""

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tome_server.api.oip.messages import MOST_ELEMENTS
from tome_server.errors import InvalidRequestError, TooLargeError

# Every element of BYTES in an input, and room for all else. An array of integers or floats is one field, as protobuf
# packs them.
MOST_FIELDS = MOST_ELEMENTS + 4096
# Bytes of an array of integers in which each takes one or more: 2 MiB take 30 ms to parse.
MOST_VARINTS = 2 * 2**20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Types whose arrays have a fixed number of bytes for each element, or that can't be packed.
_NO_VARINTS = {
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_FLOAT,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_SFIXED64,
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
}


def check_fields(message: bytes, kind: Descriptor) -> None:
    """Raise TooLargeError if parsing `message` would stop the event loop for long.

    Raises InvalidRequestError if its fields can't be told apart; other faults are left to the parser.
    """
    try:
        _count(message, 0, len(message), kind, 0)
    except IndexError:
        raise InvalidRequestError("request", "can't be read: it is cut off") from None


def _count(message: bytes, at: int, end: int, kind: Descriptor, count: int) -> int:
    """Return `count` and the fields of `message[at:end]`, those of messages within it included."""
    while at < end:
        count += 1
        if count > MOST_FIELDS:
            raise TooLargeError(f"the message has more than {MOST_FIELDS:,} fields, which is the most that is taken")
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == _BYTES:
            size, at = _varint(message, at)
            field = kind.fields_by_number.get(tag >> 3)
            if field is not None and at + size <= end:
                if field.message_type is not None:
                    count = _count(message, at, at + size, field.message_type, count)
                elif field.type not in _NO_VARINTS and size > MOST_VARINTS:
                    text = f"at most {MOST_VARINTS:,} are taken, more in raw_input_contents"
                    raise TooLargeError(f"{field.name} has {size:,} bytes of integers; {text}")
            at += size
        elif wire_type == _VARINT:
            _, at = _varint(message, at)
        elif wire_type == _FIXED32:
            at += 4
        elif wire_type == _FIXED64:
            at += 8
        # Others begin or end a group, whose fields follow, or are none, which the parser refuses.
    return count


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the integer that begins at `at`, and where the next field or part of this one does."""
    value = shift = 0
    while shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise InvalidRequestError("request", "can't be read: an integer has more than ten bytes")
