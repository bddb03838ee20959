"""Threads that each run whole torch operations, as an alternative to torch's own threads.

torch's threads share the work of single operations. A dozen times in each block, torch wakes them and waits for the
last one; and the code between operations runs on one thread only.
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
    position: int
    outcomes: "SimpleQueue[_Outcome]"


class _Outcome(NamedTuple):
    position: int
    result: Any
    error: BaseException | None = None


class Workers:
    """A fixed number of threads, each with torch set to one thread. Any thread may call it.

    A worker must not, except that the first worker may call `each_with_caller`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: list[SimpleQueue[_Task]] = [SimpleQueue() for _ in range(count)]
        threads, ready = torch.get_num_threads(), threading.Barrier(count + 1)
        for i, tasks in enumerate(self._tasks):
            threading.Thread(target=_work, args=(tasks, ready), name=f"worker-{i}", daemon=True).start()
        ready.wait()
        # torch's number of threads is a setting of each thread, but new threads start with the number that was set last
        # in any thread: one, by the workers.
        torch.set_num_threads(threads)

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run each call on a worker of its own, and wait for all of them.

        Args:
            calls: at most one for each worker; the first runs on the first worker, and so on.

        Returns:
            Their results, in order.

        Raises:
            BaseException: the error of the first call that failed.
        """
        return self._run(calls, None)

    def each_with_caller(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run the first call in the calling thread, which may be the first worker, and the others as `each`."""
        return self._run(calls[1:], calls[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workers":
        """Return itself: threads can't be copied."""
        return self

    def _run(self, calls: Sequence[Callable[[], T]], own: Callable[[], T] | None) -> list[T]:
        queue: SimpleQueue[_Outcome] = SimpleQueue()
        first = 0 if own is None else 1
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        for i, call in enumerate(calls, first):
            self._tasks[i].put(_Task(call, *modes, i, queue))
        try:
            results: dict[int, Any] = {} if own is None else {0: own()}
        finally:
            # Wait for them even after an error: the tensors that they read may change after this function returns.
            outcomes = [queue.get() for _ in calls]
        for outcome in sorted(outcomes, key=lambda outcome: outcome.position):
            if outcome.error is not None:
                raise outcome.error
            results[outcome.position] = outcome.result
        return [results[i] for i in sorted(results)]


@cache
def shared_workers(count: int) -> Workers:
    """Return `count` workers, the same ones in each call."""
    return Workers(count)


def _work(tasks: "SimpleQueue[_Task]", ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    # Reading the number makes it this thread's. Otherwise the thread's first operation would take the number that was
    # set last in any thread.
    torch.get_num_threads()
    ready.wait()
    while True:
        _run_task(tasks.get())


def _run_task(task: _Task) -> None:
    # A function of its own, so that a task's tensors are freed before the worker waits for the next one.
    try:
        with torch.inference_mode(task.inference), torch.set_grad_enabled(task.gradients):
            task.outcomes.put(_Outcome(task.position, task.call()))
    except BaseException as error:
        task.outcomes.put(_Outcome(task.position, None, error))
