"""How many threads are worth using."""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from tome_server.models.loaded import LoadedModel
from tome_server.runtime.cpus import available_cpus
from tome_server.runtime.executor import run_batch
from tome_server.runtime.work import Work

log = logging.getLogger(__name__)


def choose_threads(models: Sequence[LoadedModel], max_batch: int, device: torch.device) -> int:
    """Set torch's threads to what runs one image and a full batch of each model fastest, and return that."""

    def run() -> None:
        for model in models:
            image = torch.zeros(model.preprocess.settings.input_size, dtype=torch.uint8)
            for size in (1, max_batch):
                run_batch(model, [Work(image, top_k=1)] * size, model.grid[len(model.grid) // 2].r, device)

    threads = fastest_threads(run, available_cpus())
    torch.set_num_threads(threads)
    log.info("%d CPU threads, as measured", threads)
    return threads


def fastest_threads(run: Callable[[], None], most: int, rounds: int = 3) -> int:
    """Measure `run` on one torch thread and on `most`, in turn, and return which is faster.

    Threads that sleep between operations, as ours do so as not to starve others, are slow to wake: for a small model
    that costs more than a second thread gains.
    """
    if most == 1:
        return 1
    best = dict.fromkeys((1, most), float("inf"))
    before = torch.get_num_threads()
    for _ in range(rounds):
        for threads in best:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            run()
            best[threads] = min(best[threads], time.perf_counter() - start)
    torch.set_num_threads(before)
    return min(best, key=lambda threads: best[threads])
