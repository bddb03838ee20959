"""A device that hangs, on a clock that the test moves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import pytest

from tests.server.scripted import SLOW, Bench, Clock, refused, until
from tome_server.api.oip.service import OpenInference
from tome_server.errors import DeviceDiedError, UnavailableError
from tome_server.serving.batcher import OnDevice
from tome_server.serving.watchdog import LEAST, LOOK_EVERY, PROMISES, Age, watch_device

TIMEOUT = 30.0


class Watched:
    """A watchdog, and what it did."""

    def __init__(self, bench: Bench, clock: Clock) -> None:
        self.bench, self.clock = bench, clock
        self.health: list[str] = []
        self.given_up: list[str] = []
        self.looks = 0
        self.task = asyncio.create_task(
            watch_device(
                bench.engine,
                self,  # type: ignore[arg-type]
                TIMEOUT,
                hangs=lambda: self.health.append("NOT_SERVING"),
                answers=lambda: self.health.append("SERVING"),
            )
        )

    def give_up(self, why: str) -> None:
        self.given_up.append(why)

    async def ended(self) -> NoReturn:
        raise DeviceDiedError("given up")

    async def passes(self, seconds: float) -> None:
        """Let time pass, with a look at the device every LOOK_EVERY seconds."""
        for _ in range(round(seconds / LOOK_EVERY)):
            self.clock.skip(LOOK_EVERY)
            for _ in range(5):
                await asyncio.to_thread(lambda: None)


@pytest.fixture
async def watched(bench: Bench, stopped: Clock) -> AsyncIterator[Watched]:
    watched = Watched(bench, stopped)
    await watched.passes(0)
    await asyncio.sleep(0)
    yield watched
    watched.task.cancel()


async def test_a_batch_that_hangs_makes_the_server_unready_until_it_ends(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    bench, service = watched.bench, OpenInference(watched.bench.engine)
    bench.engine.registry.names.remove("third")  # which is never served
    holding = await bench.hold_device()
    await watched.passes(LEAST - 2)
    assert not watched.health
    assert service.ready
    assert bench.gauge("tome_device_hung") == 0
    await watched.passes(4)
    assert watched.health == ["NOT_SERVING"]
    assert not service.ready
    assert not service.model_ready("first")
    assert bench.gauge("tome_device_hung") == 1
    error = await refused(bench.predict(1))
    assert isinstance(error, UnavailableError)
    assert str(error) == "the device hangs; another replica may answer"
    await watched.passes(5)
    [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "the device hangs: a batch of first has run for" in line.getMessage()
    bench.device.gate.set()
    await holding
    await watched.passes(2)
    assert watched.health == ["NOT_SERVING", "SERVING"]
    assert service.ready
    assert bench.gauge("tome_device_hung") == 0
    await bench.predict(2)
    assert not watched.given_up


async def test_a_device_that_hangs_for_too_long_is_given_up(watched: Watched) -> None:
    holding = await watched.bench.hold_device()
    await watched.passes(LEAST + TIMEOUT - 3)
    assert not watched.given_up
    await watched.passes(6)
    [why] = watched.given_up
    assert "did not answer for" in why
    with pytest.raises(DeviceDiedError):
        await watched.task
    watched.bench.device.gate.set()
    await holding


async def test_a_batch_that_was_promised_to_take_long_may(start: Callable[..., Bench], stopped: Clock) -> None:
    watched = Watched(start(unit=SLOW), stopped)
    holding = await watched.bench.hold_device()
    on_device = watched.bench.engine.on_device
    assert on_device is not None
    assert PROMISES * on_device.promised > 4 * LEAST
    await watched.passes(2 * LEAST)
    assert not watched.health
    watched.bench.device.gate.set()
    await holding
    watched.task.cancel()


async def test_an_empty_image_that_hangs_counts_as_well(
    start: Callable[..., Bench], stopped: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, released = start(), asyncio.Event()

    async def held(*_: object) -> float:
        await released.wait()
        return 1e-5

    monkeypatch.setattr(bench.device, "probe", held)
    watched = Watched(bench, stopped)
    stopped.skip(1.0)
    await until(lambda: bench.engine.on_device is not None)
    await watched.passes(LEAST + 3)
    assert watched.health == ["NOT_SERVING"]
    released.set()
    await until(lambda: bench.engine.on_device is None)
    watched.task.cancel()


def test_time_in_which_this_process_did_not_run_either_does_not_count() -> None:
    age, batch = Age(), OnDevice("key", "name", 100.0, 0.1)
    assert age.look(100.5, batch) == 0.5
    assert age.look(3700.5, batch) <= 0.5 + 2 * LOOK_EVERY
    assert age.look(3701.5, None) == 0
    assert age.look(3702.5, OnDevice("key", "name", 3702.0, 0.1)) == 0.5


def test_an_idle_spell_does_not_count_for_the_batch_after_it() -> None:
    age = Age()
    assert age.look(1.0, None) == 0
    assert age.look(2.0, OnDevice("key", "name", 1.9, 0.1)) == pytest.approx(0.1)
