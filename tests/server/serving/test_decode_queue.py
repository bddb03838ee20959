"""The stage that decodes, with threads that do what the test says."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from tests.server.scripted import until
from tome_server.models.preprocess import InputSize
from tome_server.serving.decode_queue import RESERVE, Decode, Decoders, HopelessError
from tome_server.serving.overhead import DecodeTimes


@dataclass
class Stage:
    """Decoders whose images are numbers, each decoded once its gate is open."""

    decoders: Decoders
    began: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    gates: dict[int, threading.Event] = field(default_factory=dict)

    def decode(
        self, image: int, deadline: float = 100.0, *, kind: str = "JPEG", megapixels: float = 1.0, memory: int = 1
    ) -> "asyncio.Task[int]":
        """Ask for an image that is due `deadline` seconds from now."""
        gate = self.gates.setdefault(image, threading.Event())

        def work() -> int:
            self.began.append(image)
            gate.wait(60)
            return image

        at = asyncio.get_running_loop().time() + deadline
        size = InputSize(kind, megapixels, memory)
        decode = Decode(work, self.dropped.append, size, deadline=at, due=at)
        return asyncio.create_task(self.decoders.run(decode))

    def open(self, *images: int) -> None:
        for image in images:
            self.gates[image].set()

    def knows(self, kind: str, seconds: float) -> None:
        """Have it expect that an image of one megapixel takes so many seconds."""
        for _ in range(9):
            self.decoders.times.add(asyncio.get_running_loop().time(), kind, 1.0, seconds, seconds)


@pytest.fixture
async def stage() -> AsyncIterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def start(threads: int = 1, memory: int = 1000) -> Stage:
        made.append(Stage(Decoders(threads, memory, DecodeTimes())))
        return made[-1]

    yield start
    for one in made:
        one.open(*one.gates)
        one.decoders.close()


async def test_the_earliest_deadline_is_decoded_first(stage: Callable[..., Stage]) -> None:
    one = stage()
    tasks = [one.decode(0)]
    await until(lambda: one.began == [0])
    tasks += [one.decode(1, 50.0), one.decode(2, 30.0), one.decode(3, 40.0), one.decode(4, math.inf)]
    await until(lambda: len(one.decoders) == 4)
    one.open(0, 1, 2, 3, 4)
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
    assert one.began == [0, 2, 3, 1, 4]


async def test_what_cannot_be_in_time_any_more_is_given_up_before_a_thread_is_spent_on_it(
    stage: Callable[..., Stage],
) -> None:
    one = stage()
    one.knows("photograph", 20.0)
    first = one.decode(0)
    await until(lambda: one.began == [0])
    hopeless = one.decode(1, 10.0, kind="photograph")
    hopeful = one.decode(2, 11.0)
    await until(lambda: len(one.decoders) == 2)
    one.open(0, 2)
    with pytest.raises(HopelessError):
        await hopeless
    assert (await first, await hopeful) == (0, 2)
    assert one.began == [0, 2]


async def test_a_decode_that_is_cancelled_in_the_queue_never_begins(stage: Callable[..., Stage]) -> None:
    one = stage()
    first, second = one.decode(0), one.decode(1)
    await until(lambda: one.began == [0] and len(one.decoders) == 1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert len(one.decoders) == 0
    one.open(0, 1)
    assert await first == 0
    assert one.began == [0]


async def test_the_result_of_a_decode_that_was_cancelled_while_it_ran_is_given_back(
    stage: Callable[..., Stage],
) -> None:
    one = stage()
    task = one.decode(7)
    await until(lambda: one.began == [7])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.dropped == []
    one.open(7)
    await until(lambda: one.dropped == [7] and one.decoders.idle)


async def test_a_decode_cancelled_in_the_moment_after_it_ended_is_given_back(stage: Callable[..., Stage]) -> None:
    one = stage()
    task = one.decode(7)
    await until(lambda: one.began == [7])
    [decode] = one.decoders._running
    decode.done.set_result(9)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.dropped == [9]


async def test_a_failure_is_the_callers_and_the_next_goes_on(stage: Callable[..., Stage]) -> None:
    one = stage()
    fails = one.decode(0)
    one.dropped, one.began = [], []

    def broken() -> int:
        raise ValueError("is damaged")

    at = asyncio.get_running_loop().time() + 100
    damaged = Decode(broken, one.dropped.append, InputSize("JPEG", 1.0, 1), deadline=at, due=at)
    task = asyncio.create_task(one.decoders.run(damaged))
    one.open(0)
    with pytest.raises(ValueError, match="is damaged"):
        await task
    assert await fails == 0
    assert one.decoders.idle


async def test_images_that_together_take_too_much_memory_are_decoded_one_after_the_other(
    stage: Callable[..., Stage],
) -> None:
    one = stage(threads=4, memory=100)
    tasks = [one.decode(0, 10.0, memory=60), one.decode(1, 20.0, memory=60), one.decode(2, 30.0, memory=10)]
    await until(lambda: one.began == [0])
    # Not passed over by a smaller one that comes later: it might never get its turn.
    assert len(one.decoders) == 2
    one.open(0)
    await until(lambda: sorted(one.began) == [0, 1, 2])
    one.open(1, 2)
    assert await asyncio.gather(*tasks) == [0, 1, 2]


async def test_an_image_larger_than_all_memory_is_decoded_alone(stage: Callable[..., Stage]) -> None:
    one = stage(threads=2, memory=100)
    tasks = [one.decode(0, 10.0, memory=50), one.decode(1, 20.0, memory=500), one.decode(2, 30.0, memory=1)]
    await until(lambda: one.began == [0])
    one.open(0)
    await until(lambda: one.began == [0, 1])
    one.open(1)
    await until(lambda: one.began == [0, 1, 2])
    one.open(2)
    assert await asyncio.gather(*tasks) == [0, 1, 2]


async def test_when_an_image_would_be_decoded_is_known_from_the_queue(stage: Callable[..., Stage]) -> None:
    one, own = stage(threads=2), 1 + RESERVE
    now = asyncio.get_running_loop().time()
    one.knows("short", 1.0)
    one.knows("long", 10.0)
    assert one.decoders.done_at(now, now + 100, 1.0) == now + own
    tasks = [one.decode(0, 50.0, kind="long")]
    await until(lambda: one.began == [0])
    # One thread is free.
    assert one.decoders.done_at(now, now + 100, 1.0) == now + own
    tasks += [one.decode(1, 50.0, kind="short"), *(one.decode(image, 60.0, kind="short") for image in (2, 3, 4))]
    await until(lambda: len(one.decoders) == 3)
    soon = asyncio.get_running_loop().time()
    # The thread that has the long one does not come into it.
    assert one.decoders.done_at(soon, soon + 100, 1.0) == pytest.approx(soon + 4.0 + own, abs=1.0)
    assert one.decoders.done_at(soon, soon + 55, 1.0) == pytest.approx(soon + 1.0 + own, abs=1.0)
    one.open(0, 1, 2, 3, 4)
    await asyncio.gather(*tasks)


async def test_the_queue_is_judged_anew_when_images_turn_out_to_take_longer(stage: Callable[..., Stage]) -> None:
    one = stage()
    tasks = [one.decode(0)]
    await until(lambda: one.began == [0])
    tasks += [one.decode(1), one.decode(2)]
    await until(lambda: len(one.decoders) == 2)
    now = asyncio.get_running_loop().time()
    one.knows("JPEG", 30.0)
    one.open(0)
    await until(lambda: one.began == [0, 1])
    assert one.decoders.done_at(now, now + 200, 0.0) > now + 30
    one.open(1, 2)
    assert await asyncio.gather(*tasks) == [0, 1, 2]
