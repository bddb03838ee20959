"""Models go into and out of service by name, when a client asks for it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from tome_server.errors import ConfigError, InvalidRequestError, ModelFailedError, ModelLoadError
from tome_server.serving.model_manager import ModelManager

# Characters of what went wrong that a status carries; gRPC drops those of more than a few kilobytes.
_SHOWN = 1000


@dataclass(frozen=True)
class ModelControl:
    """Loads and unloads what the settings and the repository name."""

    models: ModelManager

    async def load(self, name: str) -> None:
        """Take a model into service as it is stored now, in the place of what is served under its name.

        Raises UnknownModelError, or ModelFailedError if it can't be loaded. Goes on when the caller is cancelled.
        """
        try:
            await _to_its_end(self.models.load(_given(name)))
        except (ConfigError, ModelLoadError) as error:
            raise ModelFailedError(f"{name} can't be loaded: {error}"[:_SHOWN]) from error

    async def unload(self, name: str) -> None:
        """Take a model out of service, once it has answered what it has. Goes on when the caller is cancelled.

        Raises UnknownModelError if it isn't there, UnavailableError while it loads.
        """
        await _to_its_end(self.models.unload(_given(name)))


def _given(name: str) -> str:
    if not name:
        raise InvalidRequestError("model_name", "is missing")
    return name


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Wait for `work`, which half done would leave a model neither in nor out of service."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may have gone
    await asyncio.shield(task)
