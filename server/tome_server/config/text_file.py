"""Text files: read as editors leave them, in UTF-8 with or without a byte order mark, and written whole."""

import codecs
import secrets
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


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all, and its folder if need be. Raises OSError."""
    # Other processes may write the same file, so each writes to a temporary file of its own.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
