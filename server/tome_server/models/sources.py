"""Which models there are to serve: those that the settings name, and those of the repository. Doesn't import torch."""

from dataclasses import dataclass, replace

from tome_server.config.model_overrides import ModelOverrides
from tome_server.config.server import ModelConfig, ServerConfig
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.repository import Repository
from tome_server.models.spec import BUNDLED_PREFIX, ModelSpec, bundled_spec, qualities
from tome_server.models.timm_names import check_architecture
from tome_server.models.weights.checkpoint_header import check_header


@dataclass(frozen=True)
class FoundModels:
    """The models of the settings and of the repository."""

    specs: list[ModelSpec]
    """Those that can be loaded. The first answers requests that name no model."""
    configured: frozenset[str]
    """Names of the models of the settings; the others are the repository's."""
    faults: dict[str, ConfigError]
    """What keeps others from being loaded, by name."""


def find_models(config: ServerConfig, *, strict: bool = True) -> FoundModels:
    """Return what to load: the configured models in their order, then those of the repository in order of name.

    Only faults that show without torch are found, since importing it takes seconds.

    Args:
        config: The server's settings.
        strict: Whether to raise for a fault of a configured model. Otherwise it is returned like any other.

    Raises:
        ConfigError: If two models have the same name, the repository can't be read, or no model can be loaded; and for
            a fault of a configured model, if `strict`.
        ModelLoadError: For a fault of a configured model, if `strict`.
    """
    names = [_name(model) for model in config.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; give one another `name`")
    specs: list[ModelSpec] = []
    faults: dict[str, ConfigError] = {}
    for name, model in zip(names, config.models, strict=True):
        try:
            specs.append(checked(configured_spec(model), config))
        except (ConfigError, ModelLoadError) as error:
            if strict:
                raise
            faults[name] = ConfigError(str(error))
    if config.repository:
        contents = Repository(config.repository).scan()
        if not contents.specs and not contents.faults:
            raise ConfigError(f"repository {config.repository} holds no models; tome-server models add makes one")
        faults |= contents.faults
        for spec in contents.specs:
            try:
                if spec.name in names:
                    raise ConfigError(f"two models are named {spec.name!r}; give the configured one another `name`")  # noqa: TRY301
                specs.append(checked(spec, config))
            except (ConfigError, ModelLoadError) as error:
                faults[spec.name] = ConfigError(str(error))
    if not specs:
        raise ConfigError("\n".join(map(str, faults.values())))
    return FoundModels(specs, frozenset(names), faults)


def model_specs(config: ServerConfig) -> list[ModelSpec]:
    """Return the specs that `find_models` finds. Raises what `find_models` raises."""
    return find_models(config).specs


def checked(spec: ModelSpec, config: ServerConfig) -> ModelSpec:
    """Return `spec` as it is. Raises ConfigError or ModelLoadError for faults that show without torch."""
    check_architecture(spec.architecture)
    if spec.checkpoint is not None:
        check_header(spec.checkpoint)
    own, limit = spec.overrides.limits.max_image_bytes if spec.overrides else None, config.limits.max_image_bytes
    if own is not None and own > limit:
        what = f"{own:,} bytes is more than the server's {limit:,}, by which messages are bounded"
        raise spec.fault("limits.max_image_bytes", what)
    return spec


def _name(model: ModelConfig) -> str:
    return model.name or model.source.removeprefix(BUNDLED_PREFIX).split(".")[0]


def configured_spec(model: ModelConfig) -> ModelSpec:
    """Return what to load for a model of the settings. Raises ConfigError if settings conflict."""
    given = model.model_dump(exclude_unset=True, exclude={"source", *ModelOverrides.model_fields})
    if model.source.startswith(BUNDLED_PREFIX):
        allowed = {"name", "default_budget", "description", "dtype"}
        if extra := sorted(given.keys() - allowed):
            raise ConfigError(f"model {model.source} is complete as it is; {', '.join(extra)} can't be set")
        spec = bundled_spec(model.source.removeprefix(BUNDLED_PREFIX), model.dtype)
        return replace(spec, **given, overrides=model.overrides, file=None)
    if model.quality and model.dtype == "auto":
        given = qualities(model.quality, "auto") | given
    return ModelSpec(architecture=model.source, **{"name": _name(model), **given}, overrides=model.overrides)
