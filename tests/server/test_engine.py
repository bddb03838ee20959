"""The life of a request, with a device and a decoder that do what the test says, when it says so."""

import asyncio
import math
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import tome_server.timm_import  # noqa: F401  isort: skip
import torch
from prometheus_client import generate_latest

from tome_server.engine import EncodedImage, Engine, Reply, Request
from tome_server.errors import (
    ExpiredError,
    InvalidRequestError,
    ModelFailedError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.models.hosted import HostedModel
from tome_server.models.loading import bundled_spec, load
from tome_server.models.preprocess import ImageSettings
from tome_server.observability.metrics import Metrics
from tome_server.runtime.executor import BatchResult, Result, Work
from tome_server.scheduling.queue import Limits

# Passes while the test waits for it to pass, on any machine.
SOON = 0.05
# Passes in no test.
LATE = 1000.0


@dataclass
class ScriptedDevice:
    """Stands in for the Executor: runs batches when `gate` is open, and echoes each image as its only class."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    """model, r and images of each batch started"""
    poison: set[int] = field(default_factory=set)
    """images that the model raises on"""
    started: asyncio.Queue[tuple[int, ...]] = field(default_factory=asyncio.Queue)
    running: int = 0

    async def run(self, model: HostedModel, batch: Sequence[Work], r: int) -> BatchResult:
        images = tuple(work.image for work in batch)
        self.batches.append((model.name, r, images))
        self.started.put_nowait(images)
        assert self.running == 0, "one batch at a time"
        self.running += 1
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        if bad := self.poison & set(images):
            raise ValueError(f"no kernel for {bad}")
        return BatchResult(tuple(Result((image,), (1.0,), None, None) for image in images), 0.001)

    def step(self) -> None:
        """Let the batch on the device end; the next one is held again."""
        self.gate.set()
        self.gate.clear()

    def close(self) -> None:
        pass

    @property
    def seen(self) -> Counter[int]:
        """How often each image was on the device."""
        return Counter(image for *_, images in self.batches for image in images)


@dataclass
class ScriptedDecoder:
    """Stands in for Preprocess: an image is the number that its bytes spell, once `gate` is open."""

    settings: ImageSettings
    gate: threading.Event = field(default_factory=threading.Event)

    def encoded(self, data: bytes) -> int:
        self.gate.wait()
        if not data.isdigit():
            raise InvalidRequestError("image", "is damaged")
        return int(data)


@dataclass
class Bench:
    """An engine and its scripted parts, all gates open."""

    engine: Engine
    device: ScriptedDevice
    decoder: ScriptedDecoder

    def request(self, image: object, **fields: Any) -> Request:
        now = asyncio.get_running_loop().time()
        within = fields.pop("within", math.inf)
        return Request(
            model=fields.pop("model", ""),
            input=EncodedImage(str(image).encode()),
            arrival=now,
            deadline=now + within,
            **fields,
        )

    def predict(self, image: object, **fields: Any) -> "asyncio.Task[Reply]":
        return asyncio.create_task(self.engine.predict(self.request(image, **fields)))

    async def hold_device(self) -> "asyncio.Task[Reply]":
        """Keep the device busy with image 0 until its gate is opened."""
        self.device.gate.clear()
        holding = self.predict(0)
        assert await self.device.started.get() == (0,)
        return holding

    async def queued(self, count: int) -> None:
        """Wait until this many requests wait for the device."""
        await until(lambda: self.gauge("tome_queue_depth") == count)

    async def in_order(self, *images: object, **fields: Any) -> "list[asyncio.Task[Reply]]":
        """Send requests one after the other, each once the one before is in the queue."""
        before = int(self.gauge("tome_queue_depth"))
        tasks = []
        for i, image in enumerate(images, 1):
            tasks.append(self.predict(image, **fields))
            await self.queued(before + i)
        return tasks

    def gauge(self, name: str) -> float:
        value = self.engine.metrics.registry.get_sample_value(name)
        assert value is not None
        return value

    def assert_idle(self) -> None:
        assert self.gauge("tome_requests_pending") == 0
        assert self.gauge("tome_queue_depth") == 0


async def until(condition: Callable[[], object]) -> None:
    """Let everything else go on until `condition` holds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (a metric has no event)
            await asyncio.sleep(0.001)


async def refused(task: "asyncio.Task[Reply]") -> RequestError:
    with pytest.raises(RequestError) as caught:
        await task
    return caught.value


def image_of(reply: Reply) -> int:
    return reply.result.class_ids[0]


@pytest.fixture(scope="module")
def bundled() -> HostedModel:
    return load(bundled_spec("fashion"), torch.device("cpu"))


@pytest.fixture
async def start(bundled: HostedModel) -> AsyncIterator[Callable[..., Bench]]:
    """Return a function that starts an engine; at the end no request may be left in any."""
    benches: list[tuple[Bench, asyncio.Task[None]]] = []

    def start(max_batch: int = 8, max_delay: float = 0.0, max_pending: int = 1000, threads: int = 2) -> Bench:
        device, decoder = ScriptedDevice(), ScriptedDecoder(bundled.preprocess.settings)
        device.gate.set()
        decoder.gate.set()
        first = replace(bundled, preprocess=decoder)
        models = {"first": replace(first, name="first"), "second": replace(first, name="second")}
        engine = Engine(
            device, Metrics(), Limits(max_batch, max_delay), max_pending, threads, ["first", "second", "third"], models
        )
        benches.append((Bench(engine, device, decoder), asyncio.create_task(engine.run())))
        return benches[-1][0]

    yield start
    for bench, running in benches:
        bench.decoder.gate.set()
        bench.device.gate.set()
        assert not running.done()
        await until(lambda bench=bench: bench.device.running == 0)
        bench.assert_idle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        bench.engine.close()


@pytest.fixture
async def bench(start: Callable[..., Bench]) -> Bench:
    return start()


# The plain way


async def test_a_request_is_answered_with_its_own_result_and_cost(bench: Bench, bundled: HostedModel) -> None:
    reply = await bench.predict(7, r=4)
    assert image_of(reply) == 7
    assert (reply.model.name, reply.r) == ("first", 4)
    assert reply.flops == 2 * bundled.cost(4).total
    assert reply.flops_saved == 2 * (bundled.cost(4).dense - bundled.cost(4).total)
    assert reply.timing.batch_size == 1
    assert reply.timing.slack is None
    assert bench.device.batches == [("first", 4, (7,))]


async def test_what_comes_while_the_device_is_busy_shares_a_batch(bench: Bench) -> None:
    await bench.hold_device()
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert [image_of(reply) for reply in replies] == [1, 2, 3]
    assert [reply.timing.batch_size for reply in replies] == [3, 3, 3]


async def test_a_batch_holds_no_more_than_it_may(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=3)
    await bench.hold_device()
    tasks = await bench.in_order(*range(1, 9))
    bench.device.gate.set()
    await asyncio.gather(*tasks)
    assert [images for *_, images in bench.device.batches] == [(0,), (1, 2, 3), (4, 5, 6), (7, 8)]


async def test_a_batch_starts_once_full_without_waiting_out_its_delay(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=2, max_delay=LATE)
    tasks = await bench.in_order(1)
    tasks += [bench.predict(2)]
    await asyncio.gather(*tasks)
    assert bench.device.batches == [("first", 0, (1, 2))]


async def test_a_batch_that_never_fills_starts_after_its_delay(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=8, max_delay=SOON)
    assert image_of(await bench.predict(1)) == 1


async def test_a_batch_holds_one_model_and_one_r(bench: Bench) -> None:
    await bench.hold_device()
    tasks = []
    for image in range(1, 13):
        model, r = ["first", "second"][image % 2], [0, 4, 8][image % 3]
        tasks += await bench.in_order(image, model=model, r=r)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    for image, reply in enumerate(replies, 1):
        assert image_of(reply) == image
        assert (reply.model.name, reply.r) == (["first", "second"][image % 2], [0, 4, 8][image % 3])
    for name, r, images in bench.device.batches[1:]:
        assert len(images) == 2
        assert {(["first", "second"][image % 2], [0, 4, 8][image % 3]) for image in images} == {(name, r)}


async def test_the_earliest_deadline_goes_first_whatever_its_model_and_r(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=1)
    await bench.hold_device()
    tasks = []
    for image, within in ((1, math.inf), (2, 400), (3, 200), (4, 300), (5, 100), (6, math.inf)):
        tasks += await bench.in_order(image, within=within, model=["first", "second"][image % 2], r=image)
    bench.device.gate.set()
    await asyncio.gather(*tasks)
    assert [images for *_, images in bench.device.batches] == [(0,), (5,), (3,), (4,), (2,), (1,), (6,)]


# Cancelled


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_request_cancelled_while_it_decodes_is_forgotten(start: Callable[..., Bench], threads: int) -> None:
    bench = start(threads=threads)
    bench.decoder.gate.clear()
    gone, mate = bench.predict(1), bench.predict(2)
    await until(lambda: bench.gauge("tome_requests_pending") == 2)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.gauge("tome_requests_pending") == 1
    bench.decoder.gate.set()
    assert image_of(await mate) == 2
    assert bench.device.seen == {2: 1}


async def test_a_request_cancelled_in_the_queue_never_reaches_the_device(bench: Bench) -> None:
    await bench.hold_device()
    before, gone, after = await bench.in_order(1, 2, 3)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.gauge("tome_queue_depth") == 2
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(before, after)] == [1, 3]
    assert bench.device.seen == {0: 1, 1: 1, 3: 1}


async def test_batch_mates_of_a_request_cancelled_on_the_device_are_answered(bench: Bench) -> None:
    holding = await bench.hold_device()
    tasks = await bench.in_order(1, 2, 3)
    bench.device.step()
    await holding
    assert await bench.device.started.get() == (1, 2, 3)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert bench.gauge("tome_requests_pending") == 2
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(tasks[0], tasks[2])] == [1, 3]


async def test_a_batch_whose_callers_have_all_gone_does_no_harm(bench: Bench) -> None:
    holding = await bench.hold_device()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    bench.device.gate.set()
    assert image_of(await bench.predict(1)) == 1


async def test_the_device_sleeps_on_when_the_only_request_is_cancelled(start: Callable[..., Bench]) -> None:
    """It waited for batch-mates; what it waited with is gone."""
    bench = start(max_delay=SOON)
    (gone,) = await bench.in_order(1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert image_of(await bench.predict(2)) == 2
    assert bench.device.seen == {2: 1}


# Expired


async def test_a_deadline_that_passes_while_decoding_says_so(bench: Bench) -> None:
    bench.decoder.gate.clear()
    error = await refused(bench.predict(1, within=SOON))
    assert isinstance(error, ExpiredError)
    assert error.stage == "decode"
    assert str(error) == "the deadline passed during decode, 50 ms after arrival"
    bench.decoder.gate.set()
    await bench.predict(2)
    assert bench.device.seen == {2: 1}


async def test_a_deadline_that_passes_in_the_queue_says_so_and_never_reaches_the_device(bench: Bench) -> None:
    holding = await bench.hold_device()
    error = await refused(bench.predict(1, within=SOON))
    assert isinstance(error, ExpiredError)
    assert error.stage == "queue"
    bench.device.gate.set()
    await holding
    await bench.predict(2)
    assert bench.device.seen == {0: 1, 2: 1}


async def test_a_deadline_that_passes_on_the_device_says_so_and_its_mates_are_answered(bench: Bench) -> None:
    holding = await bench.hold_device()
    late, mate = bench.predict(1, within=1), bench.predict(2)
    await bench.queued(2)
    bench.device.step()
    await holding
    assert sorted(await bench.device.started.get()) == [1, 2]
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "compute"
    bench.device.gate.set()
    assert image_of(await mate) == 2


@pytest.mark.parametrize("within", [0.0, -0.001, -1000.0])
async def test_a_deadline_that_is_over_on_arrival_decodes_nothing_for_the_device(bench: Bench, within: float) -> None:
    error = await refused(bench.predict(1, within=within))
    assert str(error) == "the deadline passed during decode, 0 ms after arrival"
    await bench.predict(2)
    assert bench.device.seen == {2: 1}


async def test_a_deadline_that_is_kept_leaves_slack(bench: Bench) -> None:
    reply = await bench.predict(1, within=LATE)
    assert reply.timing.slack == pytest.approx(LATE - reply.timing.total)


# Failed


async def test_only_the_image_that_a_model_fails_on_fails(bench: Bench) -> None:
    holding = await bench.hold_device()
    bench.device.poison = {2}
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    await holding
    error = await refused(tasks[1])
    assert isinstance(error, ModelFailedError)
    assert str(error) == "model first failed on this input"
    replies = await asyncio.gather(tasks[0], tasks[2])
    assert [image_of(reply) for reply in replies] == [1, 3]
    assert [reply.timing.batch_size for reply in replies] == [1, 1]
    assert bench.device.seen == {0: 1, 1: 2, 2: 2, 3: 2}


async def test_a_model_that_fails_goes_on_to_the_next_image(bench: Bench) -> None:
    bench.device.poison = {1}
    assert isinstance(await refused(bench.predict(1)), ModelFailedError)
    assert bench.device.seen == {1: 1}
    assert image_of(await bench.predict(2)) == 2


async def test_what_was_cancelled_is_not_run_again_after_a_failure(bench: Bench) -> None:
    holding = await bench.hold_device()
    bench.device.poison = {3}
    tasks = await bench.in_order(1, 2, 3)
    bench.device.step()
    await holding
    assert await bench.device.started.get() == (1, 2, 3)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    bench.device.gate.set()
    assert isinstance(await refused(tasks[2]), ModelFailedError)
    assert image_of(await tasks[0]) == 1
    assert bench.device.seen == {0: 1, 1: 2, 2: 1, 3: 2}


async def test_an_image_that_cannot_be_decoded_fails_alone(bench: Bench) -> None:
    good, bad = bench.predict(1), bench.predict("x")
    assert isinstance(await refused(bad), InvalidRequestError)
    assert image_of(await good) == 1


async def test_a_failure_is_not_a_refusal_when_it_is_no_request_error(bench: Bench) -> None:
    """A bug in decoding comes out as it is, for the log, and leaves nothing behind."""
    bench.decoder.encoded = None
    with pytest.raises(TypeError):
        await bench.predict(1)


# Refused


async def test_one_request_too_many_is_refused_until_another_is_answered(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=3)
    holding = await bench.hold_device()
    tasks = await bench.in_order(1, 2)
    error = await refused(bench.predict(3))
    assert isinstance(error, OverloadedError)
    assert error.retry_after > 0
    assert str(error).startswith("3 requests are waiting already; retry in ")
    bench.device.gate.set()
    await asyncio.gather(holding, *tasks)
    assert image_of(await bench.predict(3)) == 3
    assert bench.device.seen[3] == 1


async def test_a_request_refused_for_its_own_sake_takes_no_place(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=1)
    for fields in ({"model": "nothing"}, {"model": "third"}, {"r": -1}, {"top_k": 0}):
        await refused(bench.predict(1, **fields))
        bench.assert_idle()
    await bench.predict(1)


async def test_models_are_known_loading_or_unknown(bench: Bench) -> None:
    assert (await bench.predict(1, model="second")).model.name == "second"
    loading = await refused(bench.predict(1, model="third"))
    assert isinstance(loading, UnavailableError)
    assert str(loading) == "model third is loading"
    unknown = await refused(bench.predict(1, model="fourth"))
    assert isinstance(unknown, UnknownModelError)
    assert str(unknown) == "no model is named 'fourth'; this server hosts first, second, third"


async def test_draining_refuses_the_new_and_finishes_the_old(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    bench.decoder.gate.clear()
    decoding = bench.predict(3)
    await until(lambda: bench.gauge("tome_requests_pending") == 4)
    bench.engine.drain()
    assert isinstance(await refused(bench.predict(4)), UnavailableError)
    bench.decoder.gate.set()
    bench.device.gate.set()
    replies = await asyncio.gather(holding, *queued, decoding)
    assert [image_of(reply) for reply in replies] == [0, 1, 2, 3]
    assert isinstance(await refused(bench.predict(5)), UnavailableError)


# All of it at once


@pytest.mark.parametrize("seed", range(8))
async def test_every_request_ends_in_exactly_one_answer(start: Callable[..., Bench], seed: int) -> None:
    """Hundreds of requests with models, r, deadlines, cancellations, damage and failures drawn at random."""
    chance = random.Random(seed)
    bench = start(
        max_batch=chance.choice([1, 3, 8]),
        max_delay=chance.choice([0, 0.002]),
        max_pending=chance.choice([20, 1000]),
        threads=chance.choice([1, 4]),
    )
    count = 300
    images = range(1, count + 1)
    bench.device.poison = set(chance.sample(images, 20))
    damaged = set(chance.sample(images, 20))
    tasks: dict[int, asyncio.Task[Reply]] = {}
    wanted: dict[int, tuple[str, int]] = {}
    cancelled: set[int] = set()

    async def disturb() -> None:
        """Stop the device and the decoders now and then."""
        while True:
            for gate in (bench.device.gate, bench.decoder.gate):
                gate.clear() if chance.random() < 0.3 else gate.set()
            await asyncio.sleep(chance.random() * 0.004)

    disturbing = asyncio.create_task(disturb())
    for image in images:
        wanted[image] = (chance.choice(["first", "second"]), chance.choice([0, 4, 8]))
        within = chance.choice([0.0, 0.001, 0.005, 0.02, LATE, LATE, LATE, math.inf])
        name = f"damaged {image}" if image in damaged else image
        tasks[image] = bench.predict(name, model=wanted[image][0], r=wanted[image][1], within=within)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.003)
        unanswered = [image for image, task in tasks.items() if not task.done()]
        if unanswered and chance.random() < 0.2:
            victim = chance.choice(unanswered)
            tasks[victim].cancel()
            cancelled.add(victim)
    await asyncio.sleep(0)
    disturbing.cancel()
    bench.device.gate.set()
    bench.decoder.gate.set()
    async with asyncio.timeout(60):
        ends = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))

    for image, end in ends.items():
        if isinstance(end, Reply):
            assert image_of(end) == image
            assert (end.model.name, end.r) == wanted[image]
            assert bench.device.seen[image] >= 1
            assert image not in bench.device.poison | damaged
        elif isinstance(end, asyncio.CancelledError):
            assert image in cancelled
        elif isinstance(end, InvalidRequestError):
            assert image in damaged
        elif isinstance(end, ModelFailedError):
            assert image in bench.device.poison
        elif isinstance(end, OverloadedError):
            assert bench.engine.max_pending == 20
        else:
            assert isinstance(end, ExpiredError)
        if isinstance(end, InvalidRequestError | OverloadedError) or getattr(end, "stage", "") in ("decode", "queue"):
            assert bench.device.seen[image] == 0
    # Once, and again alone if a batch-mate failed.
    assert max(bench.device.seen.values()) <= 2
    for name, r, batch in bench.device.batches:
        assert {wanted[image] for image in batch} == {(name, r)}
    replies = sum(isinstance(end, Reply) for end in ends.values())
    assert replies > 0
    registry = bench.engine.metrics.registry
    counted = sum(
        registry.get_sample_value("tome_request_duration_seconds_count", {"model": name}) or 0
        for name in ("first", "second")
    )
    assert counted == replies, generate_latest(registry).decode()
