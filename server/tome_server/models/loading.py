"""Loads what is to be served: the bundled model, a timm architecture with pretrained weights, or a local checkpoint."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tome_server.config.text_file import read_text
from tome_server.errors import ModelLoadError
from tome_server.merging import MergedModel, UnsupportedModelError, merge, pack, packable
from tome_server.merging.cpu.packing import LEAST_GAIN, division_gain, few_threads
from tome_server.merging.families.eva import fix_positions
from tome_server.merging.geometry import default_size, patch_grid
from tome_server.merging.support import check_supported
from tome_server.models.loaded import LoadedModel, loaded_model, with_schedules
from tome_server.models.model_info import Quality
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.spec import ModelSpec, Outline, in_dtype, weights_digest
from tome_server.models.timm_names import check_architecture
from tome_server.models.transform import CROP_MODES, INTERPOLATIONS, ImageSettings
from tome_server.models.weights.importing import Imported, fitted, inferred, outline_weights, read_weights

log = logging.getLogger(__name__)

# Largest difference between timm's logits and ours at r = 0, as a share of the largest logit, that rounding explains.
EQUAL = 1e-4
# Share of images whose class a lesser dtype than float32 leaves alone; fewer is said, and never chosen unasked.
LEAST_AGREEMENT = 0.995
# More than any model has; a mistyped number would otherwise be found out by memory that runs out.
MOST_BLOCKS = 1000
# Pixels to a side of what any model takes.
LONGEST_SIDE = 8192
# Tokens to an image, of which the largest of timm's models have a third.
MOST_PATCHES = 2**14
# Between what timm's models have (0.875 to 1.15) and what is no share of an image.
CROP_PCT = (0.1, 2.0)
# A quality report, and by r what was measured and the schedules, where there are any.
_Report: TypeAlias = tuple[dict[str, Any], dict[int, Quality], dict[int, tuple[int, ...]]]
# Returns what a function that measures returns, or what it returned before.
Recall: TypeAlias = Callable[[Callable[[], float]], float]


def load(
    spec: ModelSpec, device: torch.device, limits: Limits | None = None, *, recall: Recall = lambda measure: measure()
) -> LoadedModel:
    """Load a model onto `device` and prove that it gives timm's own answer at r = 0. A dtype of auto is float32 here.

    On a CPU it is made for as many threads as torch is set to; `recall` may know what these gain by dividing a single
    image among them. Raises ModelLoadError, in words for the operator, if any part of the spec can't be had or doesn't
    fit.
    """
    if spec.dtype == "auto":
        spec = in_dtype(spec, "float32")
    with _said_where(spec):
        return _load(spec, device, limits or Limits(), recall)


def _load(spec: ModelSpec, device: torch.device, limits: Limits, recall: Recall) -> LoadedModel:
    spec = outline(spec).spec  # what can be told without weights is said before they are read or downloaded
    model = create(spec)
    if spec.checkpoint is not None:
        weights = read_weights(spec.checkpoint)
        put_weights(model, fitted(weights, model), spec.checkpoint, spec.architecture)
        if weights.left_out:
            log.info("%s: %d tensors are no part of the model and are left out", spec.checkpoint, len(weights.left_out))
    model = model.to(device).eval().requires_grad_(False)
    merged = merge(model, proportional_attention=spec.proportional_attention)
    plain = merged.model
    settings = _settings(spec, model)
    gain = None
    if spec.dtype == "float32":
        merged, gain = _packed(merged, recall)
    _check_equal(plain, merged, settings, device)
    # Only now, for the rounding of lesser types would hide what the check looks for.
    merged = merged.to(getattr(torch, spec.dtype))
    if spec.dtype != "float32":
        _check_finite(merged.model, f"{spec.checkpoint or spec.architecture} in {spec.dtype}")
        merged, gain = _packed(merged, recall)
    quality, schedules = _quality(spec)
    loaded = loaded_model(merged, Preprocess(settings, limits), name=spec.name, architecture=spec.architecture)
    info = replace(
        loaded.info,
        version=spec.version or 1,
        description=spec.description,
        labels=_labels(spec, model),
        # Packed weights have another layout, but the same size.
        weights_bytes=sum(part.nbytes for part in (*plain.parameters(), *plain.buffers())),
        default_budget=spec.default_budget,
        quality=quality,
    )
    try:
        loaded = with_schedules(replace(loaded, info=info, division_gain=gain), {**schedules, **spec.schedules})
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"{spec.quality or spec.name}: {error}") from error
    # Last, since positions are fixed in the dtype that they have then.
    fix_positions(merged.model, info.patch_grid)
    return loaded


def outline(spec: ModelSpec) -> Outline:
    """Find out what can be known of a model without reading, downloading or making room for its weights.

    Raises ModelLoadError, in words for the operator, for whatever is wrong by then: the architecture's name, what can't
    be merged, tensors that don't fit as their file's header has them, labels, settings of images, the quality report.
    """
    with _said_where(spec):
        return _outline(spec)


@contextmanager
def _said_where(spec: ModelSpec) -> Iterator[None]:
    """Have what is wrong with a model that has a folder of its own begin with that, where it doesn't name it."""
    try:
        yield
    except ModelLoadError as error:
        folder = spec.file.parent if spec.file else None
        if folder is None or str(folder) in str(error):
            raise
        raise ModelLoadError(f"{folder}: {error}") from error


def _outline(spec: ModelSpec) -> Outline:
    check_architecture(spec.architecture)
    _check_data(spec)
    depth = spec.kwargs.get("depth")
    if isinstance(depth, int) and depth > MOST_BLOCKS:
        raise ModelLoadError(f"{spec.name}: depth is {depth}, and no model has more than {MOST_BLOCKS} blocks")
    if spec.quality is not None:
        _read_report(spec.quality)
    weights = None
    if spec.checkpoint is not None:
        weights = outline_weights(spec.checkpoint)
        spec = replace(spec, kwargs={**inferred(spec.architecture, spec.kwargs, weights), **spec.kwargs})
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.architecture, **dict(spec.kwargs)).eval()
    except Exception:  # not every architecture can be built without memory; what is wrong shows in building it for real
        return Outline(spec)
    try:
        check_supported(model)
    except UnsupportedModelError as error:
        raise ModelLoadError(f"{spec.architecture} can't be merged: {error}") from error
    if weights is not None and (tensors := _without_values(weights, model)):
        _check_fit(model, tensors, weights.path, spec.architecture)
    if spec.labels is None or not spec.labels.is_fifo():  # a pipe, as of `<(command)`, can be read but once
        _labels(spec, model)
    settings = _settings(spec, model)
    patches = math.prod(patch_grid(model, *settings.input_size[1:]))
    if not 0 < patches <= MOST_PATCHES:
        size = "×".join(map(str, settings.input_size[1:]))
        raise ModelLoadError(f"{spec.name}: images of {size} pixels are {patches:,} patches, not 1 to {MOST_PATCHES:,}")
    try:
        merged = merge(model, proportional_attention=spec.proportional_attention)
        loaded = loaded_model(merged, Preprocess(settings, Limits()), name=spec.name, architecture=spec.architecture)
        return Outline(spec, loaded.info.rs)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{spec.name} fails on an input of {list(settings.input_size)}: {error}") from error


def _without_values(weights: Imported, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return what `fitted` does, without values; None where timm needs them to convert it."""
    outlined = {name: tensor.to("meta") for name, tensor in weights.tensors.items()}
    try:
        return fitted(replace(weights, tensors=outlined), model)
    except ModelLoadError:
        return None


def _packed(merged: MergedModel, recall: Recall) -> tuple[MergedModel, float | None]:
    """Return `merged` with packed weights if it can have them, and by what gain few threads divide single images."""
    if not packable(merged):
        return merged, None
    if not few_threads():
        return pack(merged), None
    gain = recall(partial(division_gain, merged))
    return pack(merged, divided=gain >= LEAST_GAIN), gain


def create(spec: ModelSpec) -> VisionTransformer:
    """Build timm's model: with pretrained weights from the hub or, where there is a checkpoint, with random ones.

    Raises ModelLoadError if there is none of that name, it can't be merged, or the hub can't be reached.
    """
    check_architecture(spec.architecture)
    try:
        model: VisionTransformer = timm.create_model(
            spec.architecture, pretrained=spec.checkpoint is None, **dict(spec.kwargs)
        )
        check_supported(model)
    except UnsupportedModelError as error:
        raise ModelLoadError(f"{spec.architecture} can't be merged: {error}") from error
    except Exception as error:
        # Whatever the hub's client raises without a network, or timm for arguments that don't fit.
        if spec.checkpoint:
            # torch's own errors go on with a trace of its C++ code.
            why = str(error).partition("\n")[0] or repr(error)
            raise ModelLoadError(f"{spec.architecture} can't be built: {why}") from error
        raise ModelLoadError(
            f"{spec.architecture} can't be built with pretrained weights from the hub: {str(error).rstrip('.')}. "
            "Where the hub can't be reached, give local weights with --checkpoint"
        ) from error
    return model


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Put the weights that came from `path` into a model.

    Raises ModelLoadError unless they fit to the last tensor and each of their values is a number.
    """
    _check_fit(model, weights, path, architecture)
    model.load_state_dict(weights)
    _check_finite(model, f"checkpoint {path}")


def _check_fit(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Raises ModelLoadError unless tensors, with or without values, have the names, shapes and kind of the model's."""
    wanted = model.state_dict()
    both = [key for key in wanted if key in weights]
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": [
            f"{key} {list(weights[key].shape)} for {list(wanted[key].shape)}"
            for key in both
            if weights[key].shape != wanted[key].shape
        ],
        "not of floating point": [
            key for key in both if wanted[key].is_floating_point() and not weights[key].is_floating_point()
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_first(keys)}" for what, keys in problems.items() if keys)
        raise ModelLoadError(f"checkpoint {path} doesn't fit {architecture}: {listed}")


def _check_finite(model: nn.Module, what: str) -> None:
    """Raises ModelLoadError, naming the tensor, for weights that hold NaN or infinity."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            held = "NaN" if value.isnan().any() else "infinity"
            raise ModelLoadError(f"{what}: {name} holds {held}; such weights give no answer")


def _first(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _labels(spec: ModelSpec, model: VisionTransformer) -> tuple[str, ...]:
    if spec.labels is not None:
        try:
            labels = tuple(read_text(spec.labels).removesuffix("\n").split("\n"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ModelLoadError(f"labels {spec.labels} can't be read: {why}") from error
        if len(labels) != model.num_classes:
            raise ModelLoadError(f"{spec.labels} has {len(labels)} labels; {spec.name} has {model.num_classes} classes")
        return labels
    subset = infer_imagenet_subset(model)
    if subset is None:
        return ()
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(i) for i in range(model.num_classes))


def recorded_agreement(spec: ModelSpec) -> tuple[float, int]:
    """Return the share of images that get the same class at r = 0 as in float32, and how many were compared.

    Raises ModelLoadError if the quality report can't be read, or is of other weights or another dtype than the spec's.
    """
    report, levels, _ = _own_report(spec)
    try:
        return levels[0].agreement, int(report["images"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"quality report {spec.quality} can't be read: {error!r}") from error


def stored_schedules(spec: ModelSpec) -> dict[int, tuple[int, ...]]:
    """Return the schedules in the model's quality report, none if it can't be read or is of other weights."""
    if spec.quality is None:
        return {}
    try:
        report, _, schedules = _read_report(spec.quality)
    except ModelLoadError:
        return {}
    return schedules if _of_its_weights(report, spec) else {}


def _read_report(path: Path) -> _Report:
    try:
        report = json.loads(read_text(path))
        levels = {int(level["r"]): _level_quality(level) for level in report["levels"]}
        schedules = {int(level["r"]): tuple(level["schedule"]) for level in report["levels"] if "schedule" in level}
    except OSError as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error!r}") from error
    return report, levels, schedules


def _of_its_weights(report: Mapping[str, Any], spec: ModelSpec) -> bool:
    if spec.checkpoint is not None:
        return report.get("weights_sha256") == weights_digest(spec.checkpoint)
    return report.get("weights_sha256") is None and report.get("model") == spec.architecture


def _own_report(spec: ModelSpec) -> _Report:
    """Raises ModelLoadError unless the report is of the spec's weights and dtype."""
    assert spec.quality is not None
    report, levels, schedules = _read_report(spec.quality)
    if not _of_its_weights(report, spec):
        raise ModelLoadError(
            f"quality report {spec.quality} was measured on other weights than "
            f"{spec.checkpoint or spec.architecture}; run tome-server evaluate again"
        )
    if (measured := report.get("dtype", "float32")) != spec.dtype:
        raise ModelLoadError(
            f"quality report {spec.quality} was measured in {measured}, not {spec.dtype}; "
            "run tome-server evaluate again"
        )
    return report, levels, schedules


def _quality(spec: ModelSpec) -> tuple[dict[int, Quality], dict[int, tuple[int, ...]]]:
    if spec.quality is None:
        return {}, {}
    _, levels, schedules = _own_report(spec)
    if spec.dtype != "float32" and 0 in levels and levels[0].agreement < LEAST_AGREEMENT:
        log.warning("%s in %s agrees with float32 on only %.2f %% of the images it was evaluated on",
                    spec.name, spec.dtype, 100 * levels[0].agreement)  # fmt: skip
    return levels, schedules


def _level_quality(level: Mapping[str, Any]) -> Quality:
    top1 = level.get("top1")
    return Quality(_share(level["agreement"]), None if top1 is None else _share(top1))


def _share(value: Any) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is no share of images")
    return share


def _check_data(spec: ModelSpec) -> None:
    """Raises ModelLoadError, by name, for overrides of timm's data config that no model can mean.

    timm itself takes 0 for a setting that was left out, and most other numbers as they are.
    """
    valid = [setting.name for setting in fields(ImageSettings)]
    if unknown := sorted(spec.data.keys() - set(valid)):
        raise ModelLoadError(f"data of {spec.name}: {', '.join(unknown)} is none of {', '.join(valid)}")
    least, most = CROP_PCT
    accepted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "input_size": (
            lambda size: _numbers(size, 3, 3) and all(type(n) is int and 1 <= n <= LONGEST_SIDE for n in size),
            f"input_size is [channels, height, width], whole numbers of 1 to {LONGEST_SIDE}",
        ),
        "mean": (
            lambda mean: _numbers(mean) and all(0 <= n <= 1 for n in mean),
            "mean and std are lists of one number a channel, of pixels from 0 to 1; a mean lies in 0..1",
        ),
        "std": (
            lambda std: _numbers(std) and all(0 < n <= 1 for n in std),
            "mean and std are lists of one number a channel, of pixels from 0 to 1; no std may be 0, or above 1",
        ),
        "crop_pct": (
            lambda share: _numbers([share]) and least <= share <= most,
            f"crop_pct is the share of the image that is kept, a number of {least:g} to {most:g}",
        ),
        "interpolation": (lambda name: name in INTERPOLATIONS, f"is none of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (lambda mode: mode in CROP_MODES, f"is none of {', '.join(CROP_MODES)}"),
    }
    for name, value in spec.data.items():
        fits, what = accepted[name]
        if not fits(value):
            said = f"{name}: {value!r} {what}" if what.startswith("is ") else f"{name}: {value!r} won't do: {what}"
            raise ModelLoadError(f"data of {spec.name}: {said}")


def _numbers(value: Any, least: int = 1, most: int = 1000) -> bool:
    """Whether `value` is a list of numbers, true and false not among them, nor NaN and infinity."""
    return (
        isinstance(value, list | tuple)
        and least <= len(value) <= most
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < math.inf for n in value)
    )


def _settings(spec: ModelSpec, model: VisionTransformer) -> ImageSettings:
    # timm's data config knows the size that the pretrained weights had, which kwargs may have changed.
    size = (model.in_chans, *default_size(model))
    try:
        return ImageSettings.from_timm(resolve_data_config({"input_size": size, **spec.data}, model=model))
    except AssertionError as error:
        sizes = "input_size is [channels, height, width]; mean and std are lists of one number a channel"
        raise ModelLoadError(f"data of {spec.name}: {sizes}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"data of {spec.name}: {error}") from error


@torch.inference_mode()
def _check_equal(plain: VisionTransformer, merged: MergedModel, settings: ImageSettings, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *settings.input_size, generator=generator).to(device)
    try:
        theirs, ours = plain(image), merged(image).logits
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ModelLoadError(f"the model fails on an input of {list(settings.input_size)}: {error}") from error
    if not theirs.isfinite().all():
        raise ModelLoadError("the model's own answer is NaN or infinite: its weights are too large, or damaged")
    difference = float((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not difference <= EQUAL:
        raise ModelLoadError(f"merging would change this model even at r = 0 (relative difference {difference:.1e})")
