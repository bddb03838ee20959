import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tome_server.models.images.exif import orientation


def tiff(order: str, *entries: tuple[int, int, int, bytes], start: int = 8) -> bytes:
    """EXIF with these entries: tag, type, count, and the four bytes of a value or its offset."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start) + bytes(max(0, start - 8))
    return head + struct.pack(f"{order}H", len(entries)) + b"".join(struct.pack(f"{order}HHI4s", *e) for e in entries)


@given(
    st.integers(0, 65535),
    st.sampled_from(["<", ">"]),
    st.booleans(),
    st.lists(st.sampled_from([0x10D, 0x10E, 0x10F, 0x110, 0x131, 0x13B, 0x8298]), unique=True),
)
def test_it_is_what_pillow_reads(value: int, order: str, prefixed: bool, others: list[int]) -> None:
    exif = Image.Exif()
    exif.endian = order
    for tag in others:
        exif[tag] = "text"
    exif[0x0112] = value
    data = exif.tobytes().removeprefix(b"" if prefixed else b"Exif\0\0")
    read = Image.Exif()
    read.load(data)
    assert read[0x0112] == value
    assert orientation(data) == (value if 1 <= value <= 8 else 1)


SIX = b"\6\0\0\0"


@pytest.mark.parametrize(
    ("exif", "expected"),
    [
        pytest.param(tiff("<", (0x112, 3, 1, SIX)), 6, id="a short, as it should be"),
        pytest.param(tiff("<", (0x112, 4, 1, SIX)), 6, id="a long"),
        pytest.param(tiff("<", (0x112, 1, 1, SIX)), 6, id="a byte"),
        pytest.param(tiff(">", (0x112, 3, 1, b"\0\6\0\0")), 6, id="big-endian"),
        pytest.param(tiff("<", (0x128, 2, 4, b"abc\0"), (0x112, 3, 1, SIX)), 6, id="beside a tag of another type"),
        pytest.param(tiff("<", *[(0x9999, 2, 99, b"\xff" * 4)] * 5000, (0x112, 3, 1, SIX)), 6, id="the last of 5,001"),
        pytest.param(tiff("<", (0x112, 3, 1, SIX))[:-1], 1, id="cut off"),
        pytest.param(tiff("<", (0x112, 2, 1, SIX)), 1, id="text"),
        pytest.param(tiff("<", (0x112, 3, 2, SIX)), 1, id="two values"),
        pytest.param(tiff("<", (0x112, 3, 1, b"\0\0\0\0")), 1, id="0"),
        pytest.param(tiff("<", (0x112, 3, 1, b"\x09\0\0\0")), 1, id="9"),
        pytest.param(tiff("<", (0x112, 3, 1, SIX), start=4000)[:300], 1, id="directory outside"),
        pytest.param(tiff("<"), 1, id="no entries"),
        pytest.param(b"", 1, id="nothing"),
        pytest.param(b"Exif\0\0", 1, id="the prefix alone"),
        pytest.param(b"Exif\0\0II*\0", 1, id="no directory"),
    ],
)
def test_only_an_orientation_that_makes_sense_is_one(exif: bytes, expected: int) -> None:
    assert orientation(exif) == expected


@settings(max_examples=500)
@given(st.sampled_from([b"", b"II*\0", b"MM\0*\0\0\0\x08", b"Exif\0\0II*\0\x08\0\0\0"]), st.binary(max_size=100))
def test_no_bytes_make_it_raise(start: bytes, rest: bytes) -> None:
    assert 1 <= orientation(start + rest) <= 8
