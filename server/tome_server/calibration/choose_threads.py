"""Chooses how many CPU threads models run on."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from tome_server.calibration.speedups import Speedups, model_speedups, speed_key
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.cpus import available_cpus
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load
from tome_server.models.spec import ModelSpec

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


def choose_threads(models: Sequence[tuple[ModelSpec, int]], folder: Path | None = None, *, anew: bool = False) -> int:
    """Set torch to use one thread or as many as there are CPUs, whichever runs `models` faster, and return how many.

    For each model, one image and its largest batch are timed, in float32 if its dtype is auto, which is chosen later
    for these threads. A model that can't be loaded is skipped, since it won't be served.

    Args:
        models: Each with its largest batch.
        folder: Where measurements are kept for the next time; None for the default folder.
        anew: Whether to measure even if a measurement is kept.

    Raises:
        ModelLoadError: If no model can be loaded.
    """
    cpus = available_cpus()
    torch.set_num_threads(cpus)
    if cpus == 1:
        log.info("using 1 CPU thread: this is the only CPU")
        return 1
    parts = [speed_key(spec, CPU, cpus, max_batch) | {"dtype": spec.dtype} for spec, max_batch in models]
    shipped = models[0][0].profiles if len(models) == 1 else None
    speedups = Speedups("server", {"models": parts}, folder, shipped, anew=anew)

    def measure() -> float:
        seconds: list[dict[int, float]] = []
        for spec, max_batch in models:
            try:
                seconds.append(_seconds(spec, max_batch, cpus, folder, anew))
            except Exception:  # loading the model raises it again later, in words for the operator
                if spec is models[-1][0] and not seconds:
                    raise
                log.debug("%s can't be timed", spec.name, exc_info=True)
        return sum(each[1] for each in seconds) / sum(each[cpus] for each in seconds)

    gain = speedups.get_or_measure(f"{cpus} threads", measure)
    threads = cpus if gain > 1 else 1
    torch.set_num_threads(threads)
    log.info("using %d CPU thread%s (%d ran %.2f times as fast as one)", threads, "s" * (threads > 1), cpus, gain)
    return threads


def _seconds(spec: ModelSpec, max_batch: int, cpus: int, folder: Path | None, anew: bool) -> dict[int, float]:
    """Return the seconds that a model takes on one thread and on `cpus`, and drop the model."""
    dtype = "float32" if spec.dtype == "auto" else spec.dtype
    model = load(spec, CPU, recall=model_speedups(spec, CPU, max_batch, folder, anew=anew).divided(dtype))
    return seconds_on((1, cpus), partial(_run, model, max_batch))


def _run(model: LoadedModel, max_batch: int) -> None:
    work = BatchItem(torch.zeros(model.info.preprocess.settings.input_size, dtype=torch.uint8), Outputs(top_k=1))
    for size in (1, max_batch):
        run_batch(model, [work] * size, model.info.grid[len(model.info.grid) // 2].r, CPU)


def seconds_on(counts: Sequence[int], run: Callable[[], None], rounds: int = 3) -> dict[int, float]:
    """Return the least seconds that `run` takes for each number of torch's threads, measured in turn.

    More threads aren't always faster: ours sleep between operations so as not to starve others, and are slow to wake,
    which costs a small model more than a second thread gains.
    """
    best = dict.fromkeys(counts, float("inf"))
    before = torch.get_num_threads()
    try:
        for _ in range(rounds):
            for threads in best:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                run()
                best[threads] = min(best[threads], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return best
