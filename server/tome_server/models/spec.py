"""What to load: where a model's parts are. Knows nothing of torch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from tome_server.errors import ConfigError
from tome_server.models.bundled import BUNDLED

BUNDLED_PREFIX = "bundled:"
CONFIG = "config.yaml"
LABELS = "labels.txt"
PROFILES = "profiles"
QUALITY = "quality.json"
WEIGHTS = "weights.safetensors"


Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Own:
    """How a model is served, as far as its own settings say; None leaves it to the server's, or to nobody."""

    policy: str | None = None
    max_batch: int | None = None
    max_delay: float | None = None
    """Seconds."""
    max_pending: int | None = None
    max_image_bytes: int | None = None
    max_image_pixels: int | None = None
    default_min_r: int | None = None
    """As a request might set it; likewise the next two."""
    default_max_r: int | None = None
    default_min_quality: float | None = None
    file: Path | None = None
    """Where they are written, if that is a file of the model's own."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], file: Path | None = None) -> "Own":
        """Return what a model's settings say, with `batching` and `limits` as sections of their own."""
        flat = {**settings, **settings.get("batching", {}), **settings.get("limits", {})}
        return cls(**{one.name: flat[one.name] for one in fields(cls) if one.name in flat}, file=file)

    def fault(self, model: str, setting: str, what: object) -> ConfigError:
        """Return the error that says what is wrong with a setting, and where it is."""
        return ConfigError(f"{self.file or f'model {model}'}: {setting}: {what}")


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
    """What `tome-server evaluate` or `tome-server tune` wrote."""
    schedules: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """By r, the tokens that each block merges there, beside those that `quality` holds."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    default_budget: float | None = None
    """Latency budget, in seconds, of requests that set none."""
    proportional_attention: bool | None = None
    """None: on, but for MAE weights."""
    dtype: Dtype = "float32"
    """Of weights and activations."""
    description: str = ""
    version: int | None = None
    """Of a model that has versions."""
    profiles: Path | None = None
    """Folder of latencies that came with the model; more may be kept elsewhere."""
    own: Own = Own()
    """How it is served, where that isn't as the server's settings have it."""


def quality_file(folder: Path, dtype: Dtype) -> Path:
    """Return where a model's folder keeps what `tome-server evaluate` measured of it in `dtype`."""
    return folder / (QUALITY if dtype == "float32" else f"{Path(QUALITY).stem}-{dtype}.json")


def bundled_spec(name: str, dtype: Dtype = "float32") -> ModelSpec:
    """Return the spec of the bundled model `name` ("fashion"). Raises ConfigError if there is none."""
    known = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))
    if name not in known:
        raise ConfigError(f"no bundled model is named {name!r}; there is {', '.join(known)}")
    folder = BUNDLED / name
    # A repository's folder, read without its checks: those take pydantic, which not all who want this model have.
    quality = quality_file(folder, dtype)
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    return ModelSpec(
        name=name,
        architecture=config["architecture"],
        kwargs=config["kwargs"],
        checkpoint=folder / WEIGHTS,
        labels=folder / LABELS,
        quality=quality if quality.is_file() else None,
        dtype=dtype,
        profiles=folder / PROFILES,
        data=config["data"],
        description=config["description"],
        own=Own.of(config, folder / CONFIG),
    )


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
