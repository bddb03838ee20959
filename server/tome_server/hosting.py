"""Which models are in service: those configured at the start, and single ones after that."""

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tome_server.batches import Served
from tome_server.config import ModelConfig, ServerConfig
from tome_server.engine import Engine
from tome_server.errors import ConfigError, ModelLoadError, OutOfMemoryError, UnknownModelError
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import Limits
from tome_server.models.repository import Repository
from tome_server.models.spec import BUNDLED_PREFIX, ModelSpec, Own, bundled_spec, qualities
from tome_server.runtime.device import Device
from tome_server.served import ServedModel

log = logging.getLogger(__name__)

# Seconds for which empty images are run before a model is served, so that its first predictions are right.
OBSERVED_FOR = 2.0


class Hosting:
    """Brings models from where they are stored through the device into the engine, and back."""

    def __init__(self, device: Device, engine: Engine, config: ServerConfig) -> None:
        """The engine expects the models of `model_specs(config)`."""
        self._device = device
        self._engine = engine
        self._config = config
        self._versions = itertools.count(1)
        # Bytes of weights of each model on the device, by its key there.
        self._loaded: dict[str, int] = {}
        # Of each model in service, what it was loaded from.
        self._sources: dict[str, _Source] = {}
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Load and measure the configured models, and serve them. Raises ModelLoadError or ConfigError."""
        async with self._changing:
            await self._start()

    async def load(self, name: str) -> None:
        """Take a model into service as it is stored now; if it is in service, in the place of what is.

        No request is dropped: until the new one is ready the old one answers, or if there is none UnavailableError is
        given. Raises UnknownModelError if neither the configuration nor the repository has it, ConfigError or
        ModelLoadError if it can't be loaded; what was in service stays so.
        """
        async with self._changing:
            await self._replace(_Source(await asyncio.to_thread(self._stored, name)))

    async def unload(self, name: str) -> None:
        """Take a model out of service: new requests are refused at once, those already here are answered first.

        Raises UnknownModelError if it isn't there, UnavailableError if it is loading.
        """
        async with self._changing:
            await self._take_out(name)

    async def refresh(self) -> None:
        """Serve what the configuration and the repository hold now: what is new, changed or gone since.

        What can't be loaded is logged, and what was in service in its place stays so.
        """
        async with self._changing:
            try:
                sources = {spec.name: _Source(spec) for spec in model_specs(self._config)}
            except ConfigError as error:
                log.error("models stay as they are: %s", error)  # noqa: TRY400  (in words for the operator)
                return
            for name, source in sources.items():
                if self._sources.get(name) == source:
                    continue
                try:
                    await self._replace(source)
                except (ConfigError, ModelLoadError) as error:
                    log.error("%s isn't loaded: %s", name, error)  # noqa: TRY400
            for name in self._sources.keys() - sources.keys():
                await self._take_out(name)

    async def _start(self) -> None:
        log.info("starting the process that runs the models")
        await self._device.open(self._config.device)
        sources = [_Source(spec) for spec in model_specs(self._config)]
        # First, since models are made, and what else is chosen is measured, for so many.
        if self._config.threads:
            await self._device.set_threads(self._config.threads)
        elif self._device.name == "cpu":
            models = [(source.spec, self._max_batch(source.spec)) for source in sources]
            with _fits("one of the models, each in batches of its largest size"):
                await self._device.choose_threads(models, self._config.profiles)
        loaded = [await self._load(source.spec) for source in sources]
        measured = [await self._measured(*each) for each in loaded]
        # All at once: requests for the first would disturb what is measured of the second.
        for source, served in zip(sources, measured, strict=True):
            await self._serve(source, served)

    def _stored(self, name: str) -> ModelSpec:
        """Return what a model is loaded from. Raises UnknownModelError, or ConfigError for a faulty one."""
        for model in self._config.models:
            if (spec := _spec(model)).name == name:
                return _checked(spec, self._config)
        repository = Repository(self._config.repository) if self._config.repository else None
        if repository is None or name not in repository.names():
            known = dict.fromkeys([*self._engine.names, *(repository.names() if repository else ())])
            raise UnknownModelError(name[:100], list(known))
        return _checked(repository.spec(name), self._config)

    async def _replace(self, source: "_Source") -> None:
        name = source.spec.name
        new = name not in self._engine.names
        if new:
            self._engine.expect(name)
        try:
            await self._serve(source, await self._measured(*await self._load(source.spec)))
        except BaseException:
            if new:
                self._engine.forget(name)
            raise

    async def _load(self, spec: ModelSpec) -> tuple[str, ModelSpec, HostedModel]:
        log.info("loading %s", spec.name)
        key, limits, own = f"{spec.name}#{next(self._versions)}", self._config.limits, spec.own
        bounds = Limits(own.max_image_bytes or limits.max_image_bytes, own.max_image_pixels or limits.max_image_pixels)
        # Room for images that wait, and for those whose callers have gone while they are decoded or run.
        pending = min(own.max_pending or self._engine.max_pending, self._engine.max_pending)
        slots = pending + self._engine.decode_threads + self._max_batch(spec)
        with _fits(spec.name):
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

    async def _measured(self, key: str, spec: ModelSpec, model: HostedModel) -> Served:
        max_batch, seconds = self._max_batch(spec), self._config.profile_time
        try:
            with _fits(f"{spec.name}, in batches of up to {max_batch} images"):
                await self._device.record(key, max_batch=max_batch, memory=self._config.cuda_graph_memory)
                profile = await self._device.profile(
                    key, spec, max_batch=max_batch, budget=seconds, folder=self._config.profiles
                )
                log.info("warming up %s, for at most %.0f s", spec.name, seconds)
                await self._device.warm(key, max_batch=max_batch, seconds=seconds)
            served: Served = ServedModel(model, profile, self._config.policy, key, spec.own)
            await self._observed(served)
        except Exception:
            await self._forget(key)
            raise
        return served

    async def _observed(self, served: Served) -> None:
        """Have a model's predictions start from what batches take now, and not when its profile was measured."""
        latency, level, end = served.scheduler.latency, served.scheduler.latency.levels - 1, _now() + OBSERVED_FOR
        while not latency.observed and _now() < end:
            latency.observe([level], await self._device.probe(served.key, served.rs[level]))

    def _max_batch(self, spec: ModelSpec) -> int:
        return spec.own.max_batch or self._config.batching.max_batch

    async def _serve(self, source: "_Source", served: Served) -> None:
        model = served.model
        before = self._engine.serve(served)
        self._engine.metrics.serving(
            model.name, model.architecture, self._device.name, model.dtype, served.policy, served.rs, model.largest_r
        )
        self._sources[model.name] = source
        log.info("%s is in service%s", model.name, ", in the place of the one before" if before else "")
        if before:
            await self._engine.left(before)
            await self._forget(before.key)

    async def _forget(self, key: str) -> None:
        del self._loaded[key]
        await self._device.unload(key)

    async def _take_out(self, name: str) -> None:
        served = self._engine.retire(name)
        del self._sources[served.model.name]
        await self._engine.left(served)
        self._engine.metrics.retired(served.model.name)
        await self._forget(served.key)
        log.info("unloaded %s", served.model.name)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@contextmanager
def _fits(what: str) -> Iterator[None]:
    """Raises ModelLoadError where the device runs out of memory."""
    try:
        yield
    except OutOfMemoryError as error:
        raise ModelLoadError(f"the device has not the memory for {what}: {error}") from error


class _Source:
    """What a model is loaded from, and when the files of that were written."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._written = [(path, path.stat().st_mtime_ns) for path in _files(spec)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and (self.spec, self._written) == (other.spec, other._written)

    __hash__ = None  # type: ignore[assignment]


def _files(spec: ModelSpec) -> Iterator[Path]:
    paths = (spec.checkpoint, spec.labels, spec.quality, spec.quality_bfloat16)
    return (path for path in paths if path and path.is_file())


def model_specs(config: ServerConfig) -> list[ModelSpec]:
    """Return what to load: the configured models, then those of the repository in order of name.

    Raises ConfigError if two have the same name, or the repository holds none or one that can't be loaded.
    """
    specs = [_spec(model) for model in config.models]
    if config.repository:
        stored = Repository(config.repository).scan()
        if not stored:
            raise ConfigError(f"repository {config.repository} holds no models; tome-server models add makes one")
        specs += stored
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; give one another `name`")
    return [_checked(spec, config) for spec in specs]


def _checked(spec: ModelSpec, config: ServerConfig) -> ModelSpec:
    """Return `spec`. Raises ConfigError if a setting of its own can't be met by the server's."""
    own, most = spec.own.max_image_bytes, config.limits.max_image_bytes
    if own is not None and own > most:
        what = f"{own:,} bytes is more than the server's {most:,}, by which messages are bounded"
        raise spec.own.fault(spec.name, "limits.max_image_bytes", what)
    return spec


# Settings of a model that `Own` holds.
_OWN = {"policy", "batching", "limits", "default_min_r", "default_max_r", "default_min_quality"}


def _spec(model: ModelConfig) -> ModelSpec:
    settings = model.model_dump(exclude_unset=True, exclude={"source"})
    given = {name: value for name, value in settings.items() if name not in _OWN} | {"own": Own.of(settings)}
    if model.source.startswith(BUNDLED_PREFIX):
        allowed = {"name", "default_budget", "description", "dtype"}
        if extra := sorted(given.keys() - allowed - {"own"}):
            raise ConfigError(f"model {model.source} is complete as it is; {', '.join(extra)} can't be set")
        spec = bundled_spec(model.source.removeprefix(BUNDLED_PREFIX), model.dtype)
        return ModelSpec(**{**spec.__dict__, **given})
    if model.quality and model.dtype == "auto":
        given = qualities(model.quality, "auto") | given
    return ModelSpec(architecture=model.source, **{"name": model.source.split(".")[0], **given})
