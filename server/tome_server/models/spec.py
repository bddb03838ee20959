"""What to load: where a model's parts are. Doesn't import torch."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tome_api.nearest import meant
from tome_server.config.dtypes import Dtype, DtypeSetting
from tome_server.config.text_file import open_regular, read_text
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.bundled import BUNDLED

if TYPE_CHECKING:
    # It takes pydantic, which the bundled model does without.
    from tome_server.config.model_overrides import ModelOverrides

BUNDLED_PREFIX = "bundled:"
CONFIG = "config.yaml"
LABELS = "labels.txt"
PROFILES = "profiles"
QUALITY = "quality.json"
WEIGHTS = "weights.safetensors"


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
    """Local weights (.safetensors, or .pth read with weights_only); None for timm's pretrained ones from the hub."""
    labels: Path | None = None
    """A file with one class name a line; None for ImageNet's names, if the classes are ImageNet's."""
    quality: Path | None = None
    """A report of `tome-server evaluate` or `tome-server tune` in the model's dtype, or in float32 if that is auto."""
    quality_bfloat16: Path | None = None
    """A report in bfloat16, if dtype is auto: bfloat16 is only chosen if this shows that it agrees with float32."""
    schedules: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """By r, the tokens that each block merges, in addition to the schedules in `quality`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    default_budget: float | None = None
    """Latency budget, in seconds, of requests that set none."""
    proportional_attention: bool | None = None
    """None means on, except for MAE weights."""
    dtype: DtypeSetting = "auto"
    """Of weights and activations. `calibration.choose_dtype` decides what auto is; everywhere else it is float32."""
    description: str = ""
    version: int | None = None
    """None for a model without versions."""
    profiles: Path | None = None
    """Folder of profiles that came with the model; others may be kept elsewhere."""
    overrides: "ModelOverrides | None" = None
    """The model's settings that take the place of the server's; None if there are none."""
    file: Path | None = None
    """The model's own file of settings, if there is one."""

    @property
    def max_batch(self) -> int | None:
        """The largest batch by the model's own settings; None leaves it to the server's."""
        return self.overrides.batching.max_batch if self.overrides else None

    def fault(self, setting: str, what: object) -> ConfigError:
        """Return the error that says what is wrong with one of the model's own settings, and where it is set."""
        return ConfigError(f"{self.file or f'model {self.name}'}: {setting}: {what}")


@dataclass(frozen=True)
class Outline:
    """What is known about a model without its weights."""

    spec: ModelSpec
    """Completed by arguments of create_model that follow from the checkpoint."""
    rs: tuple[int, ...] = ()
    """The r grid; empty if timm can't build the model without memory for its weights."""


def quality_file(folder: Path, dtype: DtypeSetting) -> Path:
    """Return where a model's folder keeps the report of `tome-server evaluate` in `dtype`."""
    return quality_beside(folder / QUALITY, dtype)


def quality_beside(report: Path, dtype: str) -> Path:
    """Return where the counterpart in `dtype` of a report in float32 is kept; for auto, that is the report itself."""
    return report if dtype in ("auto", "float32") else report.with_stem(f"{report.stem}-{dtype}")


def in_dtype(spec: ModelSpec, dtype: Dtype) -> ModelSpec:
    """Return `spec` with `dtype` in place of auto, and the quality report of that dtype."""
    quality = spec.quality_bfloat16 if dtype == "bfloat16" else spec.quality if dtype == "float32" else None
    return replace(spec, dtype=dtype, quality=quality, quality_bfloat16=None)


def bundled_spec(name: str, dtype: DtypeSetting = "auto") -> ModelSpec:
    """Return the spec of the bundled model `name` ("fashion"). Raises ConfigError if there is none."""
    known = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))
    if name not in known:
        raise ConfigError(f"no bundled model is named {name!r}; there is {', '.join(known)}{meant(name, known)}")
    folder = BUNDLED / name
    # Like a folder of a repository, but without its checks: they take pydantic, which isn't always installed where
    # benchmarks and tests run this model. It has no overrides.
    config = yaml.safe_load(read_text(folder / CONFIG))
    return ModelSpec(
        name=name,
        architecture=config["architecture"],
        kwargs=config["kwargs"],
        checkpoint=folder / WEIGHTS,
        labels=folder / LABELS,
        **qualities(folder / QUALITY, dtype),
        dtype=dtype,
        profiles=folder / PROFILES,
        data=config["data"],
        description=config["description"],
        file=folder / CONFIG,
    )


def qualities(report: Path, dtype: DtypeSetting) -> dict[str, Any]:
    """Return the fields of a ModelSpec for the quality reports that exist: `report` in float32, others beside it."""
    found = {"quality": quality_beside(report, dtype)}
    if dtype == "auto":
        found["quality_bfloat16"] = quality_beside(report, "bfloat16")
    return {name: path for name, path in found.items() if path.is_file()}


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint in hexadecimal. Raises ModelLoadError if it can't be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"checkpoint {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"checkpoint {path} can't be read: {error}") from error
