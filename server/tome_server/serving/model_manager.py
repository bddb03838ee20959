"""Loads models and takes them into and out of service: all configured ones at the start, single ones after that.

A faulty model of the repository is logged, with the path of its folder, and the others are served. A faulty model that
the settings name keeps the server from starting.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tome_server.config.model_overrides import ModelOverrides
from tome_server.config.server import ServerConfig
from tome_server.device.client import Device
from tome_server.errors import ConfigError, DeviceDiedError, ModelLoadError, OutOfMemoryError, UnknownModelError
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import Limits
from tome_server.models.repository import Repository
from tome_server.models.sources import FoundModels, checked, configured_spec, find_models
from tome_server.models.spec import ModelSpec
from tome_server.serving.batcher import Served
from tome_server.serving.engine import Engine
from tome_server.serving.remeasuring import observed
from tome_server.serving.served import FIXED, ServedModel

log = logging.getLogger(__name__)


def _unheard() -> None:
    """Do nothing: the caller doesn't wait for a change to begin."""


class ModelManager:
    """Loads stored models onto the device, measures them, and registers them with the engine; and the reverse."""

    def __init__(self, device: Device, engine: Engine, config: ServerConfig) -> None:
        self._device = device
        self._engine = engine
        self._config = config
        self._versions = itertools.count(1)
        # Bytes of weights of each model on the device, by its key there.
        self._loaded: dict[str, int] = {}
        # What each model in service was loaded from, by name.
        self._sources: dict[str, _Source] = {}
        self._changing = asyncio.Lock()
        self._to_refresh = False

    async def start(self, wanted: FoundModels) -> None:
        """Load and measure models, whose names the engine expects, and serve them.

        A faulty one of the repository is logged and left out. Raises ModelLoadError or ConfigError for a faulty one
        that the settings name, and if none can be served.
        """
        async with self._changing:
            await self._start(wanted)

    async def load(self, name: str, begins: Callable[[], None] = _unheard) -> None:
        """Take a model into service as it is stored now, replacing the one of its name.

        No request is dropped: until the new model is ready, the old one answers; without an old one, requests get
        UnavailableError. Raises UnknownModelError if neither the configuration nor the repository has the model,
        ConfigError or ModelLoadError if it can't be loaded; the old one then stays in service.

        `begins` is called once the changes before this one are done; until then this one may be cancelled.
        """
        async with self._changing:
            begins()
            spec = await asyncio.to_thread(self._stored, name)
            await self._replace(_Source(spec))

    async def unload(self, name: str, begins: Callable[[], None] = _unheard) -> None:
        """Take a model out of service: new requests are refused at once, and those it has are answered first.

        Raises UnknownModelError if it isn't there, UnavailableError if it is loading. `begins` is as for `load`.
        """
        async with self._changing:
            begins()
            await self._take_out(name)

    async def refresh(self) -> None:
        """Load models that are new or changed in the configuration and the repository, and unload those that are gone.

        A model that can't be loaded is logged, and its predecessor stays in service. While one call waits for earlier
        changes, further ones do nothing, since that one will see what they would.
        """
        if self._to_refresh:
            return
        self._to_refresh = True
        async with self._changing:
            self._to_refresh = False
            try:
                wanted = await asyncio.to_thread(find_models, self._config, strict=False)
            except ConfigError as error:
                log.error("models stay as they are: %s", error)  # noqa: TRY400  (in words for the operator)
                return
            for name, fault in wanted.faults.items():
                _log_fault(name, fault, kept=name in self._sources)
            for spec in wanted.specs:
                try:
                    source = _Source(spec)
                    if self._sources.get(spec.name) != source:
                        await self._replace(source)
                except (ConfigError, ModelLoadError) as error:
                    _log_fault(spec.name, error, kept=spec.name in self._sources)
                except DeviceDiedError:  # the server is ending
                    return
            present = {spec.name for spec in wanted.specs} | wanted.faults.keys()
            for name in self._sources.keys() - present:
                await self._take_out(name)

    async def _start(self, wanted: FoundModels) -> None:
        log.info("starting the process that runs the models")
        await self._device.open(self._config.device)
        for name, fault in wanted.faults.items():
            _log_fault(name, fault)
        # Before anything is measured, so that faults that don't need a measurement show at once.
        outlined: list[tuple[_Source, ModelSpec]] = []
        for spec in wanted.specs:
            with self._left_out(spec, wanted):
                outlined.append((_Source(spec), await self._outlined(spec)))
        # First, since models are prepared for this number of threads, and all else is measured with it.
        if self._config.threads:
            await self._device.set_threads(self._config.threads)
        elif self._device.name == "cpu" and outlined:
            models = [(spec, self._max_batch(spec)) for _, spec in outlined]
            with _fits("one of the models, each in batches of its largest size"):
                await self._device.choose_threads(models, self._config.profiles)
        loaded: list[tuple[_Source, tuple[str, ModelSpec, ModelInfo]]] = []
        for source, spec in outlined:
            with self._left_out(spec, wanted):
                loaded.append((source, await self._load(spec)))
        measured: list[tuple[_Source, Served]] = []
        for source, each in loaded:
            with self._left_out(source.spec, wanted):
                measured.append((source, await self._measured(*each)))
        if not measured:
            raise ConfigError(f"repository {self._config.repository} holds no model that can be served: see the log")
        # Only now, since requests for one model would disturb the measurements of the next.
        for source, served in measured:
            await self._serve(source, served)

    @contextmanager
    def _left_out(self, spec: ModelSpec, wanted: FoundModels) -> Iterator[None]:
        """Log a fault of a model of the repository and leave the model out; raise the fault of a configured one."""
        try:
            yield
        except (ConfigError, ModelLoadError) as error:
            if spec.name in wanted.configured:
                raise
            self._engine.registry.forget(spec.name)
            _log_fault(spec.name, error)

    async def _outlined(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec to load for `spec`, checked as far as possible without loading weights.

        Raises ModelLoadError or ConfigError.
        """
        with _its_fault(spec):
            outline = await self._device.outline(spec)
        own = spec.overrides.policy if spec.overrides else None
        policy = own or self._config.policy
        if outline.rs and policy.startswith(FIXED) and int(policy.removeprefix(FIXED)) not in outline.rs:
            what = f"{policy}: the model is served at r = {', '.join(map(str, outline.rs))}"
            if own:
                raise spec.fault("policy", what)
            raise ConfigError(f"policy, for model {spec.name}: {what}")
        return outline.spec

    def _stored(self, name: str) -> ModelSpec:
        """Return the spec of a stored model. Raises UnknownModelError, or ConfigError for a faulty one."""
        for model in self._config.models:
            if (spec := configured_spec(model)).name == name:
                return checked(spec, self._config)
        repository = Repository(self._config.repository) if self._config.repository else None
        if repository is None or name not in repository.names():
            known = dict.fromkeys([*self._engine.registry.names, *(repository.names() if repository else ())])
            raise UnknownModelError(name[:100], list(known))
        return checked(repository.spec(name), self._config)

    async def _replace(self, source: "_Source") -> None:
        name, spec = source.spec.name, await self._outlined(source.spec)
        new = name not in self._engine.registry.names
        if new:
            self._engine.registry.expect(name)
        try:
            await self._serve(source, await self._measured(*await self._load(spec)))
        except BaseException:
            if new:
                self._engine.registry.forget(name)
            raise

    async def _load(self, spec: ModelSpec) -> tuple[str, ModelSpec, ModelInfo]:
        log.info("loading %s", spec.name)
        key, limits, own = f"{spec.name}#{next(self._versions)}", self._config.limits, _overrides(spec)
        bounds = Limits(
            own.limits.max_image_bytes or limits.max_image_bytes, own.limits.max_image_pixels or limits.max_image_pixels
        )
        # Room for the images of pending requests, and for those of cancelled ones that are still decoded or run.
        pending = min(own.batching.max_pending or self._engine.max_pending, self._engine.max_pending)
        slots = pending + self._engine.decode_threads + self._max_batch(spec)
        with _its_fault(spec), _fits(spec.name):
            model = await self._device.load(
                key, spec, bounds, slots, max_batch=self._max_batch(spec), folder=self._config.profiles
            )
        self._loaded[key] = model.weights_bytes
        budget, used = self._config.memory_budget, sum(self._loaded.values())
        if budget is not None and used > budget:
            await self._forget(key)
            raise ModelLoadError(
                f"{spec.name} takes {_mib(model.weights_bytes)} of weights; of the memory_budget of {_mib(budget)}, "
                f"{_mib(max(0, budget - used + model.weights_bytes))} are left"
            )
        return key, spec, model

    async def _measured(self, key: str, spec: ModelSpec, model: ModelInfo) -> Served:
        max_batch, seconds = self._max_batch(spec), self._config.profile_time
        try:
            with _its_fault(spec), _fits(f"{spec.name}, in batches of up to {max_batch} images"):
                await self._device.record(key, max_batch=max_batch, memory=self._config.cuda_graph_memory)
                profile = await self._device.profile(
                    key, spec, max_batch=max_batch, budget=seconds, folder=self._config.profiles
                )
                log.info("warming up %s, for at most %.0f s", spec.name, seconds)
                await self._device.warm(key, max_batch=max_batch, seconds=seconds)
            with _its_fault(spec):
                served: Served = ServedModel(model, profile, self._config.policy, key, _overrides(spec), spec.file)
                await observed(self._device, key, served.scheduler.latency)
        except Exception:
            await self._forget(key)
            raise
        return served

    def _max_batch(self, spec: ModelSpec) -> int:
        return spec.max_batch or self._config.batching.max_batch

    async def _serve(self, source: "_Source", served: Served) -> None:
        model = served.model
        before = self._engine.registry.serve(served)
        self._engine.metrics.serving(
            model.name, model.architecture, self._device.name, model.dtype, served.policy, served.rs, model.largest_r
        )
        self._sources[model.name] = source
        log.info("%s is in service%s", model.name, ", in the place of the one before" if before else "")
        if before:
            await self._engine.registry.left(before)
            await self._forget(before.key)

    async def _forget(self, key: str) -> None:
        del self._loaded[key]
        await self._device.unload(key)

    async def _take_out(self, name: str) -> None:
        served = self._engine.registry.retire(name)
        del self._sources[served.model.name]
        await self._engine.registry.left(served)
        self._engine.metrics.retired(served.model.name)
        await self._forget(served.key)
        log.info("unloaded %s", served.model.name)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@contextmanager
def _fits(what: str) -> Iterator[None]:
    """Raises ModelLoadError where the device runs out of memory."""
    try:
        yield
    except OutOfMemoryError as error:
        raise ModelLoadError(f"the device has not the memory for {what}: {error}") from error


@contextmanager
def _its_fault(spec: ModelSpec) -> Iterator[None]:
    """Raises ModelLoadError, naming the model's folder, for an error that isn't one of ours."""
    try:
        yield
    except (ConfigError, ModelLoadError, DeviceDiedError, OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("loading %s", spec.name, exc_info=True)
        where = spec.checkpoint.parent if spec.checkpoint else spec.architecture
        raise ModelLoadError(f"{where}: {type(error).__name__}: {error}") from error


def _log_fault(name: str, error: Exception, *, kept: bool = False) -> None:
    log.error("%s isn't loaded%s: %s", name, ", and stays as it was" if kept else "", error)


class _Source:
    """What a model is loaded from: its spec, and when its files were last written."""

    def __init__(self, spec: ModelSpec) -> None:
        """Raises ModelLoadError if a file is gone."""
        self.spec = spec
        with _its_fault(spec):
            self._written = [(path, path.stat().st_mtime_ns) for path in _files(spec)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and (self.spec, self._written) == (other.spec, other._written)

    __hash__ = None  # type: ignore[assignment]


def _files(spec: ModelSpec) -> Iterator[Path]:
    paths = (spec.checkpoint, spec.labels, spec.quality, spec.quality_bfloat16)
    return (path for path in paths if path and path.is_file())


def _overrides(spec: ModelSpec) -> ModelOverrides:
    return spec.overrides or ModelOverrides()
