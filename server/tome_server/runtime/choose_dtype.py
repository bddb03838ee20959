"""What a dtype of auto stands for: bfloat16 where it agrees with float32 and measures faster, else float32."""

import gc
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tome_server.errors import ModelLoadError
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import LEAST_AGREEMENT, load, recorded_agreement
from tome_server.models.preprocess import Limits
from tome_server.models.spec import QUALITY, Dtype, ModelSpec, in_dtype, quality_beside
from tome_server.runtime.executor import run_batch
from tome_server.runtime.memory import lacks_memory
from tome_server.runtime.profile_store import ProfileError, default_folder, device_name, file_name, write_whole
from tome_server.runtime.profiling import Run, batch_sizes
from tome_server.runtime.work import Work

log = logging.getLogger(__name__)

# On fewer images, a share of 0.995 can't be told from 1.
LEAST_IMAGES = 200
# Less isn't worth scores that differ in the third digit, and could be chance.
LEAST_GAIN = 1.1
# Seconds to measure for; a model of which four batches take longer needs more.
BUDGET = 1.0
_MOST_ROUNDS = 7
# Where single images are slower by this much, batches need not be tried: the processor emulates the type.
_HOPELESS = 0.5


@dataclass(frozen=True)
class Choice:
    """What a model runs in."""

    dtype: Dtype
    reason: str
    """Why, in words for the operator."""


def choose(agreement: float, images: int, gain: Callable[[], float | None]) -> Choice:
    """Choose between bfloat16 and float32.

    `agreement` is the share of `images` that bfloat16 gives the same class as float32; `gain` measures how many times
    as fast it is, or gives None if memory doesn't hold both, and is called only if agreement suffices.
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
    threads: Sequence[int],
    folder: Path | None = None,
    anew: bool = False,
) -> LoadedModel:
    """Do what `load` does, having found out what a dtype of auto stands for; the log says what and why.

    Where speed decides, it is measured for about a second, at each of `threads`, and kept in `folder` (None:
    `default_folder`) for the next time; `anew` measures in any case. Raises what `load` raises.
    """
    if spec.dtype != "auto":
        return load(spec, device, limits)
    counts = sorted(set(threads)) if device.type == "cpu" else [max(threads)]
    key = _key(spec, device, max_batch, counts)
    loaded: dict[Dtype, LoadedModel] = {}

    def gain() -> float | None:
        if not anew and (kept := _kept(spec, key, folder)):
            return kept
        try:
            for dtype in ("float32", "bfloat16"):
                loaded[dtype] = load(in_dtype(spec, dtype), device, limits)
            measured = measure_gain(loaded, device, max_batch=max_batch, threads=counts)
        except Exception as error:
            if not lacks_memory(error):
                raise
        else:
            _keep(spec, key, folder, measured)
            return measured
        # Now that the error is gone, whose traceback held what had been allocated until then.
        loaded.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    choice = _by_record(spec, gain)
    log.info("%s runs in %s: %s", spec.name, choice.dtype, choice.reason)
    return loaded.get(choice.dtype) or load(in_dtype(spec, choice.dtype), device, limits)


def measure_gain(
    models: Mapping[Dtype, LoadedModel],
    device: torch.device,
    *,
    max_batch: int,
    threads: Sequence[int],
    budget: float = BUDGET,
    run: Run = run_batch,
) -> float:
    """Return how many times as fast as in float32 a model is in bfloat16, each with what suits it best of `threads`.

    Both run in turn, in batches as large as `budget` seconds allow, up to `max_batch`, at the middle of the r grid.
    """
    grid = models["float32"].grid
    image = torch.randint(256, models["float32"].preprocess.settings.input_size, dtype=torch.uint8)
    work = Work(image, top_k=1)
    sides = [(dtype, count) for count in threads for dtype in models]

    def once(size: int) -> dict[tuple[Dtype, int], float]:
        took = {}
        for dtype, count in sides:
            torch.set_num_threads(count)
            took[dtype, count] = run(models[dtype], [work] * size, grid[len(grid) // 2].r, device, packed=True).seconds
        return took

    before, began = torch.get_num_threads(), time.perf_counter()
    try:
        once(1)  # makes kernels
        best = once(1)
        if (ratio := _ratio(best)) < _HOPELESS:
            return ratio
        # A batch takes half to all of the time of its images one by one; the first makes kernels again.
        passes = 3 * sum(best.values())
        sizes = [size for size in batch_sizes(max_batch) if size > 1 and size * passes <= 2 * budget]
        if sizes:
            once(sizes[-1])
            best = once(sizes[-1])
        for _ in range(_MOST_ROUNDS):
            again = once(sizes[-1] if sizes else 1)
            best = {side: min(seconds, again[side]) for side, seconds in best.items()}
            if time.perf_counter() - began > budget:
                break
    finally:
        torch.set_num_threads(before)
    return _ratio(best)


def _ratio(best: Mapping[tuple[Dtype, int], float]) -> float:
    """Return how many times as fast bfloat16 is, of seconds by dtype and threads."""
    fastest = {
        wanted: min(seconds for (dtype, _), seconds in best.items() if dtype == wanted)
        for wanted in ("float32", "bfloat16")
    }
    return fastest["float32"] / fastest["bfloat16"]


def _by_record(spec: ModelSpec, gain: Callable[[], float | None]) -> Choice:
    """Choose by what is recorded of a model's agreement, if anything is."""
    if spec.quality_bfloat16 is None:
        command = f"tome-server models evaluate {spec.name} --repository DIR --dtype bfloat16 --data IMAGES"
        if spec.profiles is None:  # of no repository
            report = quality_beside(spec.quality or Path(QUALITY), "bfloat16")
            command = f"tome-server evaluate --dtype bfloat16 --data IMAGES --output {report}"
        return Choice("float32", f"nothing records whether bfloat16 agrees with it; {command} does")
    try:
        agreement, images = recorded_agreement(in_dtype(spec, "bfloat16"))
    except ModelLoadError as error:
        return Choice("float32", str(error))
    return choose(agreement, images, gain)


def _key(spec: ModelSpec, device: torch.device, max_batch: int, threads: Sequence[int]) -> dict[str, Any]:
    """Return all that speed depends on, as JSON has it."""
    key = {
        "model": spec.architecture,
        "kwargs": dict(spec.kwargs),
        "data": dict(spec.data),
        "proportional_attention": spec.proportional_attention,
        "device": device_name(device),
        "threads": list(threads) if device.type == "cpu" else [],
        "max_batch": max_batch,
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "tome_serving": importlib.metadata.version("tome-serving"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key, default=str))
    return plain


def _path(folder: Path, spec: ModelSpec, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{file_name(spec.name)}-{digest}.dtype"


def _kept(spec: ModelSpec, key: Mapping[str, Any], folder: Path | None) -> float | None:
    """Return what was measured before, here or where the model came with it; None if nothing that can be read was."""
    for place in (folder, spec.profiles):
        try:
            document = json.loads(_path(place or default_folder(), spec, key).read_text(encoding="utf-8"))
            if document["key"] == key and (gain := float(document["gain"])) > 0:
                return gain
        except (ProfileError, OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _keep(spec: ModelSpec, key: Mapping[str, Any], folder: Path | None, gain: float) -> None:
    text = json.dumps({"key": key, "gain": round(gain, 3)}) + "\n"
    try:
        write_whole(_path(folder or default_folder(), spec, key), text)
    except ProfileError as error:
        log.warning("how fast %s is in bfloat16 isn't kept, and will be measured again: %s", spec.name, error)
