"""How long this process's threads have waited for a CPU: what shows that the machine is busy with something else."""

from pathlib import Path

# A line for each thread: nanoseconds on a CPU, nanoseconds that it could have run and waited for one, times it ran.
_TASKS = Path("/proc/self/task")
# Nanoseconds on a CPU from which on a share says something.
_LEAST = 10_000_000


class LoadMeter:
    """Measures from when it is made.

    Only what the kernel makes wait is seen: other processes, and a container's quota of CPU time; not other virtual
    machines, nor what shares a core, its caches or the memory.
    """

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._before = _times(tasks)

    def share(self) -> float | None:
        """Return the share of the time for which threads that could have run waited for a CPU.

        None where the kernel doesn't say, or too little was run meanwhile. Threads that have ended don't count.
        """
        running = waiting = 0
        for thread, (ran, waited) in _times(self._tasks).items():
            before_ran, before_waited = self._before.get(thread, (0, 0))
            running += ran - before_ran
            waiting += waited - before_waited
        return waiting / (running + waiting) if running >= _LEAST else None


def _times(tasks: Path) -> dict[str, tuple[int, int]]:
    """Return nanoseconds of running and waiting by thread; empty where the kernel doesn't count them."""
    times = {}
    for file in tasks.glob("*/schedstat"):
        try:
            ran, waited, _ = file.read_text().split()
            times[file.parent.name] = (int(ran), int(waited))
        except (OSError, ValueError):  # the thread has ended meanwhile
            continue
    return times
