"""What to load: where a model's parts are, and the folder that holds them. Knows nothing of torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tome_server.errors import ConfigError
from tome_server.models.bundled import BUNDLED
from tome_server.settings import Duration, Strict, read_settings

BUNDLED_PREFIX = "bundled:"
CONFIG = "config.yaml"
LABELS = "labels.txt"
PROFILES = "profiles"
QUALITY = "quality.json"
WEIGHTS = "weights.safetensors"
# What torch wrote. Read with weights_only, so that no code in it is run.
OTHER_WEIGHTS = "weights.pth"

# timm's create_model would fetch or read other weights for these, or build something that gives no classes.
_FORBIDDEN = frozenset({
    "cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_strict",
})  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """What to load."""

    name: str
    """What requests call it."""
    architecture: str
    """timm's name, with or without a tag."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of timm's create_model."""
    checkpoint: Path | None = None
    """Local weights (.safetensors, or .pth read with weights_only); None takes timm's pretrained ones from the hub."""
    labels: Path | None = None
    """One class name a line; None takes ImageNet's where the classes are ImageNet's."""
    quality: Path | None = None
    """What `tome-server evaluate` wrote."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    default_budget: float | None = None
    """Latency budget, in seconds, of requests that set none."""
    proportional_attention: bool | None = None
    """None: on, but for MAE weights."""
    description: str = ""
    version: int | None = None
    """Of a model that has versions."""
    profiles: Path | None = None
    """Folder of latencies that came with the model; more may be kept elsewhere."""


def _kwargs(value: dict[str, Any]) -> dict[str, Any]:
    if forbidden := sorted(value.keys() & _FORBIDDEN):
        raise ValueError(f"{', '.join(forbidden)} can't be set: the weights are those beside this file")
    return value


class VersionConfig(Strict):
    """What `config.yaml` says of a model."""

    architecture: str
    """timm's name, with or without a tag."""
    kwargs: Annotated[dict[str, Any], AfterValidator(_kwargs)] = Field(default_factory=dict)
    """Further arguments of timm's create_model."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Overrides of timm's data config."""
    default_budget: Annotated[Duration, Field(gt=0)] | None = None
    """Latency budget of requests that set none; by default 1s, or ten images' time if that is more."""
    proportional_attention: bool | None = None
    """Weigh tokens by the patches they stand for; by default on, except for MAE weights."""
    license: str = ""
    description: str = ""


def read_folder(folder: Path, name: str, version: int | None = None) -> ModelSpec:
    """Return what to load for the model in `folder`, which requests will call `name`.

    Raises ConfigError, naming file and field, if config.yaml or the weights are missing, or config.yaml is wrong.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is no model: there is no {CONFIG} in it, and no folder of a version")
    config = read_settings(folder / CONFIG, VersionConfig)
    weights = [folder / file for file in (WEIGHTS, OTHER_WEIGHTS) if (folder / file).is_file()]
    if len(weights) != 1:
        what = f"only one of {WEIGHTS} and {OTHER_WEIGHTS} may be" if weights else f"no {WEIGHTS} is"
        raise ConfigError(f"{folder}: {what} there")
    return ModelSpec(
        name=name,
        version=version,
        architecture=config.architecture,
        kwargs=config.kwargs,
        checkpoint=weights[0],
        labels=_if_there(folder / LABELS),
        quality=_if_there(folder / QUALITY),
        profiles=folder / PROFILES,
        data=config.data,
        default_budget=config.default_budget,
        proportional_attention=config.proportional_attention,
        description=config.description,
    )


def bundled_spec(name: str) -> ModelSpec:
    """Return the spec of the bundled model `name` ("fashion"). Raises ConfigError if there is none."""
    known = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))
    if name not in known:
        raise ConfigError(f"no bundled model is named {name!r}; there is {', '.join(known)}")
    return read_folder(BUNDLED / name, name)


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
