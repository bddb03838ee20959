"""CUDA graphs: the forward pass recorded once for each size of batch and r, and launched as a whole from then on.

A forward pass is several hundred kernels, many of which a GPU runs faster than Python can launch them, and merging adds
to their number. For one size of batch and one r all shapes are fixed, and so are the launches.

A batch of a size in between is filled up to the next recorded size. Whatever isn't recorded runs without graphs:
batches of several r, an r outside of the grid, requests for tokens or maps, and sizes for which memory didn't suffice.
"""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from tome_server.errors import OutOfMemoryError
from tome_server.execution.out_of_memory import lacks_memory
from tome_server.merging.model import MergedOutput
from tome_server.models.loaded import Forward, LoadedModel

log = logging.getLogger(__name__)

# Up to this size every size is recorded. Beyond it, four from one power of two to the next, so that less than a fifth
# of a batch is filling.
EVERY_SIZE = 8
STEPS = 4
# A recording isn't used if its logits differ from the model's own by more than this share of their norm. They should be
# the same bit for bit, but in bfloat16 another choice of kernels can merge another token.
SAME = 0.05


class Recorder(Protocol):
    """Records operations on a device, so that they can be replayed."""

    def record(self, call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        """Run `call`. Return its output, and a function that repeats it, from and into the same memory.

        Later recordings may use all of its memory but that of the output. Raises whatever keeps it from being recorded.
        """
        ...

    def taken(self) -> int:
        """Return the bytes of the device's memory that are in use."""
        ...

    def forget(self) -> None:
        """Free the memory of all recordings. None of them may be used any more."""
        ...


@dataclass(frozen=True)
class _Recorded:
    output: MergedOutput
    replay: Callable[[], None]


class GraphedModel:
    """Runs a model by recordings of it, for batches that fit one. Called like the model; threads may share it."""

    def __init__(self, forward: Forward, images: Tensor, recorder: Recorder) -> None:
        """`images` [B, C, H, W] is the memory that batches are copied into: the largest batch that is recorded."""
        self._forward = forward
        self._images = images
        self._recorder = recorder
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._random = torch.Generator(images.device).manual_seed(0)
        # One batch at a time, since all are copied into the same memory.
        self._lock = threading.Lock()

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """The size and r of each recorded batch, in order."""
        return tuple(sorted(self._recorded))

    @torch.inference_mode()
    def record(
        self, sizes: Sequence[int], rs: Sequence[int], memory: int, alone: AbstractContextManager[object]
    ) -> None:
        """Record batches of these sizes at each r until `memory` bytes are used. Errors are logged, and not raised.

        The largest size that fits comes first, since the others reuse its memory; then the smallest, which gain most.
        `alone` is entered for each recording: nothing else may run on the device meanwhile. A recording that turns out
        not to fit may take more memory for a moment.
        """
        before = self._recorder.taken()
        first = 0
        for size in sorted(sizes, reverse=True):
            outcome = self._try(size, rs[0], before + memory, alone)
            if outcome == "recorded":
                first = size
                break
            self._recorder.forget()
            if outcome == "failed":
                return
        for size in sorted(size for size in sizes if size <= first):
            for r in rs:
                if (size, r) not in self._recorded and self._try(size, r, before + memory, alone) != "recorded":
                    return

    def _try(self, size: int, r: int, limit: int, alone: AbstractContextManager[object]) -> str:
        """Record one batch, unless more than `limit` bytes are in use then. Return "recorded", "full" or "failed"."""
        images = self._images[:size]
        try:
            with alone:
                recorded = _Recorded(*self._recorder.record(lambda: self._forward(images, r)))
                if self._recorder.taken() > limit:
                    return "full"
                if not self._same(images, r, recorded):
                    log.error("the CUDA graph of %d images at r = %d is wrong, and isn't used", size, r)
                    return "failed"
        except Exception as error:
            if _is_out_of_memory(error):
                return "full"
            log.exception("no CUDA graph can be made of %d images at r = %d; they run without", size, r)
            return "failed"
        self._recorded[size, r] = recorded
        return "recorded"

    def _same(self, images: Tensor, r: int, recorded: _Recorded) -> bool:
        """Return whether a recording gives what the model gives, for images that it wasn't recorded with."""
        images.normal_(generator=self._random)
        expected = self._forward(images, r).logits.float()
        recorded.replay()
        difference = (recorded.output.logits.float() - expected).norm()
        return bool(difference <= SAME * expected.norm())

    def __call__(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """Return what `MergedModel.forward` returns for these arguments."""
        recorded = None if return_tokens or return_token_map else self._fitting(images, r)
        if recorded is None:
            return self._forward(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        count = len(images)
        with self._lock:
            self._images[:count].copy_(images)
            recorded.replay()
            # Clones, since the next batch overwrites the recording's output.
            return MergedOutput(
                logits=recorded.output.logits[:count].clone(),
                features=recorded.output.features[:count].clone(),
                tokens_per_block=recorded.output.tokens_per_block[:count],
            )

    def _fitting(self, images: Tensor, r: int | Sequence[int]) -> _Recorded | None:
        ours = self._images
        if not isinstance(r, int) or images.shape[1:] != ours.shape[1:] or images.dtype != ours.dtype:
            return None
        size = min((size for size, at in self._recorded if at == r and size >= len(images)), default=None)
        return None if size is None else self._recorded[size, r]


# Kept alive, since torch's allocator of host memory may still query whether they are being recorded.
_broken_off: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Records on a CUDA device. All its recordings share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _recordings(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        """Run `call` and record it; see `Recorder.record`."""
        # The thread's own stream is entered again: a recording that is broken off leaves another in its place.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                # Libraries set themselves up at first use, which can't be recorded.
                call()
                # An operation that waits for the device would break the recording off, and leave torch hardly usable.
                with _waiting_forbidden():
                    call()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads may use the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = call()
            except BaseException:
                self._break_off(graph)
                raise
            return output, graph.replay

    def _break_off(self, graph: torch.cuda.CUDAGraph) -> None:
        # torch ends a recording before it notifies its allocators. If ending it fails they are never notified, and the
        # device's allocator would never return memory to the driver again.
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):  # it was notified, or this torch has no such function
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
            _broken_off.append(graph)

    def taken(self) -> int:
        """Return the bytes in use by the driver's count, which includes those of the graphs themselves."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def forget(self) -> None:
        """Free the memory of all recordings."""
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


@cache
def _recordings(device: torch.device) -> torch.cuda.Stream:
    """Return a stream to record on.

    All models share it: torch has 32 streams and hands them out in turn, so that one for each model could become the
    stream on which images are copied. It also saves memory, of which cuBLAS takes some for each stream (32 MiB on the
    H100).
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Make torch raise RuntimeError in all threads for operations that wait for a CUDA device, if it notices them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch warns that it doesn't notice all of them.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, says that memory ran out.

    The error that ends a recording after that may say something else.
    """
    while error is not None:
        if isinstance(error, OutOfMemoryError) or (isinstance(error, Exception) and lacks_memory(error)):
            return True
        error = error.__context__
    return False


def recorded_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the sizes of batches to record, in order; the last is `max_batch`."""
    sizes = [*range(1, EVERY_SIZE + 1)]
    while sizes[-1] < max_batch:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + power // STEPS)
    return (*(size for size in sizes if size < max_batch), max_batch)


def with_graphs(
    model: LoadedModel,
    device: torch.device,
    *,
    max_batch: int,
    memory: int,
    alone: AbstractContextManager[object] | None = None,
) -> LoadedModel:
    """Return `model` with CUDA graphs of at most `memory` bytes; unchanged if the device isn't a CUDA device.

    `alone` is entered while nothing else may run on the device.
    """
    if device.type != "cuda" or memory == 0:
        return model
    return recorded(model, CudaRecorder(device), device, max_batch, memory, alone or nullcontext())


def with_one_graph(
    model: LoadedModel, device: torch.device, size: int, r: int, alone: AbstractContextManager[object]
) -> LoadedModel:
    """Return `model` with a CUDA graph of batches of `size` images at `r`; unchanged if that can't be recorded."""
    if device.type != "cuda":
        return model
    graphed = _graphed(model, CudaRecorder(device), device, [size], [r], sys.maxsize, alone)
    return model if graphed is None else replace(model, graphs=graphed)


def recorded(
    model: LoadedModel,
    recorder: Recorder,
    device: torch.device,
    max_batch: int,
    memory: int,
    alone: AbstractContextManager[object],
) -> LoadedModel:
    """Return `model` with what `recorder` records of it; unchanged if it can record nothing."""
    sizes, rs = recorded_sizes(max_batch), [level.r for level in model.info.grid]
    graphed = _graphed(model, recorder, device, sizes, rs, memory, alone)
    return model if graphed is None else replace(model, graphs=graphed)


def _graphed(
    model: LoadedModel,
    recorder: Recorder,
    device: torch.device,
    sizes: Sequence[int],
    rs: Sequence[int],
    memory: int,
    alone: AbstractContextManager[object],
) -> GraphedModel | None:
    """Return what could be recorded, None if nothing could; the log says which."""
    began = time.monotonic()
    try:
        before = recorder.taken()
        images = torch.zeros(
            max(sizes),
            *model.info.preprocess.settings.input_size,
            device=device,
            dtype=getattr(torch, model.info.dtype),
        )
        graphed = GraphedModel(model.run, images, recorder)
        graphed.record(sizes, rs, memory, alone)
        took = recorder.taken() - before
    except Exception:
        log.exception("no CUDA graphs can be made of %s; it runs without", model.info.name)
        return None
    if not graphed.kinds:
        log.warning("no CUDA graph of %s fits; it runs without", model.info.name)
        return None
    log.info(
        "%d of %d CUDA graphs of %s in %s, up to %d images, in %.0f MiB and %.1f s",
        len(graphed.kinds), len(sizes) * len(rs), model.info.name, model.info.dtype, graphed.kinds[-1][0],
        took / 2**20, time.monotonic() - began,
    )  # fmt: skip
    return graphed
