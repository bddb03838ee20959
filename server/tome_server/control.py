"""Models go into and out of service by name, when a client asks for it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field

from tome_server.errors import (
    ConfigError,
    InvalidRequestError,
    ModelFailedError,
    ModelLoadError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.hosting import Hosting, model_specs
from tome_server.models.spec import ModelSpec


@dataclass(eq=False)
class ModelControl:
    """Loads and unloads what the settings and the repository name, one model after another."""

    hosting: Hosting
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def load(self, name: str) -> None:
        """Take a model into service; does nothing if it is. What lies in the repository now is what counts.

        Raises UnknownModelError, or ModelFailedError if it can't be loaded. Goes on when the caller is cancelled.
        """
        await _to_its_end(self._load(name))

    async def unload(self, name: str) -> None:
        """Take a model out of service, once it has answered what it has. Goes on when the caller is cancelled.

        Raises UnknownModelError if it isn't there.
        """
        if not name:
            raise InvalidRequestError("model_name", "is missing")
        await _to_its_end(self._unload(name))

    async def _load(self, name: str) -> None:
        async with self._turn:
            if name in self.hosting.engine.models:
                return
            if name in self.hosting.engine.names:  # the server itself is starting
                raise UnavailableError(f"model {name} is loading")
            try:
                await self.hosting.load(await asyncio.to_thread(self._spec, name))
            except (ConfigError, ModelLoadError) as error:
                raise ModelFailedError(f"{name} can't be loaded: {error}") from error

    async def _unload(self, name: str) -> None:
        async with self._turn:
            await self.hosting.unload(name)

    def _spec(self, name: str) -> ModelSpec:
        specs = {spec.name: spec for spec in model_specs(self.hosting.config)}
        if name not in specs:
            raise UnknownModelError(name[:100], list(specs))
        return specs[name]


async def _to_its_end(work: Coroutine[None, None, None]) -> None:
    """Wait for `work`, which half done would leave a model neither in nor out of service."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller may have gone
    await asyncio.shield(task)
