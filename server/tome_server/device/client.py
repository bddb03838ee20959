"""The device as the event loop sees it: a process of its own that loads models and runs batches.

A batch is about a thousand short kernels, and Python must launch each of them. In the event loop's process they would
compete with it for the interpreter, which costs a small model 10 to 15 % of its throughput (docs/performance.md).
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray

from tome_server.device.channel import Channel
from tome_server.device.messages import (
    Call,
    ChooseThreads,
    FromProcess,
    LoadModel,
    MapImages,
    MeasureAgain,
    ObtainProfile,
    OpenDevice,
    OutlineModel,
    PrefetchImage,
    Probe,
    Raised,
    RecordGraphs,
    Returned,
    RunBatch,
    SetThreads,
    UnloadModel,
    WarmUp,
)
from tome_server.device.shared_images import SharedImages, Slot
from tome_server.errors import DeviceDiedError
from tome_server.execution.batch import BatchItem, BatchResult
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import Limits
from tome_server.models.spec import ModelSpec, Outline
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

R = TypeVar("R")

# Seconds in which the process must end once its connection is closed, at most: it finishes the batch that it runs.
STOP_TIMEOUT = 10.0
# Seconds that the event loop waits for the process's exit status: its connection closes just before it exits.
STATUS_TIMEOUT = 1.0


class Device:
    """A device and the process that owns it.

    All methods but `put` must be called on the event loop that was running when it was made; `put` may be called from
    any thread. Calls raise DeviceDiedError if the process ends, OutOfMemoryError if the device lacks the memory, and
    otherwise what was raised in the process.
    """

    def __init__(self) -> None:
        self.name = ""
        """cpu, cuda or cuda:N; empty until `open`."""
        self._tickets = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._images: dict[str, SharedImages] = {}
        self._lost = asyncio.Event()
        self._death = "the process that runs the models has ended"
        ours, theirs = socket.socketpair()
        # Files go on a connection of their own, since they must be received together with the byte that carries them.
        our_files, their_files = socket.socketpair()
        with theirs, their_files:
            ends = (theirs.fileno(), their_files.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tome_server.device.process", *map(str, ends)],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
                pass_fds=ends,
                # In a group of its own: Ctrl-C goes to the server alone, which then ends this process.
                process_group=0,
            )
        self._files = Connection(our_files.detach())
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(ours, self._receive, self._lose)
        self._channel.send(logging.getLogger("tome_server").getEffectiveLevel())

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    async def open(self, name: str) -> None:
        """Use the device `name`: auto, cpu, cuda or cuda:N. Raises ConfigError if there is none of that name."""
        self.name = await self._call(OpenDevice(name))

    async def set_threads(self, threads: int) -> None:
        """Use `threads` CPU threads."""
        await self._call(SetThreads(threads))

    async def choose_threads(self, models: Sequence[tuple[ModelSpec, int]], folder: Path | None = None) -> int:
        """Choose by measuring whether models run on one CPU thread or on all, and return how many that is.

        Call it before any model is loaded, for models are made for a number of threads.

        Args:
            models: Each with its largest batch.
            folder: Where measurements are kept; None for the default folder.

        Raises:
            ModelLoadError: If none of the models can be loaded.
        """
        return await self._call(ChooseThreads(models, folder))

    async def outline(self, spec: ModelSpec) -> Outline:
        """Find out what can be known of a model without its weights. Raises ModelLoadError if it can't be served."""
        return await self._call(OutlineModel(spec))

    async def load(
        self, key: str, spec: ModelSpec, limits: Limits, slots: int, *, max_batch: int = 1, folder: Path | None = None
    ) -> ModelInfo:
        """Load a model, in the dtype that measures best where the spec says auto, and run it once.

        Args:
            key: What other methods name the model by.
            spec: What to load.
            limits: What one image may cost.
            slots: How many of its images are held at once.
            max_batch: The largest batch that it will run.
            folder: Where measurements are kept; None for the default folder.

        Raises:
            ModelLoadError: If the model can't be loaded.
        """
        model = await self._call(LoadModel(key, spec, limits, max_batch, folder))
        try:
            images = SharedImages(model.preprocess.settings.input_size, slots)
            mapped = self._post(MapImages(key, images.shape, images.slots))
            images.send(self._files, self.pid)
            await mapped
        except Exception:  # more than there is room for
            await self._call(UnloadModel(key))
            raise
        self._images[key] = images
        return model

    async def unload(self, key: str) -> None:
        """Forget a model. No batch of it may be running."""
        del self._images[key]
        await self._call(UnloadModel(key))

    async def record(self, key: str, *, max_batch: int, memory: int) -> None:
        """On CUDA, record graphs of a model's batches in at most `memory` bytes; on a CPU, do nothing."""
        await self._call(RecordGraphs(key, max_batch, memory))

    async def profile(
        self, key: str, spec: ModelSpec, *, max_batch: int, budget: float, folder: Path | None
    ) -> Profile:
        """Return a model's stored profile; if none is stored, measure it for about `budget` seconds and store it.

        `spec` is what the model was loaded by, and `folder` where profiles are kept (None: the default folder).
        """
        return await self._call(ObtainProfile(key, spec, max_batch, budget, folder))

    async def measure_again(self, key: str, *, budget: float) -> Profile | None:
        """Measure a model in service again, for about `budget` seconds. Return a better profile than its own, or None.

        Any later call but `probe` ends the measurement, which then raises InterruptedError: a batch waits for one
        measured batch at most.
        """
        return await self._call(MeasureAgain(key, budget))

    async def warm(self, key: str, *, max_batch: int, seconds: float) -> None:
        """Run a batch of every size at every r, for `seconds` at most: the first of each kind takes longer."""
        await self._call(WarmUp(key, max_batch, seconds))

    async def probe(self, key: str, r: int) -> float:
        """Run one empty image at r, and return the seconds it took."""
        return await self._call(Probe(key, r))

    def put(self, key: str, image: NDArray[np.uint8] | NDArray[np.float32]) -> Slot:
        """Copy an image into memory that the process shares, for `run`: [C, H, W] as the model's Preprocess made it.

        Raises IndexError if all of the model's slots are taken.
        """
        return self._images[key].put(image)

    def prefetch(self, key: str, slot: Slot) -> None:
        """Begin to copy an image to the GPU while other batches run; without a GPU, do nothing."""
        if self.name.startswith("cuda"):
            self._channel.send((None, PrefetchImage(key, slot.place)))

    async def run(self, key: str, batch: Sequence[BatchItem[Slot]], rs: Sequence[int], packed: bool) -> BatchResult:
        """Run a batch, each image at its own r; `packed` says whether different r share one call of the model.

        Raises what the model raises.
        """
        placed = [item.on(item.image.place) for item in batch]
        return await self._call(RunBatch(key, placed, rs, packed))

    async def ended(self) -> NoReturn:
        """Wait until the process ends by itself. Raises DeviceDiedError then, never returns."""
        await self._lost.wait()
        raise DeviceDiedError(self._death)

    async def close(self, within: float = STOP_TIMEOUT) -> None:
        """End the process after the batch that it runs, or `within` so many seconds."""
        self._hang_up()
        # A thread waits in one system call. Popen's own timeout polls by a clock that may be set meanwhile.
        ended = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        if not (await asyncio.wait({ended}, timeout=min(within, STOP_TIMEOUT)))[0]:
            self._process.kill()
            await ended

    async def kill(self) -> None:
        """End the process at once."""
        self._hang_up()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    def end(self) -> None:
        """End the process without waiting until it has ended. May be called from any thread, and by signal handlers."""
        self._process.kill()

    def give_up(self, why: str) -> None:
        """End the process at once because it hangs: calls and `ended` raise DeviceDiedError, which says `why`."""
        self._process.kill()
        self._end(f"the process that runs the models {why}")

    async def _call(self, call: Call[R]) -> R:
        return await self._post(call)

    def _post(self, call: Call[R]) -> asyncio.Future[R]:
        """Send a call, and return the future of its answer."""
        future: asyncio.Future[R] = self._loop.create_future()
        if self._channel.closed:
            future.set_exception(DeviceDiedError(self._death))
            return future
        ticket = next(self._tickets)
        self._calls[ticket] = future
        self._channel.send((ticket, call))
        return future

    def _receive(self, message: FromProcess) -> None:
        match message:
            case Returned(ticket, value):
                future = self._calls.pop(ticket)
                if not future.done():  # it may be cancelled
                    future.set_result(value)
            case Raised(ticket, error):
                future = self._calls.pop(ticket)
                if not future.done():
                    future.set_exception(error)
            case logging.LogRecord():
                logging.getLogger(message.name).handle(message)
            case _:
                assert_never(message)

    def _lose(self) -> None:
        death = self._death
        # This blocks the event loop, which can serve nothing any more.
        with contextlib.suppress(subprocess.TimeoutExpired):
            death = f"the process that runs the models {_ending(self._process.wait(STATUS_TIMEOUT))}"
        self._end(death)

    def _end(self, death: str) -> None:
        self._death = death
        log.error("%s (process %d)", death, self.pid)
        self._hang_up()
        self._lost.set()

    def _hang_up(self) -> None:
        if self._channel.closed:
            return
        self._channel.close()
        self._files.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(DeviceDiedError(self._death))
        self._calls.clear()


def _ending(status: int) -> str:
    """Say how a process ended, by Popen's return code."""
    if status >= 0:
        return f"has ended with status {status}"
    cause = " (the kernel does that where memory runs out)" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{cause}"
