"""Clients load and unload models by name."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from tome_server.errors import ConfigError, InvalidRequestError, ModelFailedError, ModelLoadError
from tome_server.serving.model_manager import ModelManager

# Characters of what went wrong that a status carries; gRPC drops those of more than a few kilobytes.
_SHOWN = 1000


@dataclass(frozen=True)
class ModelControl:
    """Loads and unloads models that the settings or the repository name."""

    models: ModelManager

    async def load(self, name: str) -> None:
        """Take a model into service as it is stored now, replacing the one of its name. Cancelling won't stop it.

        Raises UnknownModelError, or ModelFailedError if it can't be loaded.
        """
        try:
            await _to_its_end(self.models.load(_given(name)))
        except (ConfigError, ModelLoadError) as error:
            raise ModelFailedError(f"{name} can't be loaded: {error}"[:_SHOWN]) from error

    async def unload(self, name: str) -> None:
        """Take a model out of service and wait until it has answered its requests. Cancelling won't stop it.

        Raises UnknownModelError if it isn't there, UnavailableError while it loads.
        """
        await _to_its_end(self.models.unload(_given(name)))


def _given(name: str) -> str:
    if not name:
        raise InvalidRequestError("model_name", "is missing")
    return name


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Wait for `work`, and let it finish when the caller is cancelled: a model must not be left half loaded."""
    task = asyncio.create_task(work)
    # If the caller was cancelled, nothing else retrieves the exception, and asyncio would log it.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.shield(task)
