"""The process that owns the device: it answers the calls of `device.client` until that side closes."""

import logging
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import assert_never

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import torch

from tome_server.calibration.choose_dtype import load_chosen
from tome_server.calibration.choose_threads import choose_threads
from tome_server.calibration.obtain_profile import measure_again, obtain_profile
from tome_server.device.channel import BlockingChannel
from tome_server.device.fair_lock import FairLock
from tome_server.device.messages import (
    AnyCall,
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
    ToProcess,
    UnloadModel,
    WarmUp,
)
from tome_server.device.prefetch import Prefetcher
from tome_server.device.shared_images import receive
from tome_server.errors import OutOfMemoryError
from tome_server.execution.batch import BatchItem, BatchResult, Outputs
from tome_server.execution.choose_device import choose_device
from tome_server.execution.cpus import available_cpus
from tome_server.execution.cuda_graphs import with_graphs
from tome_server.execution.executor import run_batch
from tome_server.execution.out_of_memory import lacks_memory
from tome_server.merging.cpu import matching_c
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import outline
from tome_server.models.model_info import ModelInfo
from tome_server.models.spec import Outline
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)


class DeviceProcess:
    """Models on a device.

    The thread that calls `answer_calls` only receives messages and prefetches images. Batches run one after the other
    in a second thread, and calls that take longer, such as loading a model, in a third.
    """

    def __init__(self, channel: BlockingChannel, files: Connection) -> None:
        self._channel = channel
        self._files = files
        self._sending = threading.Lock()
        self._models: dict[str, LoadedModel] = {}
        self._images: dict[str, Prefetcher] = {}
        # Each model's profile, and a function that looks for a better one.
        self._profiles: dict[str, Profile] = {}
        self._measure_again: dict[str, Callable[..., Profile | None]] = {}
        # Set by the next call that ends MeasureAgain.
        self._called = threading.Event()
        self._device = torch.device("cpu")
        self._threads = available_cpus()
        # Held while a batch runs, and while a CUDA graph is recorded, so that these never overlap.
        self._running = FairLock()
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        logging.getLogger("tome_server").setLevel(channel.recv())
        logging.getLogger().addHandler(_ServerLog(self._send))
        # timm has imported the hub's client, whose own handler would write each of its lines a second time.
        logging.getLogger("huggingface_hub").handlers.clear()

    def answer_calls(self) -> None:
        """Answer until the other end is closed, and then finish the batch that runs."""
        while True:
            try:
                message: ToProcess = self._channel.recv()
            except (EOFError, OSError):
                self._batches.shutdown(cancel_futures=True)
                return
            if message[0] is None:
                self._prefetch(message[1])
            else:
                self._take(*message)

    def _take(self, ticket: int, call: AnyCall) -> None:
        """Answer a call, in the thread that is for its kind."""
        if not isinstance(call, Probe):
            self._called.set()
        match call:
            case RunBatch():
                self._batches.submit(self._answer, ticket, call.handled_by(self._run))
            case Probe():
                self._batches.submit(self._answer, ticket, call.handled_by(self._probe))
            case MapImages():
                # In this thread, which handles one call after the other: files come in the order of these calls.
                self._answer(ticket, call.handled_by(self._map_images))
            case MeasureAgain():
                self._called = threading.Event()
                self._beside.submit(self._answer, ticket, call.handled_by(partial(self._measure, stop=self._called)))
            case OpenDevice():
                self._beside.submit(self._answer, ticket, call.handled_by(self._open))
            case SetThreads():
                self._beside.submit(self._answer, ticket, call.handled_by(self._set_threads))
            case ChooseThreads():
                self._beside.submit(self._answer, ticket, call.handled_by(self._choose_threads))
            case OutlineModel():
                self._beside.submit(self._answer, ticket, call.handled_by(self._outline))
            case LoadModel():
                self._beside.submit(self._answer, ticket, call.handled_by(self._load))
            case UnloadModel():
                self._beside.submit(self._answer, ticket, call.handled_by(self._unload))
            case RecordGraphs():
                self._beside.submit(self._answer, ticket, call.handled_by(self._record))
            case ObtainProfile():
                self._beside.submit(self._answer, ticket, call.handled_by(self._profile))
            case WarmUp():
                self._beside.submit(self._answer, ticket, call.handled_by(self._warm))
            case _:
                assert_never(call)

    def _run(self, call: RunBatch) -> BatchResult:
        self._use_threads()
        images = self._images[call.key]
        with self._running:
            batch = [item.on(images.take(item.image)) for item in call.batch]
            return run_batch(self._models[call.key], batch, call.rs, self._device, packed=call.packed)

    def _probe(self, call: Probe) -> float:
        self._use_threads()
        model = self._models[call.key]
        with self._running:
            return run_batch(model, [_empty(model)], call.r, self._device).seconds

    def _map_images(self, call: MapImages) -> None:
        self._images[call.key] = Prefetcher(receive(self._files, call.shape, call.slots), self._device)

    def _prefetch(self, message: PrefetchImage) -> None:
        try:
            self._images[message.key].prefetch(message.place)
        except Exception:  # whatever it is, the image is then copied with its batch
            log.debug("an image can't be copied to the device ahead of its batch", exc_info=True)

    def _open(self, call: OpenDevice) -> str:
        self._device = choose_device(call.name)
        if self._device.type == "cpu" and not matching_c.BUILT:
            log.warning("this was installed without a C compiler: models run slower than they could")
        return str(self._device)

    def _outline(self, call: OutlineModel) -> Outline:
        return outline(call.spec)

    def _load(self, call: LoadModel) -> ModelInfo:
        """Load a model and run it at both ends of its grid, so that the first request doesn't pay for lazy set-up."""
        torch.set_num_threads(self._threads)
        model = load_chosen(
            call.spec, self._device, call.limits, max_batch=call.max_batch, folder=call.folder, alone=self._running
        )
        for level in {model.info.grid[0], model.info.grid[-1]}:
            self._run_empty(model, 1, level.r)
        self._models[call.key] = model
        return model.info

    def _unload(self, call: UnloadModel) -> None:
        del self._models[call.key]
        self._images.pop(call.key, None)  # there are none if there was no room for them
        self._profiles.pop(call.key, None)
        self._measure_again.pop(call.key, None)

    def _set_threads(self, call: SetThreads) -> None:
        self._threads = call.threads
        torch.set_num_threads(call.threads)

    def _choose_threads(self, call: ChooseThreads) -> int:
        self._threads = choose_threads(call.models, call.folder)
        return self._threads

    def _record(self, call: RecordGraphs) -> None:
        """Record CUDA graphs of a model. No batch of it may run before that."""
        self._models[call.key] = with_graphs(
            self._models[call.key], self._device, max_batch=call.max_batch, memory=call.memory, alone=self._running
        )

    def _profile(self, call: ObtainProfile) -> Profile:
        model, checkpoint = self._models[call.key], call.spec.checkpoint
        self._measure_again[call.key] = partial(
            measure_again,
            model,
            checkpoint,
            self._device,
            max_batch=call.max_batch,
            folder=call.folder,
            run=self._run_alone,
        )
        self._profiles[call.key] = obtain_profile(
            model,
            checkpoint,
            self._device,
            max_batch=call.max_batch,
            budget=call.budget,
            folder=call.folder,
            shipped=call.spec.profiles,
        )
        return self._profiles[call.key]

    def _measure(self, call: MeasureAgain, *, stop: threading.Event) -> Profile | None:
        """Return a better profile of a model in service, or None. Raises InterruptedError once `stop` is set."""
        profile = self._measure_again[call.key](profile=self._profiles[call.key], budget=call.budget, stop=stop)
        if profile:
            self._profiles[call.key] = profile
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
        """Run a batch by `run_batch` while no other batch runs."""
        with self._running:
            return run_batch(model, batch, rs, device, packed=packed)

    def _warm(self, call: WarmUp) -> None:
        model, end = self._models[call.key], time.monotonic() + call.seconds
        kinds = [(size, level) for size in range(1, call.max_batch + 1) for level in model.info.grid]
        for size, level in sorted(kinds, key=lambda kind: kind[0] * kind[1].cost.total):
            if time.monotonic() > end:
                return
            self._run_empty(model, size, level.r)

    def _use_threads(self) -> None:
        if torch.get_num_threads() != self._threads:  # it is each thread's own
            torch.set_num_threads(self._threads)

    def _run_empty(self, model: LoadedModel, size: int, r: int) -> None:
        run = partial(run_batch, model, [_empty(model)] * size, r, self._device)
        if self._device.type == "cuda":
            # In the thread of batches: CUDA's libraries set themselves up in each thread anew.
            self._batches.submit(run).result()
        else:
            run()

    def _answer(self, ticket: int, handle: Callable[[], object]) -> None:
        answer: Returned | Raised
        try:
            answer = Returned(ticket, handle())
        except Exception as error:
            answer = Raised(ticket, _sendable(error))
        usable = True
        # Only here is the error's traceback gone, which held the memory that had been allocated.
        if isinstance(answer, Raised) and self._device.type == "cuda":
            with self._running:  # either call would break a recording off
                usable = is_usable(self._device)
                if usable and isinstance(answer.error, OutOfMemoryError):
                    torch.cuda.empty_cache()
        self._send(answer)
        if not usable:
            log.critical("%s can't be used by this process any more, which ends", self._device)
            os._exit(1)

    def _send(self, message: FromProcess) -> None:
        with self._sending:
            self._channel.send(message)


def _empty(model: LoadedModel) -> BatchItem[torch.Tensor]:
    """Return a black image of a model's size, to be run for its time alone."""
    return BatchItem(torch.zeros(model.info.preprocess.settings.input_size, dtype=torch.uint8), Outputs(top_k=1))


def is_usable(device: torch.device) -> bool:
    """Return whether a CUDA device still works for this process.

    After some errors, such as an illegal memory access by a kernel, it does nothing more until the process ends.
    """
    for _ in range(2):  # the first call may report an earlier error that is over
        try:
            torch.cuda.synchronize(device)
        except Exception:
            log.debug("%s fails", device, exc_info=True)
        else:
            return True
    return False


class _ServerLog(QueueHandler):
    """Sends the lines of this process's log to the server, which writes them."""

    def __init__(self, send: Callable[[FromProcess], None]) -> None:
        super().__init__(SimpleQueue())
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record, which QueueHandler has made picklable."""
        self._send(record)


def _sendable(error: Exception) -> Exception:
    """Return `error` with a note of where it was raised, or a RuntimeError of its message if it can't be pickled.

    Every error that says that memory ran out becomes an OutOfMemoryError.
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
    """Answer calls on the socket whose file descriptor is the first argument; files come on the second."""
    channel, files = BlockingChannel(socket.socket(fileno=int(sys.argv[1]))), Connection(int(sys.argv[2]))
    DeviceProcess(channel, files).answer_calls()
    # Without waiting for the other thread: its call has no caller any more.
    os._exit(0)


if __name__ == "__main__":
    main()
