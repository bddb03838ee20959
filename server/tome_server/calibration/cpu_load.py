"""Measures how long this process's threads wait for a CPU, which shows that other work keeps the machine busy."""

from pathlib import Path

# Has a file for each thread: nanoseconds on a CPU, nanoseconds that it was ready and waited for one, times it ran.
_TASKS = Path("/proc/self/task")
# The least nanoseconds on a CPU for a share to mean something.
_LEAST = 10_000_000


class LoadMeter:
    """Measures from the time when it is made.

    It sees only waiting for the kernel: because of other processes, or of a container's quota of CPU time. It doesn't
    see other virtual machines, or work that shares a core, its caches or the memory.
    """

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._before = _times(tasks)

    def share(self) -> float | None:
        """Return the share of the time that threads which were ready to run waited for a CPU.

        None if the kernel doesn't say, or too little was run meanwhile. Threads that have ended don't count.
        """
        running = waiting = 0
        for thread, (ran, waited) in _times(self._tasks).items():
            before_ran, before_waited = self._before.get(thread, (0, 0))
            running += ran - before_ran
            waiting += waited - before_waited
        return waiting / (running + waiting) if running >= _LEAST else None


def _times(tasks: Path) -> dict[str, tuple[int, int]]:
    """Return nanoseconds of running and waiting by thread; empty if the kernel doesn't count them."""
    times = {}
    for file in tasks.glob("*/schedstat"):
        try:
            ran, waited, _ = file.read_text().split()
            times[file.parent.name] = (int(ran), int(waited))
        except (OSError, ValueError):  # the thread has ended meanwhile
            continue
    return times
