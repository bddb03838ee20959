"""Clients load and unload models by name.

Changes are made one after the other. A change that several callers wait for is made once, and one that no caller waits
for any more is not begun.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeAlias

from tome_server.errors import ConfigError, InvalidRequestError, ModelFailedError, ModelLoadError
from tome_server.serving.model_manager import ModelManager

# Characters of what went wrong that a status carries; gRPC drops those of more than a few kilobytes.
_SHOWN = 1000

Work: TypeAlias = Callable[[str, Callable[[], None]], Coroutine[None, None, None]]
"""Loads or unloads the model of a name, and calls a function once it begins."""


@dataclass(eq=False)
class _Change:
    """A change that was asked for, and how many callers wait for it."""

    work: Work
    task: "asyncio.Task[None]" = field(init=False)
    callers: int = 0
    begun: bool = False


class ModelControl:
    """Loads and unloads models that the settings or the repository name."""

    def __init__(self, models: ModelManager) -> None:
        self._models = models
        # The last change of each model. Until it begins, further callers may wait for it; one that has begun may have
        # read files that were changed since.
        self._last: dict[str, _Change] = {}

    async def load(self, name: str) -> None:
        """Take a model into service as it is stored now, replacing the one of its name.

        Cancelling the last caller of a load keeps it from beginning, but won't stop it. Raises UnknownModelError, or
        ModelFailedError if the model can't be loaded.
        """
        try:
            await self._change(name, self._models.load)
        except (ConfigError, ModelLoadError) as error:
            raise ModelFailedError(f"{name} can't be loaded: {error}"[:_SHOWN]) from error

    async def unload(self, name: str) -> None:
        """Take a model out of service and wait until it has answered its requests. Cancelling is as for `load`.

        Raises UnknownModelError if it isn't there, UnavailableError while it loads.
        """
        await self._change(name, self._models.unload)

    async def _change(self, name: str, work: Work) -> None:
        if not name:
            raise InvalidRequestError("model_name", "is missing")
        change = self._last.get(name)
        if change is None or change.begun or change.work != work:
            change = self._last[name] = self._queued(name, work)
        change.callers += 1
        try:
            # A change that has begun runs to its end: a model must not be left half loaded.
            await asyncio.shield(change.task)
        finally:
            change.callers -= 1
            if not change.callers and not change.begun:
                self._forget(name, change)
                change.task.cancel()

    def _queued(self, name: str, work: Work) -> _Change:
        def begins() -> None:
            change.begun = True
            self._forget(name, change)

        change = _Change(work)
        change.task = asyncio.create_task(work(name, begins))
        # If every caller was cancelled, nothing else retrieves the exception, and asyncio would log it.
        change.task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return change

    def _forget(self, name: str, change: _Change) -> None:
        """Have no further caller wait for a change."""
        if self._last.get(name) is change:
            del self._last[name]
