"""What is done with a model beside serving it: evaluation and measurement, in the process of the command."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tome_server.timm_import  # noqa: F401  isort: skip

import torch

from tome_server.config import ServerConfig
from tome_server.hosting import model_specs
from tome_server.models.datasets import load_labelled
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load, stored_schedules
from tome_server.models.spec import ModelSpec
from tome_server.runtime.choose_device import choose_device
from tome_server.runtime.cpus import available_cpus
from tome_server.runtime.evaluation import evaluate, quality_report
from tome_server.runtime.profile_store import ProfileKey, keep_profile, profile_key
from tome_server.runtime.profiling import measure
from tome_server.runtime.threads import choose_threads
from tome_server.scheduling.profile import Profile


def evaluate_model(
    config: ServerConfig, data: Path, *, limit: int | None = None, grid: Sequence[int] | None = None
) -> dict[str, object]:
    """Evaluate the first configured model on the images at `data`; returns the report that quality.json holds.

    Raises ConfigError, ModelLoadError or DatasetError, in words for the operator.
    """
    images = load_labelled(data)
    spec = model_specs(config)[0]
    # An old report must not keep the model from being measured anew; how it merges is no measurement.
    spec = replace(spec, quality=None, schedules=stored_schedules(spec))
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model = load(spec, device)
    reference = float32_of(spec, device)
    rs = grid or [level.r for level in model.grid]
    levels = evaluate(model, images, rs, device, reference=reference, limit=limit, progress=sys.stderr.isatty())
    return quality_report(spec, model, levels, data.name, min(limit or len(images), len(images)), device)


def float32_of(spec: ModelSpec, device: torch.device) -> LoadedModel | None:
    """Return what a model of a lesser type is compared with: the same in float32; None if it is of that."""
    return None if spec.dtype == "float32" else load(replace(spec, dtype="float32", quality=None), device)


def profile_model(
    config: ServerConfig, *, budget: float, progress: bool = False
) -> tuple[str, ProfileKey, Profile, Path | None]:
    """Measure for `budget` seconds how long batches of the first configured model take, and keep that for the server.

    Returns the model's name, what the profile holds for, the profile, and where it is kept: None if it can't be, which
    is logged. Raises ConfigError or ModelLoadError, in words for the operator.
    """
    spec = model_specs(config)[0]
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model = load(spec, device)
    max_batch = config.batching.max_batch
    if config.threads is None and device.type == "cpu":
        choose_threads([model], max_batch, device)
    key = profile_key(model, spec.checkpoint, device, max_batch)
    profile = measure(model, device, max_batch=max_batch, budget=budget, progress=progress)
    return model.name, key, profile, keep_profile(config.profiles, model.name, key, profile)
