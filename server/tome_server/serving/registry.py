"""Which models are in service, by name, and which are still answering their last requests."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tome_server.errors import UnavailableError, UnknownModelError
from tome_server.serving.batcher import Batcher, Served

# Characters of an unknown model's name that its refusal repeats.
NAME_SHOWN = 100


class ModelRegistry:
    """The models that requests may name. A model's name is expected, then served, and at last retired."""

    def __init__(self, batcher: Batcher, names: Sequence[str]) -> None:
        """`names` are of models that will be served, the one for requests that name none first."""
        self.names = list(names)
        """Of all models that are or will be served; the first answers requests that name none."""
        self.models: dict[str, Served] = {}
        """Those that are in service, by name."""
        self.leaving: list[Served] = []
        """Models that have been replaced or retired, and still have requests to answer."""
        self._batcher = batcher
        # Requests that hold a model, by its key.
        self._held: Counter[str] = Counter()
        self._released = asyncio.Event()

    @property
    def default_name(self) -> str:
        """Name of the model for requests that name none; empty if there is no model."""
        return self.names[0] if self.names else ""

    def model(self, name: str) -> Served:
        """Return a model in service, the first if unnamed.

        Raises UnknownModelError, or UnavailableError if it is loading or there is none at all.
        """
        name = name or self.default_name
        if not name:
            raise UnavailableError("no model is in service")
        if name not in self.names:
            # The caller's text goes into the status, and gRPC drops statuses of more than a few kilobytes.
            raise UnknownModelError(name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}…", self.names)
        if name not in self.models:
            raise UnavailableError(f"model {name} is loading")
        return self.models[name]

    def expect(self, name: str) -> None:
        """Answer requests for a model with UnavailableError until it is served."""
        self.names.append(name)

    def forget(self, name: str) -> None:
        """Answer requests for a model that was expected with UnknownModelError again."""
        self.names.remove(name)

    def serve(self, served: Served) -> Served | None:
        """Take an expected model into service, or replace the one of its name.

        Returns the one that was replaced, if any: wait with `left` until it has answered its requests.
        """
        before = self.models.get(served.model.name)
        self.models[served.model.name] = served
        self._batcher.add(served)
        if before:
            self.leaving.append(before)
        return before

    def retire(self, name: str) -> Served:
        """Refuse new requests for a model, and return it: wait with `left` until it has answered its requests.

        Raises UnknownModelError or UnavailableError for a model that isn't in service.
        """
        served = self.model(name)
        self.names.remove(served.model.name)
        self.leaving.append(self.models.pop(served.model.name))
        return served

    async def left(self, served: Served) -> None:
        """Wait until a model that was replaced or retired has answered its last request and left the device."""
        while self._held[served.key]:
            await self._release()
        await self._batcher.remove(served)
        self.leaving.remove(served)

    async def unheld(self) -> None:
        """Wait until no request holds a model."""
        while any(self._held.values()):
            await self._release()

    @contextmanager
    def holding(self, served: Served) -> Iterator[None]:
        """Keep a model able to answer inside the `with`, even if it is replaced or retired meanwhile."""
        self._held[served.key] += 1
        try:
            yield
        finally:
            self._held[served.key] -= 1
            self._released.set()

    async def _release(self) -> None:
        self._released.clear()
        await self._released.wait()
