"""Loads and unloads that many callers ask for, of which some leave, while an earlier change is held."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from tome_server.config.server import ServerConfig
from tome_server.errors import ConfigError, InvalidRequestError, ModelFailedError, ModelLoadError
from tome_server.serving.control import ModelControl
from tome_server.serving.model_manager import ModelManager


class ScriptedManager:
    """Stands in for the ModelManager: one change at a time, each held until `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[tuple[str, str]] = []
        self.done: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self._changing = asyncio.Lock()

    async def load(self, name: str, begins: Callable[[], None]) -> None:
        await self._change("load", name, begins)

    async def unload(self, name: str, begins: Callable[[], None]) -> None:
        await self._change("unload", name, begins)

    async def _change(self, kind: str, name: str, begins: Callable[[], None]) -> None:
        async with self._changing:
            begins()
            self.begun.append((kind, name))
            await self.gate.wait()
            if self.error:
                raise self.error
            self.done.append((kind, name))


class Callers:
    """Callers of a ModelControl, the first of whose changes is being made."""

    def __init__(self) -> None:
        self.manager = ScriptedManager()
        self.control = ModelControl(self.manager)  # type: ignore[arg-type]

    async def ask(self, kind: str, *names: str) -> "list[asyncio.Task[None]]":
        tasks = [asyncio.create_task(getattr(self.control, kind)(name)) for name in names]
        await rounds()
        return tasks


async def rounds() -> None:
    """Let everything go on that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def leave(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await rounds()


@pytest.fixture
async def callers() -> Callers:
    return Callers()


async def test_loads_whose_callers_have_left_are_not_begun_and_keep_no_other_change_waiting(callers: Callers) -> None:
    first = await callers.ask("load", "first")
    abandoned = await callers.ask("load", *(f"model{number}" for number in range(60)))
    unload = await callers.ask("unload", "other")
    await leave(abandoned)
    callers.manager.gate.set()
    await asyncio.gather(*first, *unload)
    assert callers.manager.begun == [("load", "first"), ("unload", "other")]


async def test_a_change_that_has_begun_runs_to_its_end_without_its_callers(callers: Callers) -> None:
    await leave(await callers.ask("load", "first"))
    callers.manager.gate.set()
    await asyncio.gather(*await callers.ask("load", "second"))
    assert callers.manager.done == [("load", "first"), ("load", "second")]


@pytest.mark.parametrize("kind", ["load", "unload"])
async def test_callers_who_wait_for_the_same_change_get_it_once_as_long_as_one_stays(
    callers: Callers, kind: str
) -> None:
    first = await callers.ask("load", "first")
    leaving, staying = await callers.ask(kind, "same"), await callers.ask(kind, *["same"] * 5)
    await leave(leaving)
    callers.manager.gate.set()
    await asyncio.gather(*first, *staying)
    assert callers.manager.done == [("load", "first"), (kind, "same")]


async def test_a_load_that_has_begun_is_not_shared_since_files_may_have_changed_since(callers: Callers) -> None:
    tasks = await callers.ask("load", "same") + await callers.ask("load", *["same"] * 3)
    callers.manager.gate.set()
    await asyncio.gather(*tasks)
    assert callers.manager.done == [("load", "same")] * 2


async def test_loads_and_unloads_of_a_model_keep_their_order(callers: Callers) -> None:
    tasks = await callers.ask("load", "first")
    for kind in ("load", "unload", "load", "load", "unload"):
        tasks += await callers.ask(kind, "same")
    callers.manager.gate.set()
    await asyncio.gather(*tasks)
    assert [kind for kind, name in callers.manager.done if name == "same"] == ["load", "unload", "load", "unload"]


async def test_a_load_that_was_dropped_although_an_unload_came_after_it_is_not_made(callers: Callers) -> None:
    first = await callers.ask("load", "first")
    load, unload = await callers.ask("load", "same"), await callers.ask("unload", "same")
    await leave(load)
    callers.manager.gate.set()
    await asyncio.gather(*first, *unload)
    assert callers.manager.done == [("load", "first"), ("unload", "same")]


async def test_a_load_that_fails_says_so_to_each_caller_and_may_be_tried_again(callers: Callers) -> None:
    first = await callers.ask("load", "first")
    tasks = await callers.ask("load", "same", "same")
    callers.manager.error = ModelLoadError("no weights")
    callers.manager.gate.set()
    for task in first + tasks:
        with pytest.raises(ModelFailedError, match="can't be loaded: no weights"):
            await task
    callers.manager.error = None
    await asyncio.gather(*await callers.ask("load", "same"))
    assert callers.manager.done == [("load", "same")]


async def test_a_change_needs_a_name(callers: Callers) -> None:
    with pytest.raises(InvalidRequestError, match="model_name: is missing"):
        await callers.control.load("")


async def test_looks_at_the_repository_that_wait_for_a_change_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def found(*_: object, **__: object) -> None:
        nonlocal looks
        looks += 1
        raise ConfigError("gone")

    monkeypatch.setattr("tome_server.serving.model_manager.find_models", found)
    manager = ModelManager(None, None, ServerConfig())  # type: ignore[arg-type]
    async with manager._changing:
        refreshes = [asyncio.create_task(manager.refresh()) for _ in range(20)]
        await rounds()
    await asyncio.gather(*refreshes)
    await manager.refresh()
    assert looks == 2
