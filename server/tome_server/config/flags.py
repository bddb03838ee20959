"""Settings that flags give, in place of the defaults or of a file's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tome_server.config.server import ServerConfig, read_config
from tome_server.config.settings import faults
from tome_server.errors import ConfigError

_TOP = (
    "repository", "listen", "metrics", "device", "threads", "policy", "profiles", "profile_time", "log_format",
    "drain_timeout", "hung_device_timeout",
)  # fmt: skip
_BATCHING = ("max_batch", "max_delay", "max_pending")
_MODEL = ("checkpoint", "labels", "quality", "default_budget", "dtype")


def configured(file: Path | None, flags: Mapping[str, Any]) -> ServerConfig:
    """Return the settings of `file`, or else the defaults, overridden by flags.

    Args:
        file: A configuration file in YAML.
        flags: By name; those that are None were not given. Names that are no settings are ignored.

    Raises:
        ConfigError: A setting is wrong; the message names the flag, or the file and the line.
    """
    config = read_config(file) if file else ServerConfig()
    given = {name: value for name, value in flags.items() if value is not None}
    settings = config.model_dump()
    settings |= _of(_TOP, given)
    settings["batching"] |= _of(_BATCHING, given)
    settings["models"] = _models(config, given)
    try:
        return ServerConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{_flag(location[-1])}: {what}" for location, what in faults(error))) from error


def _models(config: ServerConfig, given: Mapping[str, Any]) -> list[Any]:
    """Return the models that the settings name: one of --model alone, or the file's, the first changed by flags."""
    changes = _of(_MODEL, given)
    if "model" in given:
        return [{"source": given["model"]} | changes]
    # A repository takes the place of the default.
    configured = config.models if "models" in config.model_fields_set or "repository" not in given else ()
    if not changes:
        return list(configured)
    if not configured:
        raise ConfigError(f"{_flag(next(iter(changes)))} is for one of `models` or --model, and there is none")
    first, *others = configured
    return [first.model_dump(exclude_unset=True) | changes, *others]


def _of(names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _flag(name: object) -> str:
    return f"--{str(name).replace('_', '-')}"
