"""What signals do to commands, and to a server until its event loop has them."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

_IMPORTING = "<frozen importlib._bootstrap>"


@contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C end the command with a line and status 130, once what was begun has been cleaned up."""
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Have SIGTERM and SIGINT end the process, with a line that says so, and SIGHUP ignored: it means nothing yet."""
    before = {signum: signal.signal(signum, _stop) for signum in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_status(signum: int) -> int:
    """Return the exit status of a server that a signal ended before it served: SIGTERM is how servers are stopped."""
    return 0 if signum == signal.SIGTERM else 128 + signum


def stop_line(signum: int) -> str:
    """Say that such a server ends."""
    return f"{signal.Signals(signum).name} before any model was served: stopping at once"


def end_in(seconds: float, status: int, before: Callable[[], None]) -> None:
    """End the process after so many seconds, whatever it does then, unless it has ended: first calls `before`."""

    def end() -> None:
        before()
        _end(f"still busy {seconds:.1f} s after it was to stop: stopping at once", status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def leave(status: int) -> NoReturn:
    """End the process now that all is done; Python would first wait for threads, which may decode for minutes."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _stop(signum: int, _frame: FrameType | None) -> None:
    _end(stop_line(signum), stop_status(signum))


def _interrupt(_signum: int, frame: FrameType | None) -> None:
    # A module that is being imported may take the exception for one of its own, and go on.
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            _end("interrupted", 128 + signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(why: str, status: int) -> NoReturn:
    """End the process as it is: Python can't always take it down in order while threads are in torch's code."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        # At a terminal behind what Ctrl-C has left there, and maybe a bar of progress.
        print("\n" * sys.stderr.isatty() + f"tome-server: {why}", file=sys.stderr, flush=True)
    os._exit(status)
