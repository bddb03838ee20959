"""Files that may be exchanged while the server runs: certificates, tokens."""

from pathlib import Path
from typing import TypeAlias

State: TypeAlias = tuple[tuple[int, int, int], ...]


def state(*paths: Path) -> State:
    """Return what differs once a file was written or replaced, behind a link too. Raises OSError if one is missing."""
    found = [path.stat() for path in paths]
    return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in found)
