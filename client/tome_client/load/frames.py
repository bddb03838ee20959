"""Messages between the load generator's processes: pickled, each after its length, over pipes."""

from __future__ import annotations

import asyncio
import pickle
import struct
from dataclasses import dataclass
from typing import Any

from tome_client.load.outcome import Progress
from tome_client.load.plan import LoadPlan
from tome_client.load.sending import Sent, Server
from tome_client.load.wire import Wire

_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Job:
    """To a process: what it sends."""

    server: Server
    plan: LoadPlan
    progress: bool
    """Whether to report progress."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a process: it is connected, and its messages are made."""

    wire: Wire


@dataclass(frozen=True, slots=True)
class Start:
    """To a process: the instant at which the measured run starts, on time.perf_counter."""

    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """To a process: end early, and send what was measured."""


@dataclass(frozen=True, slots=True)
class Failed:
    """From a process: it could not begin."""

    error: Exception


Message = Job | Ready | Start | Stop | Failed | Progress | Sent


def frame(message: Message) -> bytes:
    """Returns a message as bytes."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


async def receive(stream: asyncio.StreamReader) -> Any:
    """Returns the next message.

    Raises:
        EOFError: The other process closed the pipe, or ended.
    """
    try:
        (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
        return pickle.loads(await stream.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError("the pipe is closed") from None
