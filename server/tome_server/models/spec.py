"""What to load: where a model's parts are. Knows nothing of torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tome_server.errors import ModelLoadError
from tome_server.models.bundled import BUNDLED

BUNDLED_PREFIX = "bundled:"


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


def bundled_spec(name: str) -> ModelSpec:
    """Return the spec of the bundled model `name` ("fashion"). Raises ModelLoadError if there is none."""
    folder = BUNDLED / name
    if not (folder / "config.yaml").is_file():
        known = sorted(path.parent.name for path in BUNDLED.glob("*/config.yaml"))
        raise ModelLoadError(f"no bundled model is named {name!r}; there is {', '.join(known)}")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    quality = folder / "quality.json"
    return ModelSpec(
        name=name,
        architecture=config["architecture"],
        kwargs=config["kwargs"],
        checkpoint=folder / "weights.safetensors",
        labels=folder / "labels.txt",
        quality=quality if quality.is_file() else None,
        data=config["data"],
        description=config["description"],
    )


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
