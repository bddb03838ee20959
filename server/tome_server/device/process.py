"""What the device's process does: answers the calls of `device.client` until that side closes."""

import logging
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import torch

from tome_server.calibration.choose_dtype import load_chosen
from tome_server.calibration.choose_threads import choose_threads
from tome_server.calibration.profile_store import measure_again, obtain_profile
from tome_server.device.fair_lock import FairLock
from tome_server.device.prefetch import Prefetcher
from tome_server.device.shared_images import Place, receive
from tome_server.errors import OutOfMemoryError
from tome_server.execution.batch import BatchItem, BatchResult, Outputs
from tome_server.execution.choose_device import choose_device
from tome_server.execution.cpus import available_cpus
from tome_server.execution.cuda_graphs import with_graphs
from tome_server.execution.executor import run_batch
from tome_server.execution.out_of_memory import lacks_memory
from tome_server.merging.cpu import matching_c
from tome_server.models.hosted import HostedModel
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import outline
from tome_server.models.preprocess import Limits
from tome_server.models.spec import ModelSpec, Outline
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

# Ticket of the call, or None for a line of the log; then value and error, of which one is None.
_Answer: TypeAlias = tuple[int | None, object, Exception | None]


class DeviceProcess:
    """Models on a device.

    The calling thread only listens, and brings images to the device while batches run. These run in a thread of their
    own one after the other, and so does what takes longer.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._models: dict[str, LoadedModel] = {}
        self._images: dict[str, Prefetcher] = {}
        # The profile of each model, and what finds a better one.
        self._profiles: dict[str, Profile] = {}
        self._measure_again: dict[str, Callable[..., Profile | None]] = {}
        # Set when a call comes for which measuring again is given up.
        self._called = threading.Event()
        self._device = torch.device("cpu")
        self._threads = available_cpus()
        # Held by a batch, and while a CUDA graph is recorded, so that neither comes into the other.
        self._running = FairLock()
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        logging.getLogger("tome_server").setLevel(connection.recv())
        logging.getLogger().addHandler(_ServerLog(self._send))
        # The hub's client, which timm has imported, would write each of its lines a second time, past the server's log.
        logging.getLogger("huggingface_hub").handlers.clear()

    def answer_calls(self) -> None:
        """Answer until the other end is closed, and then end the batch that runs."""
        while True:
            try:
                ticket, call, args = self._connection.recv()
            except (EOFError, OSError):
                self._batches.shutdown(cancel_futures=True)
                return
            if call not in ("prefetch", "probe"):
                self._called.set()
            if call == "prefetch":
                self.prefetch(*args)
            elif call == "measure_again":
                self._called = threading.Event()
                self._beside.submit(self._answer, ticket, self.measure_again, (*args, self._called))
            elif call in ("run", "probe"):
                self._batches.submit(self._answer, ticket, getattr(self, call), args)
            elif call == "share":
                # What is shared follows in the same stream, so that nothing else may read it meanwhile.
                self._answer(ticket, self.share, args)
            else:
                self._beside.submit(self._answer, ticket, getattr(self, call), args)

    def run(self, key: str, batch: Sequence[BatchItem[Place]], rs: Sequence[int], packed: bool) -> BatchResult:
        """Run a batch whose images lie in the model's slots."""
        self._use_threads()
        images = self._images[key]
        r = rs[0] if len(set(rs)) == 1 else rs
        with self._running:
            works = [work.on(images.take(work.image)) for work in batch]
            return run_batch(self._models[key], works, r, self._device, packed=packed)

    def probe(self, key: str, r: int) -> float:
        """Return the seconds that one empty image takes at r."""
        self._use_threads()
        model = self._models[key]
        image = torch.zeros(model.preprocess.settings.input_size, dtype=torch.uint8)
        with self._running:
            return run_batch(model, [BatchItem(image, Outputs(top_k=1))], r, self._device).seconds

    def share(self, key: str, shape: Sequence[int], slots: int) -> None:
        """Take the memory that a model's images will lie in."""
        self._images[key] = Prefetcher(receive(self._connection, shape, slots), self._device)

    def prefetch(self, key: str, place: Place) -> None:
        """Begin to copy an image to the device. Whatever stands against it, it then goes with its batch."""
        try:
            self._images[key].prefetch(place)
        except Exception:
            log.debug("an image is not brought to the device ahead of its batch", exc_info=True)

    def open(self, name: str) -> str:
        """Use a device, and say which that is."""
        self._device = choose_device(name)
        if self._device.type == "cpu" and not matching_c.BUILT:
            log.warning("this was installed without a C compiler: models run slower than they could")
        return str(self._device)

    def outline(self, spec: ModelSpec) -> Outline:
        """Return what is known of a model without its weights."""
        return outline(spec)

    def load(self, key: str, spec: ModelSpec, limits: Limits, max_batch: int, folder: Path | None) -> HostedModel:
        """Load a model and run it once, so that the first request doesn't pay for what torch sets up lazily."""
        torch.set_num_threads(self._threads)
        model = load_chosen(spec, self._device, limits, max_batch=max_batch, folder=folder, alone=self._running)
        for level in {model.grid[0], model.grid[-1]}:
            self._run_empty(model, 1, level.r)
        self._models[key] = model
        return model.described

    def unload(self, key: str) -> None:
        """Forget a model."""
        del self._models[key]
        self._images.pop(key, None)  # none where there was no room for them
        self._profiles.pop(key, None)
        self._measure_again.pop(key, None)

    def set_threads(self, threads: int) -> None:
        """Use so many CPU threads."""
        self._threads = threads
        torch.set_num_threads(threads)

    def choose_threads(self, models: Sequence[tuple[ModelSpec, int]], folder: Path | None) -> int:
        """Use the number of CPU threads that is best for models, each with its largest batch."""
        self._threads = choose_threads(models, folder)
        return self._threads

    def record(self, key: str, max_batch: int, memory: int) -> None:
        """Record CUDA graphs of a model that no batch is run of yet, in so many bytes of the device's memory."""
        self._models[key] = with_graphs(
            self._models[key], self._device, max_batch=max_batch, memory=memory, alone=self._running
        )

    def profile(self, key: str, spec: ModelSpec, max_batch: int, budget: float, folder: Path | None) -> Profile:
        """Return the profile of a loaded model, measured if need be."""
        model = self._models[key]
        self._measure_again[key] = partial(
            measure_again, model, spec.checkpoint, self._device, max_batch=max_batch, folder=folder, run=self._run_alone
        )
        self._profiles[key] = obtain_profile(
            model,
            spec.checkpoint,
            self._device,
            max_batch=max_batch,
            budget=budget,
            folder=folder,
            shipped=spec.profiles,
        )
        return self._profiles[key]

    def measure_again(self, key: str, budget: float, stop: threading.Event) -> Profile | None:
        """Return a better profile of a model that is served, or None. Raises InterruptedError once `stop` is set."""
        profile = self._measure_again[key](profile=self._profiles[key], budget=budget, stop=stop)
        if profile:
            self._profiles[key] = profile
        return profile

    def _run_alone(
        self,
        model: LoadedModel,
        batch: Sequence[BatchItem[torch.Tensor]],
        rs: int | Sequence[int],
        device: torch.device,
        *,
        packed: bool,
    ) -> BatchResult:
        """Do what `run_batch` does while no other batch runs."""
        with self._running:
            return run_batch(model, batch, rs, device, packed=packed)

    def warm(self, key: str, max_batch: int, seconds: float) -> None:
        """Run each kind of batch once, the quickest first: kernels are made at first use."""
        model, end = self._models[key], time.monotonic() + seconds
        kinds = [(size, level) for size in range(1, max_batch + 1) for level in model.grid]
        for size, level in sorted(kinds, key=lambda kind: kind[0] * kind[1].cost.total):
            if time.monotonic() > end:
                return
            self._run_empty(model, size, level.r)

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:  # it is each thread's own
            torch.set_num_threads(self._threads)

    def _run_empty(self, model: LoadedModel, size: int, r: int) -> None:
        image = torch.zeros(model.preprocess.settings.input_size, dtype=torch.uint8)
        run = partial(run_batch, model, [BatchItem(image, Outputs(top_k=1))] * size, r, self._device)
        if self._device.type == "cuda":
            # CUDA's libraries set themselves up in each thread anew.
            self._batches.submit(run).result()
        else:
            run()

    def _answer(self, ticket: int, call: Callable[..., object], args: Sequence[object]) -> None:
        try:
            answer: _Answer = (ticket, call(*args), None)
        except Exception as error:
            answer = (ticket, None, _sendable(error))
        usable = True
        # Now that the error is gone, whose traceback held what had been allocated until then.
        if answer[2] is not None and self._device.type == "cuda":
            with self._running:  # either would break a recording off
                usable = is_usable(self._device)
                if usable and isinstance(answer[2], OutOfMemoryError):
                    torch.cuda.empty_cache()
        self._send(answer)
        if not usable:
            log.critical("%s can't be used by this process any more, which ends", self._device)
            os._exit(1)

    def _send(self, answer: _Answer) -> None:
        with self._sending:
            self._connection.send(answer)


def is_usable(device: torch.device) -> bool:
    """Return whether a CUDA device does what this process asks of it.

    After some errors, as of a kernel that reads what isn't there, it does nothing any more until the process ends.
    """
    for _ in range(2):  # the first may be told of another error, which is over
        try:
            torch.cuda.synchronize(device)
        except Exception:
            log.debug("%s fails", device, exc_info=True)
        else:
            return True
    return False


class _ServerLog(QueueHandler):
    """Has the server write what this process logs."""

    def __init__(self, send: Callable[[_Answer], None]) -> None:
        super().__init__(SimpleQueue())
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record, which QueueHandler has made fit for that."""
        self._send((None, record, None))


def _sendable(error: Exception) -> Exception:
    """Return `error`, or what says the same if it can't be sent, with a note of where it was raised.

    Returns an OutOfMemoryError for whatever says that memory ran out.
    """
    if lacks_memory(error):
        return OutOfMemoryError(str(error).partition("\n")[0] or type(error).__name__)
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Run on the connection whose descriptor is the first argument."""
    DeviceProcess(Connection(int(sys.argv[1]))).answer_calls()
    # Nobody waits for what still runs beside.
    os._exit(0)


if __name__ == "__main__":
    main()
