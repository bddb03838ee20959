"""Makes the folder of a model in a repository, from the hub's weights, local ones, or a new head."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tome_api.durations import duration_text
from tome_server.config.dtypes import Dtype
from tome_server.config.text_file import read_text
from tome_server.errors import ModelLoadError
from tome_server.models.bundled import BUNDLED
from tome_server.models.head import Head
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import create, load, outline, put_weights
from tome_server.models.repository import OTHER_WEIGHTS, read_folder
from tome_server.models.spec import (
    BUNDLED_PREFIX,
    CONFIG,
    LABELS,
    PROFILES,
    WEIGHTS,
    ModelSpec,
    bundled_spec,
    quality_file,
)
from tome_server.models.weights.checkpoints import read_checkpoint
from tome_server.models.weights.importing import fitted, read_weights

CPU = torch.device("cpu")
_DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True)
class Recipe:
    """What to make a model from."""

    source: str
    """bundled:NAME, or timm's name of an architecture, with or without a tag."""
    weights: Path | None = None
    """A checkpoint or an ONNX export; None for timm's pretrained weights from the hub."""
    labels: Path | None = None
    """A file with one class name a line; None for ImageNet's names, if the classes are ImageNet's."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of timm's create_model. If left out, num_classes and img_size follow from the weights."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of timm's data config."""
    default_budget: float | None = None
    """Seconds."""
    license: str = ""
    description: str = ""


@dataclass(frozen=True)
class Prepared:
    """A model whose folder was made, and which was loaded from it as a proof."""

    spec: ModelSpec
    model: LoadedModel
    left_out: tuple[str, ...] = ()
    """Tensors of the file of weights that aren't part of the Vision Transformer."""


def prepare(recipe: Recipe, name: str, folder: Path) -> Prepared:
    """Fill the empty `folder` with the model that requests will call `name`.

    Raises:
        ModelLoadError: If the weights can't be read or downloaded or don't fit, or the model can't be served.
        ConfigError: If there is no such bundled model.
    """
    if recipe.source.startswith(BUNDLED_PREFIX):
        spec = bundled_spec(recipe.source.removeprefix(BUNDLED_PREFIX))
        shutil.copytree(BUNDLED / spec.name, folder, dirs_exist_ok=True)
        return _proved(folder, name)
    left_out: tuple[str, ...] = ()
    licensed = recipe.license
    # Raises for most faults, before weights are read or downloaded.
    spec = outline(
        ModelSpec(name=name, architecture=recipe.source, kwargs=dict(recipe.kwargs), checkpoint=recipe.weights)
    ).spec
    model = create(spec)
    if recipe.weights is None:
        licensed = licensed or str((getattr(model, "pretrained_cfg", None) or {}).get("license") or "")
    else:
        weights = read_weights(recipe.weights)
        put_weights(model, fitted(weights, model), recipe.weights, recipe.source)
        left_out = weights.left_out
    if recipe.labels:
        try:
            shutil.copyfile(recipe.labels, folder / LABELS)
        except OSError as error:
            raise ModelLoadError(f"labels {recipe.labels} can't be read: {error.strerror}") from error
    config = {
        "architecture": recipe.source,
        "kwargs": dict(spec.kwargs),
        "data": dict(recipe.data),
        "default_budget": None if recipe.default_budget is None else duration_text(recipe.default_budget),
        "license": licensed,
        "description": recipe.description,
    }
    _write_weights(folder, model.state_dict())
    _write_config(folder, config)
    prepared = _proved(folder, name)
    # timm may change the data config of a name, so all of it is written down.
    _write_config(folder, config | {"data": asdict(prepared.model.info.preprocess.settings)})
    if prepared.model.info.labels and not recipe.labels:
        write_labels(folder, prepared.model.info.labels)
    return replace(prepared, spec=read_folder(folder, name), left_out=left_out)


def headless_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Return a stored model's weights without its classifier.

    Raises ModelLoadError if they can't be read, or the classifier is more than one linear layer.
    """
    assert spec.checkpoint is not None
    weights = {key: value for key, value in read_checkpoint(spec.checkpoint).items() if not key.startswith("head.")}
    if other := sorted({key.split(".")[0] for key in weights if key.startswith("head")}):
        raise ModelLoadError(f"{spec.name} has a classifier of several parts ({', '.join(other)}): none can be fitted")
    return weights


def prepare_with_head(
    spec: ModelSpec, weights: Mapping[str, Tensor], head: Head, labels: Sequence[str], folder: Path
) -> Prepared:
    """Fill the empty `folder` with a stored model that has a new classifier.

    Args:
        spec: The stored model.
        weights: Its weights without a classifier.
        head: The new classifier.
        labels: The names of its classes.
        folder: Where the model is written.

    Raises:
        ModelLoadError: If the model can't be served.
    """
    assert spec.checkpoint is not None
    config = yaml.safe_load(read_text(spec.checkpoint.parent / CONFIG))
    config["kwargs"] = {**config.get("kwargs", {}), "num_classes": len(labels)}
    _write_weights(folder, {**weights, "head.weight": head.weight, "head.bias": head.bias})
    _write_config(folder, config)
    write_labels(folder, labels)
    return _proved(folder, spec.name)


def carry_over(spec: ModelSpec, folder: Path) -> None:
    """Copy the other files in a stored model's folder, such as a licence, into the folder that replaces it."""
    assert spec.checkpoint is not None
    made = {CONFIG, WEIGHTS, OTHER_WEIGHTS, LABELS, PROFILES, *(quality_file(folder, dtype).name for dtype in _DTYPES)}
    for path in spec.checkpoint.parent.iterdir():
        if path.name in made:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy2(path, folder / path.name, follow_symlinks=False)


def write_labels(folder: Path, labels: Sequence[str]) -> None:
    """Write the classes' names, one a line."""
    (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def _proved(folder: Path, name: str) -> Prepared:
    spec = read_folder(folder, name)
    return Prepared(spec, load(spec, CPU))


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    # safetensors makes files that only their owner can read, but the server may run as another user.
    (folder / WEIGHTS).chmod(0o644)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the settings that are set."""
    given = {key: _plain(value) for key, value in config.items() if value not in (None, "", {})}
    text = yaml.safe_dump(given, default_flow_style=None, width=120, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return `value` with lists in place of tuples, which YAML doesn't have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
