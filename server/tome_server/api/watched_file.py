"""Files that may be replaced while the server runs: certificates and tokens."""

from pathlib import Path
from typing import TypeAlias

State: TypeAlias = tuple[tuple[int, int, int], ...]


def state(*paths: Path) -> State:
    """Return a value that changes when a file, or a link's target, is written or replaced.

    Raises OSError if a file is missing.
    """
    found = [path.stat() for path in paths]
    return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in found)
