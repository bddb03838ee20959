"""A line on the terminal that says how far a command is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

# Seconds until the line appears, and between its changes.
_SHOWN_AFTER = 2.0
_EVERY = 0.25

# Clears the terminal's line.
_ERASE = "\r\x1b[K"


class ProgressLine:
    """Shows a text on standard error while the `with` block runs, from its third second on.

    Its thread shows it, so that it also appears where no result ever arrives.

    Args:
        text: Returns what to show. The thread calls it.
        shown: False to show nothing, where standard error is no terminal or another output is the progress.
    """

    def __init__(self, text: Callable[[], str], *, shown: bool) -> None:
        self._text = text
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True) if shown else None

    @contextmanager
    def erased(self) -> Iterator[None]:
        """Leaves the terminal's line to other output."""
        with self._writing:
            self._erase()
            yield

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        self._erase()

    def _show(self) -> None:
        wait = _SHOWN_AFTER
        while not self._ended.wait(wait):
            with self._writing:
                print(f"{_ERASE}{self._text()}", end="", file=sys.stderr, flush=True)
            wait = _EVERY

    def _erase(self) -> None:
        if self._thread:
            print(_ERASE, end="", file=sys.stderr, flush=True)


def at_terminal() -> bool:
    """Whether a person sees standard error, and does not see results appear on standard output."""
    return bool(sys.stderr and sys.stderr.isatty() and not (sys.stdout and sys.stdout.isatty()))
