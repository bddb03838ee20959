"""An engine with a device, a decoder and a clock that do what the test says, when it says so."""

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tome_server.errors import DeviceDiedError, InfeasibleError, InvalidRequestError, OutOfMemoryError, RequestError
from tome_server.execution.batch import BatchItem, BatchResult, ItemResult
from tome_server.models.preprocess import InputSize
from tome_server.models.transform import ImageSettings
from tome_server.scheduling.policy.view import Policy
from tome_server.scheduling.profile import Latency, Profile
from tome_server.serving import served as served_module
from tome_server.serving.engine import Engine
from tome_server.serving.requests import EncodedImage, Reply, Request

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


def profile_of(unit: float, max_batch: int, *, one_call: bool = True) -> Profile:
    """One image takes 2 units at r = 0 and 1.5 at the most; promised is a tenth more."""
    p50 = tuple(tuple(unit * (1 + size * (1 - level / 14)) for level in range(8)) for size in range(1, max_batch + 1))
    p95 = tuple(tuple(1.1 * value for value in row) for row in p50)
    return Profile(tuple(range(1, max_batch + 1)), RS, p50, p95, one_call=one_call)


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
    brought: set["ScriptedSlot"] = field(default_factory=set)
    """of the images that it was told to bring to the device ahead of their batch"""
    dead: bool = False
    probes: list[str] = field(default_factory=list)
    """models of the empty images that it ran"""
    better: "Profile | Exception | None" = None
    """what measuring a model again gives or raises"""
    remeasured: list[tuple[str, float]] = field(default_factory=list)
    """models that were measured again, and for how many seconds"""

    def put(self, _: str, image: int) -> "ScriptedSlot":
        slot = ScriptedSlot(self, image)
        self.slots.add(slot)
        return slot

    def prefetch(self, _: str, slot: "ScriptedSlot") -> None:
        assert slot in self.slots
        self.brought.add(slot)

    async def probe(self, model: str, r: int) -> float:
        self.probes.append(model)
        return self.slowness * Latency(self.profile).of_batch([self.profile.level_of(r)])

    async def measure_again(self, model: str, *, budget: float) -> Profile | None:
        self.remeasured.append((model, budget))
        if isinstance(self.better, Exception):
            raise self.better
        return self.better

    async def run(
        self, model: str, batch: Sequence[BatchItem["ScriptedSlot"]], rs: Sequence[int], packed: bool
    ) -> BatchResult:
        assert {work.image for work in batch} <= self.slots & self.brought
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
        return BatchResult(tuple(ItemResult((image,), (1.0,), None, None) for image in images), seconds)

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
    sizes: dict[bytes, InputSize] = field(default_factory=dict)
    """of images that differ from others"""

    def encoded_size(self, data: bytes) -> InputSize:
        return self.sizes.get(data, InputSize("scripted", 1.0, 1))

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
        within = fields.pop("within", None)
        return Request(
            model=fields.pop("model", ""),
            input=EncodedImage(str(image).encode()),
            arrival=now,
            deadline=None if within is None else now + within,
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

    @property
    def settled(self) -> bool:
        """Whether no model's predictions are in doubt."""
        return all(served.scheduler.latency.settled for served in self.engine.registry.models.values())

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


def image_of(reply: Reply) -> int:
    return reply.result.class_ids[0]


def use(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Have every model that is made from now on decide by this."""
    """Let every name be that of `policy`."""
    monkeypatch.setattr(served_module, "policy_named", lambda *_: policy)
