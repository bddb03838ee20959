"""Loads models: the bundled one, a timm architecture with pretrained weights, or a local checkpoint."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tome_server.config.text_file import read_text
from tome_server.errors import ModelLoadError
from tome_server.merging import MergedModel, UnsupportedModelError, merge, pack, packable
from tome_server.merging.cpu.packing import LEAST_GAIN, division_gain, few_threads
from tome_server.merging.families.eva import fix_positions
from tome_server.merging.geometry import patch_grid
from tome_server.merging.support import check_supported
from tome_server.models.bounded_building import BoundedBuilding, TooLargeError, most_bytes
from tome_server.models.data_config import check_data, image_settings
from tome_server.models.loaded import LoadedModel, loaded_model, with_schedules
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.quality_report import measured_quality, read_report
from tome_server.models.spec import ModelSpec, Outline, in_dtype
from tome_server.models.timm_names import check_architecture
from tome_server.models.transform import ImageSettings
from tome_server.models.weights.importing import ImportedWeights, fitted, inferred, outline_weights, read_weights

log = logging.getLogger(__name__)

# The largest difference between timm's logits and ours at r = 0, as a share of the largest logit, that is rounding.
EQUAL = 1e-4
# More than any model has. A mistyped number would otherwise use up all memory.
MOST_BLOCKS = 1000
# Tokens of an image: three times as many as the largest of timm's models have.
MOST_PATCHES = 2**14
# Tokens beside the patches, of which timm's models have at most a few tens.
MOST_PREFIX = 256
# Calls a function that measures and returns its value, or returns the value of an earlier call.
Recall: TypeAlias = Callable[[Callable[[], float]], float]


def load(
    spec: ModelSpec, device: torch.device, limits: Limits | None = None, *, recall: Recall = lambda measure: measure()
) -> LoadedModel:
    """Load a model onto a device, and prove that it gives timm's own logits at r = 0.

    On a CPU it is made for as many threads as torch is set to.

    Args:
        spec: What to load. A dtype of auto means float32 here.
        device: Where to load it.
        limits: What one image may cost.
        recall: Returns how much faster the threads run a single image by dividing it, measured now or earlier.

    Raises:
        ModelLoadError: If any part of the spec can't be read or doesn't fit. The message is for the operator.
    """
    if spec.dtype == "auto":
        spec = in_dtype(spec, "float32")
    with _said_where(spec):
        return _load(spec, device, limits or Limits(), recall)


def _load(spec: ModelSpec, device: torch.device, limits: Limits, recall: Recall) -> LoadedModel:
    spec = outline(spec).spec  # raises for most faults, before weights are read or downloaded
    model = create(spec)
    if spec.checkpoint is not None:
        weights = read_weights(spec.checkpoint)
        put_weights(model, fitted(weights, model), spec.checkpoint, spec.architecture)
        if weights.left_out:
            log.info("%s: %d tensors are no part of the model and are left out", spec.checkpoint, len(weights.left_out))
    model = model.to(device).eval().requires_grad_(False)
    merged = merge(model, proportional_attention=spec.proportional_attention)
    plain = merged.model
    settings = image_settings(spec, model)
    gain = None
    if spec.dtype == "float32":
        merged, gain = _packed(merged, recall)
    _check_equal(plain, merged, settings, device)
    # After the check, for which the rounding of types of lower precision is too coarse.
    merged = merged.to(getattr(torch, spec.dtype))
    if spec.dtype != "float32":
        _check_finite(merged.model, f"{spec.checkpoint or spec.architecture} in {spec.dtype}")
        merged, gain = _packed(merged, recall)
    quality, schedules = measured_quality(spec)
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
    """Find out what can be known about a model without reading or downloading its weights, or memory for them.

    Raises ModelLoadError, with a message for the operator, for faults that show without weights: an unknown
    architecture or one that can't be merged, tensors that don't fit by their file's header, labels, image settings, the
    quality report.
    """
    with _said_where(spec):
        return _outline(spec)


@contextmanager
def _said_where(spec: ModelSpec) -> Iterator[None]:
    """Put the folder of the model before the message of a ModelLoadError that doesn't name it, if there is a folder."""
    try:
        yield
    except ModelLoadError as error:
        folder = spec.file.parent if spec.file else None
        if folder is None or str(folder) in str(error):
            raise
        raise ModelLoadError(f"{folder}: {error}") from error


def _outline(spec: ModelSpec) -> Outline:
    check_architecture(spec.architecture)
    check_data(spec)
    depth = spec.kwargs.get("depth")
    if isinstance(depth, int) and depth > MOST_BLOCKS:
        raise ModelLoadError(f"{spec.name}: depth is {depth}, and no model has more than {MOST_BLOCKS} blocks")
    if spec.quality is not None:
        read_report(spec.quality)
    weights = None
    if spec.checkpoint is not None:
        weights = outline_weights(spec.checkpoint)
        spec = replace(spec, kwargs={**inferred(spec.architecture, spec.kwargs, weights), **spec.kwargs})
    try:
        with torch.device("meta"):
            model = timm.create_model(spec.architecture, **dict(spec.kwargs)).eval()
    except Exception:  # some architectures can't be built without memory; for faults, building the model raises again
        return Outline(spec)
    try:
        check_supported(model)
    except UnsupportedModelError as error:
        raise ModelLoadError(f"{spec.architecture} can't be merged: {error}") from error
    if weights is not None and (tensors := _without_values(weights, model)):
        _check_fit(model, tensors, weights.path, spec.architecture)
    if spec.labels is None or not spec.labels.is_fifo():  # a pipe, such as `<(command)`, can be read only once
        _labels(spec, model)
    settings = image_settings(spec, model)
    patches = math.prod(patch_grid(model, *settings.input_size[1:]))
    if not 0 < patches <= MOST_PATCHES:
        size = "×".join(map(str, settings.input_size[1:]))
        raise ModelLoadError(f"{spec.name}: images of {size} pixels are {patches:,} patches, not 1 to {MOST_PATCHES:,}")
    try:
        merged = merge(model, proportional_attention=spec.proportional_attention)
        if merged.prefix > MOST_PREFIX:
            raise ModelLoadError(f"{spec.name}: {merged.prefix:,} prefix tokens are more than {MOST_PREFIX}")
        loaded = loaded_model(merged, Preprocess(settings, Limits()), name=spec.name, architecture=spec.architecture)
        return Outline(spec, loaded.info.rs)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{spec.name} fails on an input of {list(settings.input_size)}: {error}") from error


def _without_values(weights: ImportedWeights, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the tensors in the form of `model`, without values; None if timm needs the values to convert them."""
    outlined = {name: tensor.to("meta") for name, tensor in weights.tensors.items()}
    try:
        return fitted(replace(weights, tensors=outlined), model)
    except ModelLoadError:
        return None


def _packed(merged: MergedModel, recall: Recall) -> tuple[MergedModel, float | None]:
    """Return `merged` with packed weights, if it can have them.

    On a few threads, also return how many times as fast these run a single image by dividing it, else None.
    """
    if not packable(merged):
        return merged, None
    if not few_threads():
        return pack(merged), None
    gain = recall(partial(division_gain, merged))
    return pack(merged, divided=gain >= LEAST_GAIN), gain


def create(spec: ModelSpec) -> VisionTransformer:
    """Build timm's model: with pretrained weights from the hub or, if there is a checkpoint, with random weights.

    Raises ModelLoadError if timm has no such model, it can't be merged, or the hub can't be reached.
    """
    check_architecture(spec.architecture)
    try:
        with BoundedBuilding(most_bytes(spec)):
            model: VisionTransformer = timm.create_model(
                spec.architecture, pretrained=spec.checkpoint is None, **dict(spec.kwargs)
            )
        check_supported(model)
    except TooLargeError as error:
        raise ModelLoadError(f"{spec.name}: {error}") from error
    except UnsupportedModelError as error:
        raise ModelLoadError(f"{spec.architecture} can't be merged: {error}") from error
    except Exception as error:
        # The hub's client and timm raise all kinds of errors, without a network or for arguments that don't fit.
        if spec.checkpoint:
            # After the first line, torch's own errors have a trace of its C++ code.
            why = str(error).partition("\n")[0] or repr(error)
            raise ModelLoadError(f"{spec.architecture} can't be built: {why}") from error
        raise ModelLoadError(
            f"{spec.architecture} can't be built with pretrained weights from the hub: {str(error).rstrip('.')}. "
            "Where the hub can't be reached, give local weights with --checkpoint"
        ) from error
    return model


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Put weights that were read from `path` into a model.

    Raises ModelLoadError unless every tensor fits and every value is finite.
    """
    _check_fit(model, weights, path, architecture)
    model.load_state_dict(weights)
    _check_finite(model, f"checkpoint {path}")


def _check_fit(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, architecture: str) -> None:
    """Raises ModelLoadError unless tensors, which need no values, have the names, shapes and kinds of the model's."""
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


def _first(keys: list[str], count: int = 5) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def _labels(spec: ModelSpec, model: VisionTransformer) -> tuple[str, ...]:
    if spec.labels is not None:
        try:
            labels = tuple(read_text(spec.labels, pipe=True).removesuffix("\n").split("\n"))
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
