"""Text files: read as editors leave them, in UTF-8 with or without a byte order mark, and written whole.

What is read may be hostile or a mistake: a file of any size, a pipe that nothing writes to, a device. Reading takes
bounded memory and time.
"""

import codecs
import os
import secrets
import stat
import time
from io import BufferedReader
from pathlib import Path

MOST_BYTES = 16 * 2**20
"""Of one text file: a few times as many as the largest report or list of labels has."""
# Seconds to wait for all that a pipe brings.
PIPE_TIME = 60.0
_PAUSE = 0.02

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHERS = (
    ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises OSError, or ValueError for anything that isn't a regular file: opening a pipe can wait for ever, and reading
    a device never ends.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder is refused by opening it
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ValueError(f"it is a {kind}, not a file")
    return path.open("rb")


def read_text(path: Path, most: int = MOST_BYTES, *, pipe: bool = False) -> str:
    """Return what a text file holds, without the mark.

    With `pipe`, it may also be a pipe that is written and closed within `PIPE_TIME`, such as `<(command)`. Raises
    OSError, or ValueError if it isn't UTF-8, has more than `most` bytes, or is another kind of file.
    """
    data = _read_pipe(path, most) if pipe and path.is_fifo() else _read_regular(path, most)
    if len(data) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
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


def _read_regular(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        return file.read(most + 1)


def _read_pipe(path: Path, most: int) -> bytes:
    """Return up to `most + 1` bytes of a pipe."""
    end = time.monotonic() + PIPE_TIME
    data = b""
    # Non-blocking: otherwise even opening would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while len(data) <= most:
            try:
                part = os.read(descriptor, most + 1 - len(data))
            except BlockingIOError:  # there is a writer, who has written nothing yet
                part = None
            if part:
                data += part
            elif part == b"" and data:
                break
            elif time.monotonic() > end:
                raise ValueError(f"it is a pipe, which wasn't written and closed within {PIPE_TIME:.0f} s")
            else:
                time.sleep(_PAUSE)
    finally:
        os.close(descriptor)
    return data


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
