"""Loads what is to be served: the bundled model, a timm architecture with pretrained weights, or a local checkpoint."""

import difflib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import tome_server.timm_import  # noqa: F401  isort: skip

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tome_server.errors import ModelLoadError
from tome_server.merging import MergedModel, UnsupportedModelError, merge, pack, packable
from tome_server.merging.eva import fix_positions
from tome_server.merging.geometry import default_size
from tome_server.merging.packing import LEAST_GAIN, division_gain, few_threads
from tome_server.merging.support import check_supported
from tome_server.models.hosted import Quality
from tome_server.models.loaded import LoadedModel, loaded_model, with_schedules
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.spec import ModelSpec, in_dtype, weights_digest
from tome_server.models.transform import ImageSettings

log = logging.getLogger(__name__)

# Largest difference between timm's logits and ours at r = 0, as a share of the largest logit, that rounding explains.
EQUAL = 1e-4
# Share of images whose class a lesser dtype than float32 leaves alone; fewer is said, and never chosen unasked.
LEAST_AGREEMENT = 0.995
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
    if spec.quality is not None:
        _read_report(spec.quality)  # what can't be read is said before weights are downloaded
    model = create(spec)
    if spec.checkpoint is not None:
        put_weights(model, read_checkpoint(spec.checkpoint), spec.checkpoint, spec.architecture)
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
        merged, gain = _packed(merged, recall)
    quality, schedules = _quality(spec)
    loaded = loaded_model(
        merged,
        Preprocess(settings, limits or Limits()),
        name=spec.name,
        architecture=spec.architecture,
        dtype=spec.dtype,
        # Packing holds them in another layout, of the same size.
        weights_bytes=sum(part.nbytes for part in (*plain.parameters(), *plain.buffers())),
        version=spec.version or 1,
        description=spec.description,
        labels=_labels(spec, model),
        default_budget=spec.default_budget,
        quality=quality,
        division_gain=gain,
    )
    try:
        loaded = with_schedules(loaded, {**schedules, **spec.schedules})
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{spec.quality or spec.name}: {error}") from error
    # Last, for what is fixed is of the dtype that it is in.
    fix_positions(merged.model, loaded.patch_grid)
    return loaded


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
    if not timm.is_model(spec.architecture):
        name = spec.architecture.split(".")[0]
        close = difflib.get_close_matches(name, timm.list_models(), 3) or timm.list_models(f"{name}*")[:3]
        meant = f"did you mean {' or '.join(close)}?" if close else "tome-server models supported lists those there are"
        raise ModelLoadError(f"timm has no model named {spec.architecture!r}; {meant}")
    try:
        if spec.checkpoint is None:
            _check_before_download(spec)
        model: VisionTransformer = timm.create_model(
            spec.architecture, pretrained=spec.checkpoint is None, **dict(spec.kwargs)
        )
        check_supported(model)
    except UnsupportedModelError as error:
        raise ModelLoadError(f"{spec.architecture} can't be merged: {error}") from error
    except Exception as error:
        # Whatever the hub's client raises without a network, or timm for arguments that don't fit.
        if spec.checkpoint:
            raise ModelLoadError(f"{spec.architecture} can't be built: {error}") from error
        raise ModelLoadError(
            f"{spec.architecture} can't be built with pretrained weights from the hub: {str(error).rstrip('.')}. "
            "Where the hub can't be reached, give local weights: --checkpoint of serve, --weights of models add"
        ) from error
    return model


def _check_before_download(spec: ModelSpec) -> None:
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.architecture, **dict(spec.kwargs))
    except Exception:  # not every architecture can be built without memory; what is wrong shows in building it for real
        return
    check_supported(model)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint, .safetensors or what torch wrote; no pickled code in it is run.

    Raises ModelLoadError if it can't be read.
    """
    if not path.is_file():
        raise ModelLoadError(f"checkpoint {path} is no file")
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
        return {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
    except Exception as error:
        raise ModelLoadError(
            f"checkpoint {path} can't be read: {str(error) or repr(error)}; "
            "it must be .safetensors, or what torch.save wrote of tensors alone"
        ) from error


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Put the weights that came from `path` into a model. Raises ModelLoadError unless they fit to the last tensor."""
    wanted = model.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": [
            f"{key} {list(weights[key].shape)} for {list(wanted[key].shape)}"
            for key in wanted
            if key in weights and weights[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_first(keys)}" for what, keys in problems.items() if keys)
        raise ModelLoadError(f"checkpoint {path} doesn't fit {architecture}: {listed}")
    model.load_state_dict(weights)


def _first(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _labels(spec: ModelSpec, model: VisionTransformer) -> tuple[str, ...]:
    if spec.labels is not None:
        try:
            labels = tuple(spec.labels.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
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
    except (KeyError, TypeError, ValueError) as error:
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
        report = json.loads(path.read_text())
        levels = {int(level["r"]): _level_quality(level) for level in report["levels"]}
        schedules = {int(level["r"]): tuple(level["schedule"]) for level in report["levels"] if "schedule" in level}
    except OSError as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
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
    return Quality(float(level["agreement"]), None if top1 is None else float(top1))


def _settings(spec: ModelSpec, model: VisionTransformer) -> ImageSettings:
    valid = [setting.name for setting in fields(ImageSettings)]
    if unknown := sorted(spec.data.keys() - set(valid)):
        raise ModelLoadError(f"data of {spec.name}: {', '.join(unknown)} is none of {', '.join(valid)}")
    # timm's data config knows the size that the pretrained weights had, which kwargs may have changed.
    size = (model.in_chans, *default_size(model))
    try:
        return ImageSettings.from_timm(resolve_data_config({"input_size": size, **spec.data}, model=model))
    except AssertionError as error:
        sizes = "input_size is [channels, height, width]; mean and std are lists of one number a channel"
        raise ModelLoadError(f"data of {spec.name}: {sizes}") from error
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"data of {spec.name}: {error}") from error


@torch.inference_mode()
def _check_equal(plain: VisionTransformer, merged: MergedModel, settings: ImageSettings, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *settings.input_size, generator=generator).to(device)
    try:
        theirs, ours = plain(image), merged(image).logits
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"the model fails on an input of {list(settings.input_size)}: {error}") from error
    difference = float((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not difference <= EQUAL:
        raise ModelLoadError(f"merging would change this model even at r = 0 (relative difference {difference:.1e})")
