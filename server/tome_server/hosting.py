"""Which models are in service: all that are configured at the start, and single ones after that."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tome_server.config import ModelConfig, ServerConfig
from tome_server.engine import Engine, Served
from tome_server.errors import ConfigError
from tome_server.models.hosted import HostedModel
from tome_server.models.preprocess import Limits
from tome_server.models.repository import Repository
from tome_server.models.spec import BUNDLED_PREFIX, ModelSpec, bundled_spec
from tome_server.runtime.device import Device
from tome_server.served import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosting:
    """Brings models from where they are stored through the device into the engine, and back."""

    device: Device
    engine: Engine
    config: ServerConfig

    async def start(self, specs: Sequence[ModelSpec]) -> None:
        """Load and measure models, and serve them. Raises ModelLoadError, or ConfigError."""
        await self.device.open(self.config.device)
        if self.config.threads:
            await self.device.set_threads(self.config.threads)
        models = [await self._load(spec) for spec in specs]
        if not self.config.threads and self.device.name == "cpu":
            await self.device.choose_threads(self.config.batching.max_batch)
        served = [await self._measured(spec, model) for spec, model in zip(specs, models, strict=True)]
        # All at once: requests for the first would disturb what is measured of the second.
        for model in served:
            self._serve(model)

    async def load(self, spec: ModelSpec) -> None:
        """Load, measure and serve one more model, while others are served. Raises what `start` does.

        Requests for it are refused as UNAVAILABLE until it is ready. One of that name must not be in service.
        """
        self.engine.expect(spec.name)
        try:
            self._serve(await self._measured(spec, await self._load(spec)))
        except BaseException:
            self.engine.forget(spec.name)
            raise

    async def unload(self, name: str) -> None:
        """Take a model out of service: new requests are refused at once, those already here are answered first.

        Raises UnknownModelError if it isn't there, UnavailableError if it is loading.
        """
        await self.engine.retire(name)
        self.engine.metrics.retired(name)
        await self.device.unload(name)
        log.info("unloaded %s", name)

    async def _load(self, spec: ModelSpec) -> HostedModel:
        log.info("loading %s", spec.name)
        limits = self.config.limits
        return await self.device.load(spec, Limits(limits.max_image_bytes, limits.max_image_pixels))

    async def _measured(self, spec: ModelSpec, model: HostedModel) -> Served:
        max_batch, seconds = self.config.batching.max_batch, self.config.profile_time
        profile = await self.device.profile(spec, max_batch=max_batch, budget=seconds, folder=self.config.profiles)
        await self.device.warm(spec.name, max_batch=max_batch, seconds=seconds)
        return ServedModel(model, profile, self.config.policy)

    def _serve(self, served: Served) -> None:
        model = served.model
        self.engine.serve(served)
        self.engine.metrics.serving(model.name, model.architecture, self.device.name, served.rs, model.largest_r)


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
    return specs


def _spec(model: ModelConfig) -> ModelSpec:
    given = model.model_dump(exclude_unset=True, exclude={"source"})
    if model.source.startswith(BUNDLED_PREFIX):
        allowed = {"name", "default_budget", "description"}
        if extra := sorted(given.keys() - allowed):
            raise ConfigError(f"model {model.source} is complete as it is; {', '.join(extra)} can't be set")
        spec = bundled_spec(model.source.removeprefix(BUNDLED_PREFIX))
        return ModelSpec(**{**spec.__dict__, **given})
    return ModelSpec(architecture=model.source, **{"name": model.source.split(".")[0], **given})
