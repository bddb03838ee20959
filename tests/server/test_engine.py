"""The life of a request, with a device and a decoder that do what the test says, when it says so."""

import asyncio
import math
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import tome_server.timm_import  # noqa: F401  isort: skip
import torch
from prometheus_client import generate_latest

from tome_server import served as served_module
from tome_server.engine import EncodedImage, Engine, Reply, Request
from tome_server.errors import (
    DeviceDiedError,
    ExpiredError,
    InfeasibleError,
    InvalidRequestError,
    ModelFailedError,
    NoMemoryError,
    OutOfMemoryError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.models.hosted import HostedModel
from tome_server.models.loading import load
from tome_server.models.spec import Own, bundled_spec
from tome_server.models.transform import ImageSettings
from tome_server.observability.metrics import Metrics
from tome_server.oip.messages import InferRequest, RequestedOutput, Tensor
from tome_server.oip.service import OpenInference
from tome_server.runtime.work import BatchResult, Result, Work
from tome_server.scheduling.policy.view import Decision, Policy, View, uniform
from tome_server.scheduling.profile import Latency, Profile
from tome_server.served import ServedModel

# Passes while the test waits for it to pass, on any machine.
SOON = 0.05
# Passes in no test.
LATE = 1000.0
# The r grid of the bundled model.
RS = (0, 2, 4, 6, 8, 10, 12, 14)
TOP = RS[-1]
# What a batch of none would take, in seconds: nothing that a deadline notices, or what no machine's noise hides.
QUICK, SLOW = 1e-5, 1.0
POLICIES = ("price", "fixed:0", "fixed:8", "fixed:14", "max_accuracy", "max_batch", "slackfit")


def profile_of(unit: float, max_batch: int, *, packed: bool = True) -> Profile:
    """One image takes 2 units at r = 0 and 1.5 at the most; promised is a tenth more."""
    p50 = tuple(tuple(unit * (1 + size * (1 - level / 14)) for level in range(8)) for size in range(1, max_batch + 1))
    p95 = tuple(tuple(1.1 * value for value in row) for row in p50)
    return Profile(tuple(range(1, max_batch + 1)), RS, p50, p95, packed=packed)


@dataclass
class ScriptedDevice:
    """Stands in for the Device: runs batches when `gate` is open, and echoes each image as its only class.

    It says that a batch took what the profile says, however long that was, times `slowness`.
    """

    profile: Profile
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """model, r of each image, and images of each batch started"""
    slowness: float = 1.0
    packed: set[bool] = field(default_factory=set)
    """what it was told of running several r together"""
    deadlines: dict[int, float] = field(default_factory=dict)
    """of images; none may be run for the first time after its own"""
    poison: set[int] = field(default_factory=set)
    """images that the model raises on"""
    room: int = 1000
    """images that its memory is enough for; a batch of more runs out of it"""
    started: asyncio.Queue[tuple[int, ...]] = field(default_factory=asyncio.Queue)
    running: int = 0
    slots: set["ScriptedSlot"] = field(default_factory=set)
    """of the images that it holds"""
    dead: bool = False

    def put(self, _: str, image: int) -> "ScriptedSlot":
        slot = ScriptedSlot(self, image)
        self.slots.add(slot)
        return slot

    async def run(
        self, model: str, batch: Sequence[Work["ScriptedSlot"]], rs: Sequence[int], packed: bool
    ) -> BatchResult:
        assert {work.image for work in batch} <= self.slots
        images = tuple(work.image.image for work in batch)
        assert len(images) == len(rs) <= self.profile.max_batch
        for image in images:
            assert image in self.seen or asyncio.get_running_loop().time() <= self.deadlines.get(image, math.inf)
        self.batches.append((model, tuple(rs), images))
        self.packed.add(packed)
        self.started.put_nowait(images)
        assert self.running == 0, "one batch at a time"
        self.running += 1
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        if self.dead:
            raise DeviceDiedError("gone")
        assert {work.image for work in batch} <= self.slots
        if len(batch) > self.room:
            raise OutOfMemoryError("tried to allocate too much")
        if bad := self.poison & set(images):
            raise ValueError(f"no kernel for {bad}")
        seconds = self.slowness * Latency(self.profile).of_batch([self.profile.level_of(r) for r in rs])
        return BatchResult(tuple(Result((image,), (1.0,), None, None) for image in images), seconds)

    def step(self) -> None:
        """Let the batch on the device end; the next one is held again."""
        self.gate.set()
        self.gate.clear()

    def r_of(self, image: int) -> int:
        """The r that an image last ran at."""
        return next(rs[images.index(image)] for _, rs, images in reversed(self.batches) if image in images)

    @property
    def seen(self) -> Counter[int]:
        """How often each image was on the device."""
        return Counter(image for *_, images in self.batches for image in images)


@dataclass(eq=False)
class ScriptedSlot:
    """Where the device holds an image."""

    device: ScriptedDevice
    image: int

    def drop(self) -> None:
        self.device.slots.remove(self)


@dataclass
class ScriptedDecoder:
    """Stands in for Preprocess: an image is the number that its bytes spell, once `gate` is open."""

    settings: ImageSettings
    gate: threading.Event = field(default_factory=threading.Event)
    decoded: list[bytes] = field(default_factory=list)

    def encoded(self, data: bytes) -> int:
        self.decoded.append(data)
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
        while await self.device.started.get() != (0,):
            pass  # an earlier batch
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
        families = self.engine.metrics.registry.collect()
        values = [sample.value for family in families for sample in family.samples if sample.name == name]
        assert values
        return sum(values)

    def metric(self, name: str, **labels: str) -> float:
        """The value of the first model's metric."""
        value = self.engine.metrics.registry.get_sample_value(name, {"model": "first", **labels})
        assert value is not None
        return value

    def assert_idle(self) -> None:
        assert self.gauge("tome_requests_pending") == 0
        assert not self.device.slots
        assert self.gauge("tome_queue_depth") == 0


async def until(condition: Callable[[], object]) -> None:
    """Let everything else go on until `condition` holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.to_thread(time.sleep, 0.001)  # the loop's own clock may be stopped


async def refused(task: "asyncio.Task[Reply]") -> RequestError:
    with pytest.raises(RequestError) as caught:
        await task
    return caught.value


async def infeasible(task: "asyncio.Task[Reply]") -> InfeasibleError:
    error = await refused(task)
    assert isinstance(error, InfeasibleError)
    return error


@dataclass
class Clock:
    """The event loop's own, which a test may stop and put forward.

    It is looked at once in each round of the loop: what the engine decides and does in one is done at one instant,
    however busy the machine is.
    """

    loop: Any
    ahead: float = 0.0
    running: bool = True

    def __post_init__(self) -> None:
        self.time, self.select = self.loop.time, self.loop._selector.select
        self.now = self.time()
        self.loop.time = lambda: self.now + self.ahead
        self.loop._selector.select = self.selected

    def selected(self, timeout: float | None) -> Any:
        events = self.select(timeout)
        if self.running:
            self.now = self.time()
        return events

    def stop(self) -> None:
        """From now on no time passes but what is skipped."""
        self.running = False

    def skip(self, seconds: float) -> None:
        self.ahead += seconds


@pytest.fixture
async def clock() -> Clock:
    return Clock(asyncio.get_running_loop())


@pytest.fixture
async def stopped(clock: Clock) -> Clock:
    clock.stop()
    return clock


def image_of(reply: Reply) -> int:
    return reply.result.class_ids[0]


@pytest.fixture(scope="module")
def bundled() -> HostedModel:
    return load(bundled_spec("fashion"), torch.device("cpu"))


@pytest.fixture
async def start(bundled: HostedModel, clock: Clock) -> AsyncIterator[Callable[..., Bench]]:
    """Return a function that starts an engine; at the end no request may be left in any."""
    benches: list[tuple[Bench, asyncio.Task[None]]] = []

    def start(
        policy: str = "max_batch",
        unit: float = QUICK,
        *,
        max_batch: int = 8,
        max_delay: float = 0.0,
        max_pending: int = 1000,
        threads: int = 2,
        packed: bool = True,
        second: Own = Own(),  # noqa: B008  (frozen)
    ) -> Bench:
        profile = profile_of(unit, max_batch, packed=packed)
        device, decoder = ScriptedDevice(profile), ScriptedDecoder(bundled.preprocess.settings)
        device.gate.set()
        decoder.gate.set()
        models = {
            name: ServedModel(
                replace(bundled, name=name, preprocess=decoder, default_budget=LATE), profile, policy, own=own
            )
            for name, own in (("first", Own()), ("second", second))
        }
        engine = Engine(
            device,
            Metrics(),
            max_delay=max_delay,
            max_pending=max_pending,
            reply_margin=0.0001,
            decode_threads=threads,
            names=["first", "second", "third"],
            models=models,
        )
        for name, served in models.items():
            engine.metrics.serving(name, "vit", "cpu", "float32", "price", RS, served.model.largest_r)
        benches.append((Bench(engine, device, decoder), asyncio.create_task(engine.run())))
        return benches[-1][0]

    yield start
    for bench, running in benches:
        bench.decoder.gate.set()
        bench.device.gate.set()
        assert not running.done()
        # Threads that still decode for those who have gone give back what they took once they are done.
        await until(lambda bench=bench: bench.device.running == 0 and not bench.device.slots)
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
    assert reply.timing.slack == pytest.approx(LATE - reply.timing.total)
    assert bench.device.batches == [("first", (4,), (7,))]


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
    assert bench.device.batches == [("first", (0, 0), (1, 2))]


async def test_a_batch_that_never_fills_starts_after_its_delay(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=8, max_delay=SOON)
    assert image_of(await bench.predict(1)) == 1


async def test_a_batch_holds_one_model_and_each_member_its_own_r(bench: Bench) -> None:
    await bench.hold_device()
    tasks = []
    for image in range(1, 13):
        model, r = ["first", "second"][image % 2], [0, 4, 7][image % 3]
        tasks += await bench.in_order(image, model=model, r=r)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    for image, reply in enumerate(replies, 1):
        assert image_of(reply) == image
        assert (reply.model.name, reply.r) == (["first", "second"][image % 2], [0, 4, 7][image % 3])
    assert bench.device.batches[1:] == [
        ("second", (4, 0, 7, 4, 0, 7), (1, 3, 5, 7, 9, 11)),
        ("first", (7, 4, 0, 7, 4, 0), (2, 4, 6, 8, 10, 12)),
    ]


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


async def test_the_device_sleeps_on_when_the_only_request_is_cancelled(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    """It waited for batch-mates; what it waited with is gone."""
    bench = start(max_delay=SOON)
    (gone,) = await bench.in_order(1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    (other,) = await bench.in_order(2)
    stopped.skip(SOON)
    assert image_of(await other) == 2
    assert bench.device.seen == {2: 1}


# Expired


async def test_a_deadline_that_passes_while_decoding_says_so(bench: Bench, stopped: Clock) -> None:
    bench.decoder.gate.clear()
    late = bench.predict(1, within=SOON)
    await until(lambda: bench.decoder.decoded)
    stopped.skip(SOON)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "decode"
    assert str(error) == "the deadline passed during decode, 50 ms after arrival"
    bench.decoder.gate.set()
    await bench.predict(2)
    assert bench.device.seen == {2: 1}


async def test_a_deadline_that_passes_in_the_queue_says_so_and_never_reaches_the_device(
    bench: Bench, stopped: Clock
) -> None:
    holding = await bench.hold_device()
    (late,) = await bench.in_order(1, within=SOON)
    stopped.skip(SOON)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "queue"
    bench.device.gate.set()
    await holding
    await bench.predict(2)
    assert bench.device.seen == {0: 1, 2: 1}


async def test_a_deadline_that_passes_on_the_device_says_so_and_its_mates_are_answered(
    bench: Bench, stopped: Clock
) -> None:
    holding = await bench.hold_device()
    late, mate = bench.predict(1, within=1), bench.predict(2)
    await bench.queued(2)
    bench.device.step()
    await holding
    assert sorted(await bench.device.started.get()) == [1, 2]
    stopped.skip(1)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "compute"
    bench.device.gate.set()
    assert image_of(await mate) == 2


async def test_a_call_cancelled_at_its_deadline_has_missed_it_and_one_cancelled_before_has_not(
    bench: Bench, clock: Clock
) -> None:
    holding = await bench.hold_device()
    late, gone = await bench.in_order(1, 2, within=LATE / 2)
    gone.cancel()
    await bench.queued(1)
    # As gRPC does, where the machine is so busy that our own look at the clock comes later.
    clock.skip(LATE / 2)
    late.cancel()
    for task in (late, gone):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert bench.metric("tome_slo_missed_total", reason="expired") == 1
    bench.device.gate.set()
    await holding
    assert bench.device.seen == {0: 1}


@pytest.mark.parametrize("within", [0.0, -0.001, -1000.0])
async def test_a_deadline_that_is_over_on_arrival_is_refused_undecoded(bench: Bench, within: float) -> None:
    assert (await infeasible(bench.predict(1, within=within))).smallest > 0
    await bench.predict(2)
    assert bench.decoder.decoded == [b"2"]
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


async def test_a_batch_that_memory_is_too_small_for_is_halved_until_it_fits(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.hold_device()
    bench.device.room = 2
    tasks = await bench.in_order(*range(1, 8))
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert [image_of(reply) for reply in replies] == list(range(1, 8))
    assert [images for *_, images in bench.device.batches[1:]] == [
        (1, 2, 3, 4, 5, 6, 7),
        (1, 2, 3, 4),
        (1, 2),
        (3, 4),
        (5, 6),
        (7,),
    ]
    assert [reply.timing.batch_size for reply in replies] == [2, 2, 2, 2, 2, 2, 1]
    assert [message for message in caplog.messages if "lacks memory" in message] == [
        f"model first lacks memory for a batch of {size}; running its halves, and from now on no more than {half} at "
        "once, until it is loaded anew: tried to allocate too much"
        for size, half in ((7, 4), (4, 2))
    ]
    assert bench.metric("tome_halved_batches_total") == 2


async def test_a_size_that_memory_was_too_small_for_is_not_tried_again(bench: Bench, bundled: HostedModel) -> None:
    async def sizes(first: int, model: str) -> list[int]:
        bench.device.gate.clear()
        holding = bench.predict(0, model=model)
        await until(lambda: bench.device.running)
        tasks = await bench.in_order(*range(first, first + 8), model=model)
        bench.device.gate.set()
        return [reply.timing.batch_size for reply in (await asyncio.gather(holding, *tasks))[1:]]

    bench.device.room = 5
    assert await sizes(10, "first") == 8 * [4]
    tried = len(bench.device.batches)
    bench.device.room = 4
    assert await sizes(20, "first") == 8 * [4]
    assert len(bench.device.batches) == tried + 3
    # It is of one model, and ends with it.
    bench.device.room = 1000
    assert await sizes(30, "second") == 8 * [8]
    profile = profile_of(QUICK, 8)
    anew = replace(bundled, name="first", preprocess=bench.decoder, default_budget=LATE)
    before = bench.engine.serve(ServedModel(anew, profile, "max_batch", "anew"))
    assert before
    await bench.engine.left(before)
    assert await sizes(40, "first") == 8 * [8]


async def test_halves_keep_the_r_of_each_image_and_leave_out_who_has_gone(bench: Bench) -> None:
    holding = await bench.hold_device()
    bench.device.room = 2
    tasks = [task for image in range(1, 6) for task in await bench.in_order(image, r=2 * image)]
    bench.device.step()
    await holding
    assert await bench.device.started.get() == (1, 2, 3, 4, 5)
    for gone in (tasks[1], tasks[3], tasks[4]):
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
    bench.device.gate.set()
    assert [(await task).r for task in (tasks[0], tasks[2])] == [2, 6]
    assert [(rs, images) for _, rs, images in bench.device.batches[2:]] == [((2, 6), (1, 3))]


async def test_one_image_that_there_is_no_memory_for_is_refused_and_the_server_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.hold_device()
    bench.device.room = 0
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    for task in tasks:
        error = await refused(task)
        assert isinstance(error, NoMemoryError)
        assert str(error) == "model first has no memory left on the device for this image"
    assert bench.device.seen[1] == 3
    assert "model first lacks memory for one image: tried to allocate too much" in caplog.messages
    bench.device.room = 1
    assert image_of(await bench.predict(4)) == 4
    # Those, and what held the device.
    assert bench.metric("tome_slo_missed_total", reason="failed") == 4


async def test_a_model_that_fails_on_an_image_of_half_a_batch_fails_on_that_alone(bench: Bench) -> None:
    await bench.hold_device()
    bench.device.room, bench.device.poison = 2, {3}
    tasks = await bench.in_order(1, 2, 3, 4)
    bench.device.gate.set()
    assert isinstance(await refused(tasks[2]), ModelFailedError)
    assert [image_of(await tasks[i]) for i in (0, 1, 3)] == [1, 2, 4]


async def test_an_image_that_cannot_be_decoded_fails_alone(bench: Bench) -> None:
    good, bad = bench.predict(1), bench.predict("x")
    assert isinstance(await refused(bad), InvalidRequestError)
    assert image_of(await good) == 1
    # No server could have answered it: that is no miss.
    assert bench.gauge("tome_slo_missed_total") == 0
    assert bench.metric("tome_slo_met_total") == 1


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
    for fields in ({"model": "nothing"}, {"model": "third"}, {"r": -1}, {"min_quality": 2.0}, {"top_k": 0}):
        await refused(bench.predict(1, **fields))
        bench.assert_idle()
    await bench.predict(1)


async def test_a_model_may_hold_fewer_requests_than_the_server(start: Callable[..., Bench]) -> None:
    bench = start(second=Own(max_pending=2))
    on_device = await bench.hold_device()
    held = await bench.in_order(1, 2, model="second")
    error = await refused(bench.predict(3, model="second"))
    assert isinstance(error, OverloadedError)
    assert str(error).startswith("2 requests are waiting")
    others = await bench.in_order(4, 5, 6)
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(on_device, *held, *others)] == [0, 1, 2, 4, 5, 6]


async def test_a_model_may_not_hold_more_requests_than_the_server(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=1, second=Own(max_pending=2))
    on_device = await bench.hold_device()
    assert isinstance(await refused(bench.predict(1, model="second")), OverloadedError)
    bench.device.gate.set()
    await on_device


async def test_a_model_may_wait_for_mates_where_others_do_not(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=2, second=Own(max_delay=LATE))
    waits = await bench.in_order(1, model="second")
    assert await bench.predict(
        2, model="first"
    )  # meanwhile the device wasn't idle, so that there was nothing to wait for
    assert image_of(await waits[0]) == 1
    waits = await bench.in_order(3, model="second")
    await asyncio.gather(bench.predict(4, model="second"), *waits)
    assert [images for *_, images in bench.device.batches] == [(1,), (2,), (3, 4)]


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


# r, within what a request allows


@pytest.mark.parametrize("policy", ["max_accuracy", "max_batch", "slackfit"])
async def test_a_tight_and_a_loose_request_in_one_queue_get_different_r(
    start: Callable[..., Bench], stopped: Clock, policy: str
) -> None:
    bench = start(policy, SLOW, max_batch=1)
    await bench.hold_device()
    loose, tight = bench.predict(1), bench.predict(2, within=5.0)
    await bench.queued(2)
    stopped.skip(3.2)
    bench.device.gate.set()
    # Promised for one image is 2.2 at r = 0 and 1.65 at r = 14.
    assert [(await loose).r, (await tight).r >= 12] == [0, True]
    assert [images for *_, images in bench.device.batches] == [(0,), (2,), (1,)]


async def test_requests_with_time_on_an_idle_device_are_merged_only_where_that_costs_next_to_nothing(
    start: Callable[..., Bench], clock: Clock, bundled: HostedModel
) -> None:
    bench = start("price", 0.01 * SLOW)
    assert bundled.relative_quality is not None
    for image in range(5):
        r = (await bench.predict(image)).r
        assert bundled.relative_quality[RS.index(r)] > 0.9995
        clock.skip(60)


async def test_a_queue_that_would_be_late_is_merged_further(start: Callable[..., Bench]) -> None:
    """Alone, each would have time for r = 0; as it is, no smaller r than the largest gets all of them answered."""
    bench = start("price", SLOW)
    await bench.hold_device()
    tasks = await bench.in_order(*range(1, 25), within=30.0)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert min(reply.r for reply in replies) > 0


@pytest.mark.parametrize("packed", [True, False])
async def test_members_of_one_batch_get_an_r_each_in_one_call(start: Callable[..., Bench], packed: bool) -> None:
    bench = start("fixed:8", packed=packed)
    await bench.hold_device()
    tasks = await bench.in_order(1)
    for image, bounds in enumerate(({"max_r": 2}, {"min_r": 12}, {"r": 5}, {"min_r": 3, "max_r": 5}, {"r": 98}), 2):
        tasks += await bench.in_order(image, **bounds)
    bench.device.gate.set()
    assert [reply.r for reply in await asyncio.gather(*tasks)] == [8, 2, 12, 5, 4, 98]
    assert bench.device.batches[1:] == [("first", (8, 2, 12, 5, 4, 98), (1, 2, 3, 4, 5, 6))]
    assert bench.device.packed == {packed}


async def test_the_least_quality_bounds_r(start: Callable[..., Bench], bundled: HostedModel) -> None:
    bench = start("fixed:14")
    assert bundled.relative_quality is not None
    for min_quality in (1.0, 0.999, 0.99):
        r = (await bench.predict(1, min_quality=min_quality)).r
        assert min(bundled.relative_quality[: RS.index(r) + 1]) >= min_quality
    assert r == TOP
    assert (await refused(bench.predict(1, r=TOP, min_quality=1.0))).field == "min_quality"


async def test_the_reply_says_what_was_expected(start: Callable[..., Bench]) -> None:
    bench = start("fixed:0", SLOW)
    bench.device.slowness = 3.0
    timing = (await bench.predict(1)).timing
    assert timing.predicted == pytest.approx(2.0)
    assert timing.compute == pytest.approx(6.0)


async def test_a_request_without_a_deadline_gets_the_default_budget(start: Callable[..., Bench], clock: Clock) -> None:
    bench = start()
    reply = await bench.predict(1)
    assert reply.timing.slack + reply.timing.total == pytest.approx(LATE)
    holding = await bench.hold_device()
    (late,) = await bench.in_order(1)
    clock.skip(LATE)
    for task in (holding, late):
        assert isinstance(await refused(task), ExpiredError)


# Infeasible


@pytest.mark.usefixtures("stopped")
async def test_what_cannot_be_met_is_refused_before_it_is_decoded(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    # Alone, merged the most, it is promised in 1.65.
    error = await infeasible(bench.predict(1, within=1.6))
    assert error.smallest == pytest.approx(1.65, abs=0.01)
    assert str(error).startswith("the deadline can't be met; the smallest latency possible now is 16")
    assert bench.decoder.decoded == []
    assert bench.device.batches == []
    assert bench.metric("tome_rejected_total", reason="infeasible") == 1
    assert bench.metric("tome_slo_missed_total", reason="infeasible") == 1
    # With some room for decoding, which has never been measured yet, just that is enough.
    reply = await bench.predict(2, within=error.smallest + 0.1)
    assert reply.r >= 10
    assert reply.timing.slack > 0
    assert bench.metric("tome_slo_met_total") == 1


@pytest.mark.parametrize(
    ("bounds", "smallest"), [({"max_r": 0}, 2.2), ({"r": 0}, 2.2), ({"r": 7}, 1.1 * (2 - 3 / 14)), ({"r": 98}, 1.65)]
)
@pytest.mark.usefixtures("stopped")
async def test_the_smallest_latency_is_that_of_what_the_request_allows(
    start: Callable[..., Bench], bounds: dict[str, int], smallest: float
) -> None:
    bench = start(unit=SLOW)
    assert (await infeasible(bench.predict(1, within=1.0, **bounds))).smallest == pytest.approx(smallest, abs=0.01)
    assert image_of(await bench.predict(2, within=smallest + 0.2, **bounds)) == 2


@pytest.mark.usefixtures("stopped")
async def test_a_fixed_policy_promises_only_what_it_does(start: Callable[..., Bench]) -> None:
    bench = start("fixed:0", unit=SLOW)
    error = await infeasible(bench.predict(1, within=1.8))
    assert error.smallest == pytest.approx(2.2, abs=0.01)
    assert bench.decoder.decoded == []
    assert (await bench.predict(2, within=error.smallest + 0.1)).r == 0


@pytest.mark.usefixtures("stopped")
async def test_those_with_an_earlier_deadline_and_the_batch_on_the_device_are_reckoned_with(
    start: Callable[..., Bench],
) -> None:
    bench = start(unit=SLOW, max_batch=1)
    await bench.hold_device()  # expected to end within 2.2
    first = await bench.in_order(1, 2, within=50.0)
    error = await infeasible(bench.predict(3, within=3.0))
    assert error.smallest == pytest.approx(2.2 + 1.65, abs=0.01)
    bench.device.gate.set()
    await asyncio.gather(*first)


@pytest.mark.usefixtures("stopped")
async def test_requests_shed_in_the_queue_are_told_so(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shed_all_but_the_last(view: View) -> Decision:
        return Decision(view.waiting[-1:], [0], view.waiting[:-1])

    use(monkeypatch, shed_all_but_the_last)
    bench = start(unit=SLOW)
    await bench.hold_device()
    *shed, last = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    for task in shed:
        assert (await infeasible(task)).smallest == pytest.approx(1.65, abs=0.01)
    assert image_of(await last) == 3
    assert bench.device.seen == {0: 1, 3: 1}
    assert bench.metric("tome_slo_missed_total", reason="infeasible") == 2


async def test_those_who_have_become_hopeless_in_the_queue_are_told_so(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    holding = await bench.hold_device()
    hopeless, hopeful = await bench.in_order(1, within=10.0) + await bench.in_order(2, within=20.0)
    stopped.skip(9.0)
    bench.device.gate.set()
    # From now on, that is, if it were sent again.
    assert (await infeasible(hopeless)).smallest == pytest.approx(1.65, abs=0.01)
    assert image_of(await hopeful) == 2
    await holding
    assert bench.device.seen == {0: 1, 2: 1}


# Predictions


async def test_while_the_device_is_slow_less_is_admitted_and_an_idle_spell_forgets_that(
    start: Callable[..., Bench], clock: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 3.0
    for image in range(10):
        assert image_of(await bench.predict(image)) == image
    assert (await infeasible(bench.predict(99, within=3.0))).smallest > 3 * 1.5
    # No batch runs now that could tell that the device has recovered.
    for _ in range(20):
        clock.skip(3.0)
        task = bench.predict(98, within=3.0)
        if not isinstance((await asyncio.gather(task, return_exceptions=True))[0], InfeasibleError):
            break
    assert image_of(await task) == 98


async def test_how_far_predictions_are_off_is_counted(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    for slowness in (2.0, 0.5):
        bench.device.slowness = slowness
        await bench.predict(1, r=0)
    assert bench.metric("tome_latency_prediction_ratio_count") == 2
    # One batch alone doesn't make the device slow: of the second, as much was expected as of the first.
    assert bench.metric("tome_latency_prediction_ratio_sum") == pytest.approx(2.5, rel=0.1)
    assert bench.metric("tome_compute_seconds_total") == pytest.approx(2.0 * 2.0 + 0.5 * 2.0)


async def test_speedup_is_the_time_taken_against_the_profile_at_r_0(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    await bench.predict(1, r=0)
    assert bench.metric("tome_speedup_ratio_sum") == pytest.approx(1.0, rel=0.01)
    # Two units at r = 0 and 1.5 at the most merging, whatever operations that saves.
    await bench.predict(2, r=TOP)
    assert bench.metric("tome_speedup_ratio_sum") - 1 == pytest.approx(2.0 / 1.5, rel=0.01)
    # A stalled batch is not the merging's fault, but it is no speedup either.
    bench.device.slowness = 3.0
    await bench.predict(3, r=TOP)
    assert bench.metric("tome_speedup_ratio_bucket", le="0.5") == 1
    assert bench.metric("tome_speedup_ratio_count") == 3


async def test_a_machine_that_has_slowed_is_no_loss_of_speedup(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    assert bench.metric("tome_latency_drift_ratio") == 1
    bench.device.slowness = 2.0
    for image in range(12):
        await bench.predict(image, r=TOP)
    assert bench.metric("tome_latency_drift_ratio") == pytest.approx(2.0, rel=0.01)
    before = bench.metric("tome_speedup_ratio_sum")
    await bench.predict(13, r=TOP)
    # Unmerged, it would have taken twice as long as profiled as well.
    assert bench.metric("tome_speedup_ratio_sum") - before == pytest.approx(2.0 / 1.5, rel=0.05)


async def test_replies_that_are_slow_on_their_way_back_are_allowed_for(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    assert (await infeasible(bench.predict(1, within=1.0))).smallest == pytest.approx(1.65, abs=0.01)
    for _ in range(5):
        holding = await bench.hold_device()
        stopped.skip(2.0 + 5.0)  # the device will say that it took 2
        bench.device.gate.set()
        await holding
    error = await infeasible(bench.predict(1, within=5.0))
    assert error.smallest == pytest.approx(5.0 + 1.65, abs=0.01)
    assert bench.device.seen == {0: 5}
    reply = await bench.predict(1, within=error.smallest + 0.2)
    assert reply.r > 0
    # Once replies are quick again, that is forgotten.
    for image in range(64):
        await bench.predict(image)
    assert image_of(await bench.predict(1, within=2.0)) == 1


# Work for nobody


async def test_the_device_time_of_those_who_went_is_counted_as_wasted(
    start: Callable[..., Bench], clock: Clock
) -> None:
    bench = start("fixed:0", unit=SLOW)
    holding = await bench.hold_device()
    bench.device.slowness = 2.0
    kept, gone, late = [*await bench.in_order(1, 2), *await bench.in_order(3, within=50.0)]
    bench.device.step()
    await holding
    assert sorted(await bench.device.started.get()) == [1, 2, 3]
    assert bench.metric("tome_compute_wasted_seconds_total") == 0
    gone.cancel()
    clock.skip(50.0)
    assert (await refused(late)).stage == "compute"
    bench.device.gate.set()
    assert image_of(await kept) == 1
    with pytest.raises(asyncio.CancelledError):
        await gone
    # Three at r = 0 are expected to take 4, and took 8; the one before took 2 or twice that.
    assert bench.metric("tome_compute_wasted_seconds_total") == pytest.approx(8.0 * 2 / 3)
    assert bench.metric("tome_compute_seconds_total") > 8.0


async def test_what_nobody_waits_for_any_more_is_not_run(start: Callable[..., Bench], clock: Clock) -> None:
    bench = start(unit=SLOW)
    await bench.hold_device()
    gone, late, kept = [*await bench.in_order(1), *await bench.in_order(2, within=50.0), *await bench.in_order(3)]
    gone.cancel()
    clock.skip(50.0)
    assert (await refused(late)).stage == "queue"
    bench.device.gate.set()
    assert image_of(await kept) == 3
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.device.seen == {0: 1, 3: 1}
    assert bench.metric("tome_compute_wasted_seconds_total") == 0


# A policy that is wrong


def use(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Let every name be that of `policy`."""
    monkeypatch.setattr(served_module, "policy_named", lambda *_: policy)


def raises(view: View) -> Decision:
    raise ZeroDivisionError("of course")


def breaks_bounds(view: View) -> Decision:
    return Decision(view.waiting[:1], [len(RS) - 1])


def invents(view: View) -> Decision:
    return Decision([replace(view.waiting[0])], [view.waiting[0].low])


def does_nothing(view: View) -> Decision:
    return Decision((), ())


def answers_nonsense(view: View) -> Any:
    return None


@pytest.mark.parametrize("policy", [raises, breaks_bounds, invents, does_nothing, answers_nonsense])
async def test_without_a_policy_that_works_the_server_goes_on_and_says_so(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: Policy
) -> None:
    use(monkeypatch, policy)
    bench = start()
    await bench.hold_device()
    tasks = await bench.in_order(1, 2, max_r=4) + await bench.in_order(3, min_r=3, max_r=3)
    bench.device.gate.set()
    assert [reply.r for reply in await asyncio.gather(*tasks)] == [4, 4, 3]
    assert bench.metric("tome_policy_failures_total") >= 1
    assert "the policy failed; running the earliest deadlines at their most merging" in caplog.text


async def test_a_policy_that_fails_once_is_asked_again(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def fails_at_first(view: View) -> Decision:
        nonlocal asked
        asked += 1
        return uniform(view.waiting, 3) if asked > 1 else raises(view)

    use(monkeypatch, fails_at_first)
    bench = start()
    assert [(await bench.predict(1)).r for _ in range(3)] == [TOP, RS[3], RS[3]]
    assert bench.metric("tome_policy_failures_total") == 1


# All of it at once


def drawn_bounds(chance: random.Random) -> dict[str, int | float]:
    """Bounds on r as a caller might set them; min_r and max_r are always among them."""
    if chance.random() < 0.3:
        r = chance.choice([0, 4, 7, 14, 20])
        return {"min_r": r, "max_r": r, **({"r": r} if chance.random() < 0.5 else {})}
    low, high = sorted(chance.choices(range(18), k=2))
    return {"min_r": low, "max_r": high}


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_request_ends_in_exactly_one_answer_within_its_bounds(
    start: Callable[..., Bench], policy: str
) -> None:
    """Hundreds of requests with models, bounds, deadlines, cancellations, damage and failures drawn at random."""
    chance = random.Random(policy)
    bench = start(
        policy,
        chance.choice([QUICK, 1e-3]),
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
    models: dict[int, str] = {}
    bounds: dict[int, dict[str, int | float]] = {}
    cancelled: set[int] = set()
    ended_unseen: set[int] = set()
    short_of_memory = chance.random() < 0.5

    async def disturb() -> None:
        """Stop the device and the decoders now and then, and take the device's memory away."""
        while True:
            for gate in (bench.device.gate, bench.decoder.gate):
                gate.clear() if chance.random() < 0.3 else gate.set()
            bench.device.room = chance.choice([0, 1, 3]) if short_of_memory and chance.random() < 0.2 else 1000
            await asyncio.sleep(chance.random() * 0.004)

    disturbing = asyncio.create_task(disturb())
    for image in images:
        models[image], bounds[image] = chance.choice(["first", "second"]), drawn_bounds(chance)
        within = chance.choice([0.0, 0.001, 0.005, 0.02, 0.1, LATE, LATE, math.inf])
        bench.device.deadlines[image] = asyncio.get_running_loop().time() + within
        name = f"damaged {image}" if image in damaged else image
        tasks[image] = bench.predict(name, model=models[image], within=within, **bounds[image])
        tasks[image].add_done_callback(lambda _, image=image: bench.device.seen[image] or ended_unseen.add(image))
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
            assert end.model.name == models[image]
            assert end.r == bench.device.r_of(image)
            assert bench.device.seen[image] >= 1
            assert image not in bench.device.poison | damaged
        elif isinstance(end, asyncio.CancelledError):
            assert image in cancelled
        elif isinstance(end, InvalidRequestError):
            assert image in damaged
        elif isinstance(end, ModelFailedError):
            assert image in bench.device.poison
        elif isinstance(end, NoMemoryError):
            assert short_of_memory
        elif isinstance(end, OverloadedError):
            assert bench.engine.max_pending == 20
        elif isinstance(end, InfeasibleError):
            assert bench.device.seen[image] == 0
            assert end.smallest > 0
        else:
            assert isinstance(end, ExpiredError)
        if isinstance(end, InvalidRequestError | OverloadedError) or getattr(end, "stage", "") in ("decode", "queue"):
            assert bench.device.seen[image] == 0
    # Once, and again alone if a batch-mate failed; up to three more times if memory ran out.
    assert max(bench.device.seen.values()) <= (4 if short_of_memory else 2)
    # Nobody who has been answered, or has gone, is run for it any more.
    assert not any(bench.device.seen[image] for image in ended_unseen)
    for name, rs, batch in bench.device.batches:
        assert {models[image] for image in batch} == {name}
        for r, image in zip(rs, batch, strict=True):
            assert bounds[image]["min_r"] <= r <= bounds[image]["max_r"]
    replies = sum(isinstance(end, Reply) for end in ends.values())
    assert replies > 0
    registry = bench.engine.metrics.registry
    counted = sum(
        registry.get_sample_value("tome_request_duration_seconds_count", {"model": name}) or 0
        for name in ("first", "second")
    )
    assert counted == replies, generate_latest(registry).decode()


async def test_a_batch_within_what_was_promised_is_counted_apart_from_one_that_was_not(bench: Bench) -> None:
    await bench.predict(1)
    assert bench.metric("tome_latency_promises_total", promise="kept") == 1
    bench.device.slowness = 2.0  # promised is a tenth more than expected
    await bench.predict(2)
    assert bench.metric("tome_latency_promises_total", promise="kept") == 1
    assert bench.metric("tome_latency_promises_total", promise="broken") == 1


async def test_all_are_answered_once_the_last_is(bench: Bench) -> None:
    await bench.engine.answered()
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    bench.engine.drain()
    answered = asyncio.create_task(bench.engine.answered())
    assert isinstance(await refused(bench.predict(3)), UnavailableError)
    bench.device.step()
    await holding
    await asyncio.sleep(0)
    assert not answered.done()
    bench.device.gate.set()
    await answered
    assert [image_of(await task) for task in queued] == [1, 2]


# Models that come and go, and a device that dies


async def retire(bench: Bench, name: str) -> None:
    await bench.engine.left(bench.engine.retire(name))


async def test_a_retired_model_answers_what_it_has_and_refuses_the_rest(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    retiring = asyncio.create_task(retire(bench, "first"))
    await asyncio.sleep(0)
    assert isinstance(await refused(bench.predict(3, model="first")), UnknownModelError)
    other = bench.predict(4, model="second")
    bench.device.gate.set()
    assert image_of(await other) == 4
    assert [image_of(reply) for reply in await asyncio.gather(holding, *queued)] == [0, 1, 2]
    await retiring
    assert "first" not in bench.engine.models
    assert not bench.engine.leaving
    assert bench.engine.default_name == "second"


async def test_a_replaced_model_answers_what_it_has_and_its_successor_the_rest(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    before = bench.engine.models["first"]
    after = ServedModel(before.model, before.profile, "max_batch", "first#2")
    assert bench.engine.serve(after) is before
    leaving = asyncio.create_task(bench.engine.left(before))
    later = bench.predict(3)
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(holding, *queued, later)] == [0, 1, 2, 3]
    await leaving
    assert {image: key for key, _, images in bench.device.batches for image in images} == {
        0: "first", 1: "first", 2: "first", 3: "first#2",
    }  # fmt: skip
    assert not bench.engine.leaving


@pytest.mark.parametrize("change", ["replaced", "retired"])
async def test_requests_of_a_model_that_is_held_are_answered_by_it_whatever_becomes_of_it(
    bench: Bench, change: str
) -> None:
    before = bench.engine.models["first"]
    with bench.engine.holding(before):
        if change == "replaced":
            bench.engine.serve(ServedModel(before.model, before.profile, "max_batch", "first#2"))
        else:
            bench.engine.retire("first")
        leaving = asyncio.create_task(bench.engine.left(before))
        assert image_of(await bench.engine.predict(bench.request(7), before)) == 7
        assert bench.device.batches[-1][0] == before.key
        assert not leaving.done()
    await leaving
    assert not bench.engine.leaving


async def test_all_images_of_a_request_are_answered_by_one_model_though_it_is_replaced_before_they_start(
    bench: Bench,
) -> None:
    before = bench.engine.models["first"]
    images = InferRequest("first", Tensor("image", "BYTES", (2,), [b"1", b"2"]), outputs=[RequestedOutput("class_id")])
    arrival = asyncio.get_running_loop().time()
    answering = asyncio.create_task(OpenInference(bench.engine).infer(images, arrival, None))
    # It has gone as far as to have a task for each image, none of which has begun.
    await asyncio.sleep(0)
    assert bench.gauge("tome_requests_pending") == 0
    successor = replace(before.model, version=2)
    bench.engine.serve(ServedModel(successor, before.profile, "max_batch", "first#2"))
    leaving = asyncio.create_task(bench.engine.left(before))
    response = await answering
    assert response.version == "1"
    assert {key for key, *_ in bench.device.batches} == {before.key}
    await leaving
    images = replace(images, version="2")
    assert (await OpenInference(bench.engine).infer(images, arrival, None)).version == "2"


async def test_a_retired_model_is_let_go_only_after_a_batch_whose_callers_have_gone(bench: Bench) -> None:
    holding = await bench.hold_device()
    holding.cancel()
    await asyncio.sleep(0)
    retiring = asyncio.create_task(retire(bench, "first"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not retiring.done()
    bench.device.gate.set()
    await retiring


async def test_a_model_that_is_expected_is_unavailable_until_it_is_served(bench: Bench) -> None:
    served = bench.engine.models["first"]
    await retire(bench, "first")
    assert isinstance(await refused(bench.predict(1, model="first")), UnknownModelError)
    bench.engine.expect("first")
    assert isinstance(await refused(bench.predict(1, model="first")), UnavailableError)
    assert bench.engine.serve(served) is None
    assert image_of(await bench.predict(1, model="first")) == 1


async def test_without_any_model_requests_are_refused(bench: Bench) -> None:
    for name in list(bench.engine.models):
        await retire(bench, name)
    bench.engine.forget("third")
    assert isinstance(await refused(bench.predict(1)), UnavailableError)
    assert isinstance(await refused(bench.predict(1, model="first")), UnknownModelError)


async def test_when_the_device_dies_everybody_gets_a_status(clock: Clock, bundled: HostedModel) -> None:
    profile = profile_of(QUICK, 8)
    device, decoder = ScriptedDevice(profile), ScriptedDecoder(bundled.preprocess.settings)
    decoder.gate.set()
    served = ServedModel(replace(bundled, name="first", preprocess=decoder, default_budget=LATE), profile, "max_batch")
    engine = Engine(
        device, Metrics(), max_delay=0.0, max_pending=100, reply_margin=0.0001, decode_threads=1,
        names=["first"], models={"first": served},
    )  # fmt: skip
    running = asyncio.create_task(engine.run())
    bench = Bench(engine, device, decoder)
    on_device = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    device.dead = True
    device.step()
    for task in (on_device, *queued, bench.predict(3)):
        assert isinstance(await refused(task), UnavailableError)
    with pytest.raises(DeviceDiedError):
        await running
    assert engine.metrics.registry.get_sample_value("tome_requests_pending") == 0
    engine.close()
