"""Profiles that were measured on a busy machine, once the server has nothing to do."""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.server.scripted import LATE, Bench, Clock, image_of, profile_of, until
from tests.server_process import ServerProcess
from tome_client import Client, TomeError
from tome_server.errors import DeviceDiedError
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Latency
from tome_server.serving.remeasuring import LOOK_EVERY, MOST_LOOKS, QUIET_FOR, remeasure

UNIT = 0.01
BUSY = Measured(rounds=1, load=0.9, spread=2.0)
GOOD = Measured(rounds=5, load=0.0, spread=1.1)


def make_provisional(bench: Bench, factor: float = 8.0) -> None:
    """Have the first model's profile be so many times too long, for it was measured on a busy machine."""
    profile = replace(profile_of(factor * UNIT, 8), measured=BUSY)
    bench.engine.registry.models["first"].adopt(profile, Latency(profile))


@asynccontextmanager
async def remeasuring(bench: Bench) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(remeasure(bench.device, bench.engine, 2.0))
    await asyncio.sleep(0)
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def look(clock: Clock) -> None:
    """Let it look once."""
    clock.skip(LOOK_EVERY)
    await settled()


async def settled() -> None:
    """Let everything go on that waits for nothing but its turn."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def bench(start: Callable[..., Bench], stopped: Clock) -> Bench:
    bench = start(unit=UNIT)
    bench.device.better = replace(profile_of(UNIT, 8), measured=GOOD)
    return bench


async def test_a_provisional_profile_is_measured_again_and_the_better_one_takes_effect(
    bench: Bench, stopped: Clock
) -> None:
    make_provisional(bench)
    first = bench.engine.registry.models["first"]
    assert first.scheduler.latency.expected(1, 0) == pytest.approx(16 * UNIT)
    bench.device.slowness = 1.5
    async with remeasuring(bench):
        await look(stopped)
        await until(lambda: not first.profile.provisional)
        assert bench.device.remeasured == [("first", 2.0)]
        # What batches take now was looked at before it was used.
        assert first.scheduler.latency.observed
        assert first.scheduler.latency.expected(1, 0) == pytest.approx(1.5 * 2 * UNIT)
        await look(stopped)
        assert len(bench.device.remeasured) == 1
    assert image_of(await bench.predict(7, within=10 * UNIT)) == 7


async def test_a_good_profile_is_left_alone_and_so_is_one_of_which_nothing_is_known(
    bench: Bench, stopped: Clock
) -> None:
    first = bench.engine.registry.models["first"]
    async with remeasuring(bench):
        for measured in (None, GOOD):
            first.adopt(replace(first.profile, measured=measured), first.scheduler.latency)
            await look(stopped)
    assert bench.device.remeasured == []


async def test_nothing_is_measured_again_before_the_server_had_nothing_to_do_for_a_while(
    bench: Bench, stopped: Clock
) -> None:
    make_provisional(bench)
    async with remeasuring(bench):
        held = await bench.hold_device()
        await look(stopped)
        assert bench.engine.idle_since == math.inf
        stopped.skip(LOOK_EVERY - 0.9 * QUIET_FOR)
        bench.device.gate.set()
        await held
        stopped.skip(0.9 * QUIET_FOR)
        await settled()
        assert bench.device.remeasured == []
        await look(stopped)
        await until(lambda: bench.device.remeasured)


async def test_where_a_request_comes_it_is_tried_again_at_the_next_look(bench: Bench, stopped: Clock) -> None:
    make_provisional(bench)
    bench.device.better = InterruptedError()
    async with remeasuring(bench):
        for count in range(1, 4):
            await look(stopped)
            await until(lambda count=count: len(bench.device.remeasured) == count)
    assert bench.device.remeasured == [("first", 2.0)] * 3
    assert bench.engine.registry.models["first"].profile.provisional


@pytest.mark.parametrize("outcome", [None, ValueError("no kernel")])
async def test_where_nothing_better_is_found_it_is_tried_ever_less_often_and_for_longer(
    bench: Bench, stopped: Clock, outcome: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    make_provisional(bench)
    bench.device.better = outcome
    tried = []
    async with remeasuring(bench) as task:
        for number in range(1, 80):
            before = len(bench.device.remeasured)
            await look(stopped)
            if len(bench.device.remeasured) > before:
                tried.append(number)
        assert not task.done()
    assert tried == [1, 3, 7, 15, 31, 47, 63, 79]
    seconds = [budget / 2.0 for _, budget in bench.device.remeasured]
    assert seconds == [1, 2, 4, 8, 16, 16, 16, 16]
    assert max(seconds) == MOST_LOOKS
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (len(tried) if outcome else 0)


async def test_a_model_that_was_replaced_meanwhile_keeps_the_profile_that_it_came_with(
    bench: Bench, stopped: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_provisional(bench)
    old, new = bench.engine.registry.models["first"], bench.engine.registry.models["second"]
    async with remeasuring(bench):
        monkeypatch.setitem(bench.engine.registry.models, "first", new)
        await look(stopped)
        assert bench.device.remeasured == []
    assert old.profile.provisional


async def test_when_the_device_dies_it_ends(bench: Bench, stopped: Clock) -> None:
    make_provisional(bench)
    bench.device.better = DeviceDiedError("gone")
    async with remeasuring(bench) as task:
        await look(stopped)
        await until(task.done)
        with pytest.raises(DeviceDiedError):
            await task


async def test_requests_that_wait_while_the_profile_changes_are_answered(bench: Bench) -> None:
    make_provisional(bench)
    first = bench.engine.registry.models["first"]
    held = await bench.hold_device()
    waiting = await bench.in_order(1, 2, 3, within=LATE)
    profile = replace(profile_of(UNIT, 8), measured=GOOD)
    first.adopt(profile, Latency(profile))
    bench.device.gate.set()
    assert [image_of(await task) for task in (held, *waiting)] == [0, 1, 2, 3]
    assert first.scheduler.latency.profile is first.profile is profile


# With a real server


def slowed(file: Path, measured: dict[str, Any] | None) -> None:
    """Have a stored profile be eight times too long."""
    document = json.loads(file.read_text())
    for name in ("p50_seconds", "p95_seconds"):
        document[name] = [[8 * value for value in row] for row in document[name]]
    del document["measured"]
    file.write_text(json.dumps(document | ({"measured": measured} if measured else {})))


@pytest.mark.parametrize(
    "measured",
    [{"rounds": 1, "load": 0.999, "spread": 2.0, "extrapolated": False}, None],
    ids=["provisional", "of an older version"],
)
def test_a_server_with_a_profile_eight_times_too_long_answers_at_the_budgets_that_it_could_meet(
    own_server: Callable[..., ServerProcess], tmp_path: Path, samples: dict[Path, str], measured: dict[str, Any] | None
) -> None:
    folder, image = tmp_path / "profiles", next(iter(samples)).read_bytes()
    flags = ("--profiles", str(folder), "--profile-time", "500ms", "--threads", "1", "--max-batch", "2")
    first = own_server(*flags)
    assert first.terminate(60) == 0
    [file] = folder.glob("fashion-*.json")
    promised = json.loads(file.read_text())["p95_seconds"][0][-1]
    slowed(file, measured)
    stored = file.read_text()
    server = own_server(*flags)
    assert (file.read_text() != stored) == (measured is not None)
    # Several times what it takes, and less than what the profile says.
    budget, end = 6 * promised, time.monotonic() + 60
    with Client(server.target, timeout=60) as client:
        while (reason := missed(client, image, budget)) is not None:
            assert reason in ("INFEASIBLE", "EXPIRED")
            assert time.monotonic() < end


def missed(client: Client, image: bytes, budget: float) -> str | None:
    """Why a request isn't answered in time; None if it is."""
    try:
        client.predict(image, budget=budget)
    except TomeError as error:
        return error.reason
    return None
