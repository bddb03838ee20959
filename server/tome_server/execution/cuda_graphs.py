"""CUDA graphs: the forward pass recorded once for each size of batch and r, and launched as a whole from then on.

A forward pass is some hundred kernels, of which a GPU runs many faster than Python can launch them; merging adds more
of them than it takes work away. For one size of batch and one r all shapes are fixed, so the launches are, too.

Batches of a size in between are filled up to the next one recorded. What isn't recorded runs as it would without
graphs: several r in one batch, an r that isn't in the grid, tokens or maps that are asked for, and what the memory
didn't suffice for.
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

# Up to here every size is recorded; beyond, four between one power of two and the next, so that less than a fifth of a
# batch is filling.
EVERY_SIZE = 8
STEPS = 4
# A recording whose logits differ from the model's own by more, as a share of their norm, isn't used. They should be the
# same to the bit; in bfloat16 another choice of kernels can make another token merge.
SAME = 0.05


class Recorder(Protocol):
    """Records what is done on a device, to do it again."""

    def record(self, call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        """Run `call`, and return what it gave and what does the same again, from and into the same memory.

        What is recorded later may use the memory of all but that output. Raises whatever stands against it.
        """
        ...

    def taken(self) -> int:
        """Return the bytes of the device's memory that are in use."""
        ...

    def forget(self) -> None:
        """Give the memory of all that was recorded back, which nobody uses any more."""
        ...


@dataclass(frozen=True)
class _Recorded:
    output: MergedOutput
    replay: Callable[[], None]


class GraphedModel:
    """Runs a model by what was recorded of it, where that fits. Called like the model; threads may share it."""

    def __init__(self, forward: Forward, images: Tensor, recorder: Recorder) -> None:
        """`images` [B, C, H, W], the largest batch to record, is the memory that batches will be copied into."""
        self._forward = forward
        self._images = images
        self._recorder = recorder
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._random = torch.Generator(images.device).manual_seed(0)
        # One batch at a time: all lie in the same memory.
        self._lock = threading.Lock()

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """Size and r of each batch that is recorded, in order."""
        return tuple(sorted(self._recorded))

    @torch.inference_mode()
    def record(
        self, sizes: Sequence[int], rs: Sequence[int], memory: int, alone: AbstractContextManager[object]
    ) -> None:
        """Record batches of these sizes at each r, as far as `memory` bytes suffice; raises nothing, but logs.

        First the largest that fits, since the others then use its memory again; then the smallest, which gain most.
        `alone` is entered for each, while nothing else may run on the device. What is tried and doesn't fit may take
        more for a moment.
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

    def _try(self, size: int, r: int, most: int, alone: AbstractContextManager[object]) -> str:
        """Return "recorded", "full" or "failed"."""
        images = self._images[:size]
        try:
            with alone:
                recorded = _Recorded(*self._recorder.record(lambda: self._forward(images, r)))
                if self._recorder.taken() > most:
                    return "full"
                if not self._same(images, r, recorded):
                    log.error("the CUDA graph of %d images at r = %d is wrong, and isn't used", size, r)
                    return "failed"
        except Exception as error:
            if _for_memory(error):
                return "full"
            log.exception("no CUDA graph can be made of %d images at r = %d; they run without", size, r)
            return "failed"
        self._recorded[size, r] = recorded
        return "recorded"

    def _same(self, images: Tensor, r: int, recorded: _Recorded) -> bool:
        """Return whether what was recorded gives what the model gives, for images that it wasn't recorded with."""
        images.normal_(generator=self._random)
        expected = self._forward(images, r).logits.float()
        recorded.replay()
        difference = (recorded.output.logits.float() - expected).norm()
        return bool(difference <= SAME * expected.norm())

    def __call__(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """As MergedModel."""
        recorded = None if return_tokens or return_token_map else self._fitting(images, r)
        if recorded is None:
            return self._forward(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        count = len(images)
        with self._lock:
            self._images[:count].copy_(images)
            recorded.replay()
            # The next batch overwrites them.
            return MergedOutput(
                logits=recorded.output.logits[:count].clone(),
                features=recorded.output.features[:count].clone(),
                tokens_per_block=recorded.output.tokens_per_block[:count],
            )

    def _fitting(self, images: Tensor, r: int | Sequence[int]) -> _Recorded | None:
        ours = self._images
        if not isinstance(r, int) or images.shape[1:] != ours.shape[1:] or images.dtype != ours.dtype:
            return None
        size = min((size for size, own in self._recorded if own == r and size >= len(images)), default=None)
        return None if size is None else self._recorded[size, r]


# Kept for torch's allocator of host memory, which may yet ask them whether they are being recorded.
_broken_off: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """Records on a CUDA device; all that it records shares one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _recordings(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        """As Recorder says."""
        # The stream is entered although it is the thread's own already: a recording that is broken off leaves another.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                # What libraries set up at first use can't be recorded.
                call()
                # What waits for the device would break the recording off, after which torch is hardly usable.
                with _waiting_forbidden():
                    call()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other threads do meanwhile isn't for the recording to forbid.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = call()
            except BaseException:
                self._break_off(graph)
                raise
            return output, graph.replay

    def _break_off(self, graph: torch.cuda.CUDAGraph) -> None:
        # torch ends a recording before it tells its allocators so, and where the former fails not at all: that of the
        # device would never give memory back to the driver again.
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):  # it was told, or this torch has no such call
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
            _broken_off.append(graph)

    def taken(self) -> int:
        """As Recorder says: by the driver's count, which includes what the graphs themselves take."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def forget(self) -> None:
        """As Recorder says."""
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


@cache
def _recordings(device: torch.device) -> torch.cuda.Stream:
    """Return a stream to record on.

    One for all models: torch has 32 and gives them again after that, to record on one where images are copied. And
    memory that cuBLAS takes for each stream, 32 MiB on the H100, is taken once.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Have torch raise RuntimeError for what waits for a CUDA device, whatever the thread, as far as it notices."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That it doesn't notice everything.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _for_memory(error: BaseException | None) -> bool:
    """Return whether memory ran out, in the beginning: what then ends a recording may say something else."""
    while error is not None:
        if isinstance(error, OutOfMemoryError) or (isinstance(error, Exception) and lacks_memory(error)):
            return True
        error = error.__context__
    return False


def recorded_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the sizes of batches to record, `max_batch` the last."""
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
    """Return `model` so that it runs by CUDA graphs of at most `memory` bytes; as it is if the device isn't CUDA's.

    `alone` is entered while nothing else may run on the device.
    """
    if device.type != "cuda" or memory == 0:
        return model
    return recorded(model, CudaRecorder(device), device, max_batch, memory, alone or nullcontext())


def with_one_graph(
    model: LoadedModel, device: torch.device, size: int, r: int, alone: AbstractContextManager[object]
) -> LoadedModel:
    """Return `model` so that batches of `size` images run at `r` by a CUDA graph; as it is where that can't be."""
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
    """Return `model` so that it runs by what `recorder` records of it; as it is if that is nothing."""
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
    """Return what could be recorded, None if that is nothing; the log says which."""
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
