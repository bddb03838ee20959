"""Files that may be replaced while the server runs: certificates and tokens."""

import stat
from pathlib import Path
from typing import TypeAlias

from tome_server.errors import ConfigError

# Far more than certificates or tokens take. They are read in the event loop, or before a handshake.
MOST_BYTES = 2**20

State: TypeAlias = tuple[tuple[int, int, int], ...]


def state(*paths: Path) -> State:
    """Return a value that changes when a file, or a link's target, is written or replaced.

    Raises OSError if a file is missing, or ConfigError if it isn't a file or has more than `MOST_BYTES`: reading it
    could take for ever.
    """
    found = [path.stat() for path in paths]
    for path, file in zip(paths, found, strict=True):
        if not stat.S_ISREG(file.st_mode):
            raise ConfigError(f"{path} is not a file")
        if file.st_size > MOST_BYTES:
            raise ConfigError(f"{path} has {file.st_size:,} bytes; at most {MOST_BYTES:,} are read")
    return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in found)
