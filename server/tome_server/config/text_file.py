"""Text files as people's editors leave them: UTF-8, with or without a byte order mark."""

import codecs
from pathlib import Path

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHERS = (
    ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def read_text(path: Path) -> str:
    """Return what a text file holds, without the mark. Raises OSError, or ValueError if it isn't UTF-8."""
    data = path.read_bytes()
    for encoding, marks in _OTHERS:
        if data.startswith(marks):
            raise ValueError(f"the file is {encoding}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from error
