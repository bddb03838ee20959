"""The queue of images to decode: earliest deadline first, within a bound of memory.

A few threads decode. When an image would be decoded is predicted on arrival, from the images that are being decoded,
those queued before it, and how long such images took (`overhead.DecodeTimes`). An image that can't be decoded in time
any more is given up before a thread starts on it.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedKeyList

from tome_server.models.preprocess import InputSize
from tome_server.serving.overhead import DecodeTimes

T = TypeVar("T")

# A decode begins only if it would still be in time after taking longer than expected by this share.
RESERVE = 0.25
# The times predicted for queued images are renewed once an image of their kind differs from its own by this factor.
_CHANGED = 1.5


class HopelessError(Exception):
    """An image was not decoded, because its deadline could not be met any more."""


@dataclass(eq=False)
class Decode(Generic[T]):
    """One image to decode. Times are seconds of the event loop's clock."""

    work: Callable[[], T]
    """Decodes it, in a thread."""
    discard: Callable[[T], None]
    """Called with the result of a decode whose caller was cancelled while it ran."""
    size: InputSize
    """What it takes."""
    deadline: float
    """Its place in the queue."""
    due: float
    """When it must be decoded so that its request can still be in time."""
    seconds: float = field(default=0.0, init=False)
    """About what it takes in a thread."""
    done: "asyncio.Future[T]" = field(init=False)
    serial: int = field(init=False)
    ends: float = field(default=math.nan, init=False)
    """When it should be decoded, once it has begun."""


class Decoders:
    """Threads that decode, and the queue of images for them. To be used on one event loop.

    `threads` images are decoded at once, or fewer if together they would take more than `memory` bytes. `times` learns
    how long each took.
    """

    def __init__(self, threads: int, memory: int, times: DecodeTimes) -> None:
        self.threads = threads
        self.memory = memory
        self.times = times
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._serials = itertools.count()
        self._queue: SortedKeyList[Decode[Any], tuple[float, float]] = SortedKeyList(key=_place)
        self._running: set[Decode[Any]] = set()

    def __len__(self) -> int:
        """Return how many images are queued."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether no image is being decoded."""
        return not self._running

    def done_at(self, now: float, deadline: float, seconds: float) -> float:
        """Return when an image that takes `seconds` would be decoded if it came now with this deadline."""
        # A decode that overruns is expected to take as long again as it has overrun.
        free = sorted(max(one.ends - now, now - one.ends) for one in self._running)
        free = [0.0] * (self.threads - len(free)) + free
        before = sum(one.seconds for one in self._queue.irange_key(max_key=(deadline, math.inf)))
        return now + _level(free, before) + (1 + RESERVE) * seconds

    async def run(self, decode: Decode[T]) -> T:
        """Return the result of `decode.work`, or raise what it raises.

        Raises HopelessError if it could not begin soon enough to be done when it is due. When the caller is cancelled,
        a decode that hasn't begun leaves the queue; one that has runs to its end, since a thread can't be stopped.
        """
        loop = asyncio.get_running_loop()
        decode.serial, decode.done = next(self._serials), loop.create_future()
        decode.seconds = self.times.seconds(loop.time(), decode.size.kind, decode.size.megapixels)
        self._queue.add(decode)
        self._begin()
        try:
            return await decode.done
        except asyncio.CancelledError:
            # The result may have come just before.
            if not decode.done.cancelled() and decode.done.exception() is None:
                decode.discard(decode.done.result())
            raise
        finally:
            self._queue.discard(decode)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Begin as many decodes as threads and memory allow."""
        loop = asyncio.get_running_loop()
        while self._queue and len(self._running) < self.threads:
            decode, now = self._queue[0], loop.time()
            if decode.done.done() or now + (1 + RESERVE) * decode.seconds > decode.due:
                self._queue.pop(0)
                if not decode.done.done():
                    decode.done.set_exception(HopelessError())
                continue
            # Always the first one, so that small images can't keep a large one waiting for ever. An image that needs
            # more than all memory is decoded alone.
            taken = sum(one.size.decode_bytes for one in self._running)
            if self._running and taken + decode.size.decode_bytes > self.memory:
                return
            self._queue.pop(0)
            self._running.add(decode)
            decode.ends = now + decode.seconds
            running = self._pool.submit(_timed, decode.work)
            running.add_done_callback(lambda ran, decode=decode: _call(loop, self._end, decode, ran))  # type: ignore[misc]

    def _end(self, decode: Decode[T], ran: "Future[_Timed[T]]") -> None:
        self._running.discard(decode)
        if ran.cancelled():
            decode.done.cancel()
        elif error := ran.exception():
            if not decode.done.done():
                decode.done.set_exception(error)
        else:
            result = ran.result()
            # The time counts even if the caller was cancelled.
            self._learn(decode, result)
            if decode.done.done():
                decode.discard(result.value)
            else:
                decode.done.set_result(result.value)
        self._begin()

    def _learn(self, decode: Decode[Any], took: "_Timed[Any]") -> None:
        now = asyncio.get_running_loop().time()
        self.times.add(now, decode.size.kind, decode.size.megapixels, took.cpu_seconds, took.seconds)
        seconds = self.times.seconds(now, decode.size.kind, decode.size.megapixels)
        if not decode.seconds / _CHANGED <= seconds <= decode.seconds * _CHANGED:
            for one in self._queue:
                if one.size.kind == decode.size.kind:
                    one.seconds = self.times.seconds(now, one.size.kind, one.size.megapixels)


@dataclass(frozen=True)
class _Timed(Generic[T]):
    value: T
    cpu_seconds: float
    seconds: float


def _timed(work: Callable[[], T]) -> _Timed[T]:
    began, cpu_began = time.perf_counter(), time.thread_time()
    value = work()
    return _Timed(value, time.thread_time() - cpu_began, time.perf_counter() - began)


def _call(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *args)


def _place(decode: Decode[Any]) -> tuple[float, float]:
    return decode.deadline, decode.serial


def _level(free: list[float], work: float) -> float:
    """Return in how many seconds a thread is free once `work` seconds have been given to the threads, earliest first.

    `free` is in how many seconds each thread is free now, ascending. Work fills the threads as water fills a vessel
    whose floor has these heights.
    """
    for count in range(1, len(free)):
        room = count * free[count] - sum(free[:count])
        if work <= room:
            return (work + sum(free[:count])) / count
    return (work + sum(free)) / len(free)
