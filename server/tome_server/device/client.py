"""The device as the event loop sees it: a process of its own, that loads models and runs batches.

A batch is some thousand short kernels, and between them the device needs the interpreter. In one process with the
event loop it would wait for it: 10 to 15 % of a small model's throughput (docs/performance.md).
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
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tome_server.device.shared_images import SharedImages, Slot
from tome_server.errors import DeviceDiedError
from tome_server.execution.batch import BatchItem, BatchResult
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import Limits
from tome_server.models.spec import ModelSpec, Outline
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

# Seconds that the process has to end by itself, once nobody calls it any more: for the batch that it runs.
PATIENCE = 10.0
# Seconds that the event loop waits to hear how the process ended: its connection closes just before.
STATUS_WAIT = 1.0


class Device:
    """A device and the process that owns it.

    Calls are made on the event loop that was running when it was made; `put` from any thread. Those that wait raise
    DeviceDiedError if the process ends, OutOfMemoryError if the device lacks the memory, and else whatever went wrong
    there.
    """

    def __init__(self) -> None:
        self.name = ""
        """cpu, cuda or cuda:N, once it is open."""
        self._tickets = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._images: dict[str, SharedImages] = {}
        self._lost = asyncio.Event()
        self._death = "the process that runs the models has ended"
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tome_server.device.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the server, which then ends this.
                process_group=0,
            )
        self._connection = Connection(ours.detach())
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection.fileno(), self._read)
        self._connection.send(logging.getLogger("tome_server").getEffectiveLevel())

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    async def open(self, name: str) -> None:
        """Use the device `name`: auto, cpu, cuda or cuda:N. Raises ConfigError if it isn't there."""
        self.name = await self._call("open", name)

    async def set_threads(self, threads: int) -> None:
        """Use so many CPU threads."""
        await self._call("set_threads", threads)

    async def choose_threads(self, models: Sequence[tuple[ModelSpec, int]], folder: Path | None = None) -> int:
        """Do what the function `choose_threads` does, before any model is loaded. Raises ModelLoadError."""
        threads: int = await self._call("choose_threads", models, folder)
        return threads

    async def outline(self, spec: ModelSpec) -> Outline:
        """Do what the function `outline` does. Raises ModelLoadError."""
        outline: Outline = await self._call("outline", spec)
        return outline

    async def load(
        self, key: str, spec: ModelSpec, limits: Limits, slots: int, *, max_batch: int = 1, folder: Path | None = None
    ) -> HostedModel:
        """Do what `load_chosen` does, call the model `key` from then on, and run it once. Raises ModelLoadError.

        `slots` is how many of its images are held at once.
        """
        model: HostedModel = await self._call("load", key, spec, limits, max_batch, folder)
        try:
            images = SharedImages(model.preprocess.settings.input_size, slots)
            shared = self._post("share", key, images.shape, images.slots)
            images.send(self._connection, self.pid)
            await shared
        except Exception:  # more than there is room for
            await self._call("unload", key)
            raise
        self._images[key] = images
        return model

    async def unload(self, key: str) -> None:
        """Forget a model that no batch is run of any more."""
        del self._images[key]
        await self._call("unload", key)

    async def record(self, key: str, *, max_batch: int, memory: int) -> None:
        """On CUDA, record graphs of a loaded model's batches in at most so many bytes; else do nothing."""
        await self._call("record", key, max_batch, memory)

    async def profile(
        self, key: str, spec: ModelSpec, *, max_batch: int, budget: float, folder: Path | None
    ) -> Profile:
        """Do what `obtain_profile` does for the model that was loaded by that `spec`."""
        profile: Profile = await self._call("profile", key, spec, max_batch, budget, folder)
        return profile

    async def measure_again(self, key: str, *, budget: float) -> Profile | None:
        """Do what the function `measure_again` does for a model that has a profile and is served meanwhile.

        A batch that is to run waits for one that is being measured, at most. Raises InterruptedError when one comes, or
        any other call but `probe`.
        """
        profile: Profile | None = await self._call("measure_again", key, budget)
        return profile

    async def warm(self, key: str, *, max_batch: int, seconds: float) -> None:
        """Run batches of every size at every r, as far as that goes in so many seconds: first ones take longer."""
        await self._call("warm", key, max_batch, seconds)

    async def probe(self, key: str, r: int) -> float:
        """Return the seconds that one empty image takes at r, merged as any other."""
        seconds: float = await self._call("probe", key, r)
        return seconds

    def put(self, key: str, image: NDArray[np.uint8] | NDArray[np.float32]) -> Slot:
        """Take an image for a loaded model, [C, H, W] as its Preprocess made it, that `run` will be called for."""
        return self._images[key].put(image)

    def prefetch(self, key: str, slot: Slot) -> None:
        """Have an image copied to a GPU ahead of its batch, while others run; where there is no GPU, do nothing."""
        if self.name.startswith("cuda") and not self._connection.closed:
            self._send(None, "prefetch", key, slot.place)

    async def run(self, key: str, batch: Sequence[BatchItem[Slot]], rs: Sequence[int], packed: bool) -> BatchResult:
        """Do what `run_batch` does. Raises what the model raises."""
        placed = [work.on(work.image.place) for work in batch]
        result: BatchResult = await self._call("run", key, placed, rs, packed)
        return result

    async def ended(self) -> NoReturn:
        """Wait for the process to end without being told to. Raises DeviceDiedError when it has."""
        await self._lost.wait()
        raise DeviceDiedError(self._death)

    async def close(self) -> None:
        """End the process, after the batch that it runs."""
        self._hang_up()
        # In one system call: Popen's own limit of time is kept by short sleeps, which a clock that is set can break.
        ended = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        if not (await asyncio.wait({ended}, timeout=PATIENCE))[0]:
            self._process.kill()
            await ended

    async def kill(self) -> None:
        """End the process, whatever it does."""
        self._hang_up()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    async def _call(self, call: str, *args: object) -> Any:
        return await self._post(call, *args)

    def _post(self, call: str, *args: object) -> "asyncio.Future[Any]":
        """Send a call; its answer is what the future will have."""
        future = self._loop.create_future()
        if self._connection.closed:
            future.set_exception(DeviceDiedError(self._death))
            return future
        ticket = next(self._tickets)
        self._calls[ticket] = future
        self._send(ticket, call, *args)
        return future

    def _send(self, ticket: int | None, call: str, *args: object) -> None:
        """Send a call, whose answer has this ticket; None if there is none."""
        try:
            self._connection.send((ticket, call, args))
        except OSError:
            self._lose()

    def _read(self) -> None:
        try:
            while self._connection.poll():
                ticket, value, error = self._connection.recv()
                if ticket is None:  # a line for the log
                    logging.getLogger(value.name).handle(value)
                    continue
                future = self._calls.pop(ticket)
                if future.done():  # cancelled
                    continue
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            self._lose()

    def _lose(self) -> None:
        # Nothing can be served any more, so that nobody is kept waiting by this.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._death = f"the process that runs the models {_ending(self._process.wait(STATUS_WAIT))}"
        log.error("%s (process %d)", self._death, self.pid)
        self._hang_up()
        self._lost.set()

    def _hang_up(self) -> None:
        if self._connection.closed:
            return
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(DeviceDiedError(self._death))
        self._calls.clear()


def _ending(status: int) -> str:
    """Say how a process ended, as Popen gives its status."""
    if status >= 0:
        return f"has ended with status {status}"
    cause = " (the kernel does that where memory runs out)" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{cause}"
