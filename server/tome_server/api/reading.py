"""Where long bodies and messages are read: in one thread beside the event loop.

A thread shares the interpreter with the event loop, so a single call of a parser stops all other requests until it
returns. Measured on bodies of 8 MiB (Python 3.11, one core of a shared virtual machine): `json.loads` took 0.2 to
0.4 s for numbers and 2.6 to 3.1 s for lists or keys; `pydantic_core.from_json` took 0.05 to 0.3 s and 1.9 to 2.6 s. No
parser is fast enough, and a process of its own would cost 60 MB and a watchdog. Therefore whatever is read here counts
before it builds, and converts numbers in parts of `PART` bytes. The event loop gets the interpreter between two parts.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Bytes that are read in the event loop; longer texts and messages go to the thread.
FEW = 2**16
# Bytes of numbers in text that are converted in one go, which takes two milliseconds at most.
PART = 2**15

# One thread: several would take turns with the event loop, which would wait for each of them.
_reader = ThreadPoolExecutor(1, "reader")


async def read_aside(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `read` returns, called in the thread. A caller that is cancelled before its turn costs nothing."""
    return await asyncio.get_running_loop().run_in_executor(_reader, lambda: read(*args, **kwargs))
