"""Threads that divide work among them, each of which runs torch's operations by itself.

torch divides single operations instead: some dozen times in each block it wakes its threads and waits for the last of
them, and what lies between doesn't divide.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class _Task(NamedTuple):
    call: Callable[[], Any]
    inference: bool
    gradients: bool
    answers: "SimpleQueue[tuple[int, Any, BaseException | None]]"
    place: int


class Workers:
    """So many threads. Safe to use from several; not from a worker, but for `each_with_caller` from the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: list[SimpleQueue[_Task]] = [SimpleQueue() for _ in range(count)]
        threads, ready = torch.get_num_threads(), threading.Barrier(count + 1)
        for i, tasks in enumerate(self._tasks):
            threading.Thread(target=_work, args=(tasks, ready), name=f"worker-{i}", daemon=True).start()
        ready.wait()
        # Each thread has its own number, but new threads take what was said last by any.
        torch.set_num_threads(threads)

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run the first call on the first worker, and so on. Returns what they return; raises what the first raises."""
        return self._run(calls, None)

    def each_with_caller(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """As `each`, but run the first call in the calling thread, which may be the first worker."""
        return self._run(calls[1:], calls[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workers":
        """Return itself: threads aren't copied."""
        return self

    def _run(self, calls: Sequence[Callable[[], T]], own: Callable[[], T] | None) -> list[T]:
        answers: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
        first = 0 if own is None else 1
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        for i, call in enumerate(calls, first):
            self._tasks[i].put(_Task(call, *modes, answers, i))
        try:
            results: dict[int, Any] = {} if own is None else {0: own()}
        finally:
            # Waited for in any case: what they read may change once this returns.
            answered = [answers.get() for _ in calls]
        for i, result, error in sorted(answered, key=lambda answer: answer[0]):
            if error is not None:
                raise error
            results[i] = result
        return [results[i] for i in sorted(results)]


@cache
def shared_workers(count: int) -> Workers:
    """Return the process's workers, so many."""
    return Workers(count)


def _work(tasks: "SimpleQueue[_Task]", ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    # Asked for, it is this thread's from now on; otherwise the first operation would take what was said last by any.
    torch.get_num_threads()
    ready.wait()
    while True:
        _answer(tasks.get())


def _answer(task: _Task) -> None:
    # A function of its own, so that nothing is held while the next task is waited for.
    try:
        with torch.inference_mode(task.inference), torch.set_grad_enabled(task.gradients):
            task.answers.put((task.place, task.call(), None))
    except BaseException as error:
        task.answers.put((task.place, None, error))
