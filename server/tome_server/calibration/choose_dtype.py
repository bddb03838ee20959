"""Chooses what a dtype of auto stands for: bfloat16 if it agrees with float32 and is measured to be faster."""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from tome_server.calibration.profiling import Run, batch_sizes
from tome_server.calibration.speedups import model_speedups
from tome_server.config.dtypes import Dtype
from tome_server.errors import ModelLoadError
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.cuda_graphs import with_one_graph
from tome_server.execution.executor import run_batch
from tome_server.execution.out_of_memory import lacks_memory
from tome_server.merging.cpu.packing import LEAST_GAIN as LEAST_DIVISION_GAIN
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load
from tome_server.models.preprocess import Limits
from tome_server.models.quality_report import LEAST_AGREEMENT, recorded_agreement
from tome_server.models.spec import QUALITY, ModelSpec, in_dtype, quality_beside

log = logging.getLogger(__name__)

# Fewer images can't distinguish a share of 0.995 from 1.
LEAST_IMAGES = 200
# Less isn't worth scores that differ in the third digit, and could be chance.
LEAST_GAIN = 1.1
# Seconds to measure for. It takes longer for a model of which four batches do.
BUDGET = 1.0
_MOST_ROUNDS = 7
# At less than this share of float32's speed for single images, the processor emulates bfloat16: batches aren't tried.
_HOPELESS = 0.5


@dataclass(frozen=True)
class Choice:
    """The dtype that a model runs in."""

    dtype: Dtype
    reason: str
    """Why it was chosen, for the operator."""


def choose(agreement: float, images: int, gain: Callable[[], float | None]) -> Choice:
    """Choose between bfloat16 and float32.

    Args:
        agreement: The share of `images` that get the same class in bfloat16 as in float32.
        images: How many images were compared.
        gain: Measures how many times as fast bfloat16 is; returns None if memory doesn't hold both. It is only called
            if the agreement suffices.
    """
    if images < LEAST_IMAGES:
        return Choice("float32", f"bfloat16 was compared with it on {images} images, and {LEAST_IMAGES} are the least")
    if not agreement >= LEAST_AGREEMENT:
        return Choice(
            "float32",
            f"bfloat16 agrees with it on {agreement:.2%} of {images} images, and {LEAST_AGREEMENT:.1%} is the least",
        )
    measured = gain()
    if measured is None:
        return Choice("float32", "there is not the memory to measure bfloat16 beside it")
    if not measured >= LEAST_GAIN:
        return Choice("float32", f"bfloat16 is {measured:.2f} times as fast here, and {LEAST_GAIN} is the least")
    return Choice(
        "bfloat16",
        f"it is {measured:.2f} times as fast as float32 here, and agrees on {agreement:.2%} of {images} images",
    )


def load_chosen(
    spec: ModelSpec,
    device: torch.device,
    limits: Limits | None = None,
    *,
    max_batch: int,
    folder: Path | None = None,
    anew: bool = False,
    alone: AbstractContextManager[object] | None = None,
) -> LoadedModel:
    """Load a model in the dtype that its spec names, or if that is auto, in the dtype chosen here. The log says why.

    Speed is measured as the model would be served: with as many threads as torch is set to, and with the division of
    work among them that each dtype would get.

    Args:
        spec: What to load.
        device: Where to load it.
        limits: What one image may cost.
        max_batch: The largest batch that it will run.
        folder: Where measurements are kept for the next time; None for the default folder.
        anew: Whether to measure even if a measurement is kept.
        alone: Entered while nothing else may run on the device.

    Raises:
        ModelLoadError: If the model can't be loaded.
    """
    speedups = model_speedups(spec, device, max_batch, folder, anew=anew)
    loaded: dict[Dtype, LoadedModel] = {}

    def load_in(dtype: Dtype) -> LoadedModel:
        chosen = in_dtype(spec, dtype) if spec.dtype == "auto" else spec
        return load(chosen, device, limits, recall=speedups.divided(dtype))

    def measure() -> float:
        for dtype in ("float32", "bfloat16"):
            loaded[dtype] = load_in(dtype)
        return measure_gain(loaded, device, max_batch=max_batch, graphed=graphed)

    def graphed(model: LoadedModel, size: int, r: int) -> LoadedModel:
        return with_one_graph(model, device, size, r, alone or nullcontext())

    def gain() -> float | None:
        try:
            return speedups.get_or_measure("bfloat16", measure)
        except Exception as error:
            if not lacks_memory(error):
                raise
        # Only here is the error's traceback gone, which held the memory that had been allocated.
        loaded.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    if spec.dtype == "auto":
        choice = _by_record(spec, gain)
        log.info("%s runs in %s: %s", spec.name, choice.dtype, choice.reason)
    else:
        choice = Choice(spec.dtype, "it is named")
    model = loaded.get(choice.dtype) or load_in(choice.dtype)
    if model.division_gain is not None:
        log.info(
            "%s: %d CPU threads divide %s: one image is %.2f times as fast on all of them as on one, %s is the least",
            spec.name, torch.get_num_threads(), model.info.division, model.division_gain, LEAST_DIVISION_GAIN,
        )  # fmt: skip
    return model


def measure_gain(
    models: Mapping[Dtype, LoadedModel],
    device: torch.device,
    *,
    max_batch: int,
    budget: float = BUDGET,
    run: Run = run_batch,
    graphed: Callable[[LoadedModel, int, int], LoadedModel] = lambda model, size, r: model,  # noqa: ARG005
) -> float:
    """Return how many times as fast a model is in bfloat16 as in float32.

    Both run in turn at the middle of the r grid, in batches as large as `budget` seconds allow, up to `max_batch`.
    `graphed` returns a model with a CUDA graph of batches of a size at an r. Without one, both would take on a GPU the
    time that Python needs to launch the kernels.
    """
    grid = models["float32"].info.grid
    r = grid[len(grid) // 2].r
    image = torch.randint(256, models["float32"].info.preprocess.settings.input_size, dtype=torch.uint8)
    work = BatchItem(image, Outputs(top_k=1))

    def once(size: int) -> dict[Dtype, float]:
        return {dtype: run(model, [work] * size, r, device, packed=True).seconds for dtype, model in models.items()}

    began = time.perf_counter()
    once(1)  # makes kernels
    best = once(1)
    if (ratio := best["float32"] / best["bfloat16"]) < _HOPELESS:
        return ratio
    # A batch takes between half and all of the time of its images one by one. The first one makes kernels again.
    passes = 3 * sum(best.values())
    size = max([size for size in batch_sizes(max_batch) if size * passes <= 2 * budget], default=1)
    models = {dtype: graphed(model, size, r) for dtype, model in models.items()}
    if size > 1:
        once(size)
        best = once(size)
    for _ in range(_MOST_ROUNDS):
        again = once(size)
        best = {dtype: min(seconds, again[dtype]) for dtype, seconds in best.items()}
        if time.perf_counter() - began > budget:
            break
    return best["float32"] / best["bfloat16"]


def _by_record(spec: ModelSpec, gain: Callable[[], float | None]) -> Choice:
    """Choose by the agreement in the model's quality report in bfloat16, if there is one."""
    if spec.quality_bfloat16 is None:
        command = f"tome-server models evaluate {spec.name} --repository DIR --dtype bfloat16 --data IMAGES"
        if spec.profiles is None:  # not a model of a repository
            report = quality_beside(spec.quality or Path(QUALITY), "bfloat16")
            command = f"tome-server evaluate --dtype bfloat16 --data IMAGES --output {report}"
        return Choice("float32", f"nothing records whether bfloat16 agrees with it; {command} does")
    try:
        agreement, images = recorded_agreement(in_dtype(spec, "bfloat16"))
    except ModelLoadError as error:
        return Choice("float32", str(error))
    return choose(agreement, images, gain)
