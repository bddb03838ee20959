"""What is done with a model beside serving it: evaluation and measurement, in the process of the command."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import torch

from tome_server.calibration.choose_dtype import load_chosen
from tome_server.calibration.choose_threads import choose_threads
from tome_server.calibration.datasets import load_labelled
from tome_server.calibration.evaluation import evaluate, quality_report
from tome_server.calibration.profile_store import ProfileKey, keep_profile, profile_key
from tome_server.calibration.profiling import measure
from tome_server.calibration.tuning import Tuned, divide, tune
from tome_server.config.server import ServerConfig
from tome_server.errors import ConfigError
from tome_server.execution.choose_device import choose_device
from tome_server.execution.cpus import available_cpus
from tome_server.execution.cuda_graphs import with_graphs
from tome_server.models.loaded import LoadedModel, with_schedules
from tome_server.models.loading import load, outline, stored_schedules
from tome_server.models.spec import ModelSpec
from tome_server.scheduling.profile import Profile
from tome_server.serving.model_manager import model_specs


def evaluate_model(
    config: ServerConfig, data: Path, *, limit: int | None = None, grid: Sequence[int] | None = None
) -> dict[str, object]:
    """Evaluate the first configured model on the images at `data`; returns the report that quality.json holds.

    A dtype of auto is float32 here, which others are compared with.
    Raises ConfigError, ModelLoadError or DatasetError, in words for the operator.
    """
    images = load_labelled(data)
    spec = _unmeasured(model_specs(config)[0])
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model = load(spec, device)
    reference = float32_of(spec, device)
    rs = grid or [level.r for level in model.grid]
    levels = evaluate(model, images, rs, device, reference=reference, limit=limit, progress=sys.stderr.isatty())
    return quality_report(spec, model, levels, data.name, min(limit or len(images), len(images)), device)


def _unmeasured(spec: ModelSpec) -> ModelSpec:
    """Return `spec` without its reports, which must not keep it from being measured anew, and merging as they say."""
    return replace(spec, quality=None, quality_bfloat16=None, schedules=stored_schedules(spec))


@dataclass(frozen=True)
class Tuning:
    """What `tune_model` is to do, beside the model and its images."""

    rs: Sequence[int] | None = None
    """The r values to find schedules for; None: all of the model's grid."""
    target_macs: float | None = None
    """In place of them, the first r of the grid that leaves no more than this share of the work."""
    images: int | None = 512
    """How many images to use, to search on and to measure on; None: all."""
    held_out: int | None = None
    """How many of them to measure on; None: half."""
    trials: int = 48
    blocks: int | None = None
    seed: int = 0


def tune_model(config: ServerConfig, data: Path, tuning: Tuning) -> tuple[dict[str, object], list[Tuned]]:
    """Find schedules for the first configured model on the images at `data`, and evaluate it with the better ones.

    Returns the report that quality.json holds, measured on the images that weren't searched on, and how each schedule
    that was found compares with r in every block, in descending order of r. An r for which none is better keeps the
    schedule that it had. Raises ConfigError, ModelLoadError or DatasetError, in words for the operator.
    """
    searched, held_out = divide(load_labelled(data), tuning.images, tuning.held_out, tuning.seed)
    spec = _unmeasured(model_specs(config)[0])
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model, shown = load(spec, device), sys.stderr.isatty()
    found = tune(
        model,
        searched,
        held_out,
        _rs_to_tune(model, tuning),
        device,
        blocks=tuning.blocks,
        trials=tuning.trials,
        seed=tuning.seed,
        progress=shown,
    )
    better = {each.r: each.schedule for each in found if each.better}
    model = with_schedules(model, {**model.schedules, **better})
    levels = evaluate(model, held_out, model.rs, device, reference=float32_of(spec, device), progress=shown)
    report = quality_report(spec, model, levels, data.name, len(held_out), device)
    how = {"images": len(searched), "held_out": len(held_out), "trials": tuning.trials, "seed": tuning.seed}
    return report | {"tuned": how | {"levels": [each.fields() for each in found]}}, found


def _rs_to_tune(model: LoadedModel, tuning: Tuning) -> Sequence[int]:
    if tuning.target_macs is None:
        return tuning.rs or [r for r in model.rs if r > 0]
    most = tuning.target_macs * model.cost(0).total
    for r in model.rs:
        if r > 0 and model.count(r).total <= most:
            return [r]
    least = model.count(model.rs[-1]).total / model.cost(0).total
    raise ConfigError(
        f"target MACs of {tuning.target_macs:g}: {model.name} is served with no less than {least:.3f} of its work, "
        f"at r = {model.rs[-1]}"
    )


def float32_of(spec: ModelSpec, device: torch.device) -> LoadedModel | None:
    """Return what a model of a lesser type is compared with: the same in float32; None if it is of that."""
    return None if spec.dtype in ("auto", "float32") else load(replace(spec, dtype="float32", quality=None), device)


def profile_model(
    config: ServerConfig, *, budget: float, progress: bool = False, stored: ModelSpec | None = None
) -> tuple[str, ProfileKey, Profile, Path | None]:
    """Measure for `budget` seconds how long batches of a model take, and keep that for the server.

    The model is the first configured, or `stored`. What the server would choose by measuring is measured anew.
    Returns the model's name, what the profile holds for, the profile, and where it is kept: None if it can't be, which
    is logged. Raises ConfigError or ModelLoadError, in words for the operator.
    """
    # As the server does, or what is measured of them would be kept under another key.
    specs = [outline(spec).spec for spec in ([stored] if stored else model_specs(config))]
    spec, device = specs[0], choose_device(config.device)
    most = {spec.name: spec.own.max_batch or config.batching.max_batch for spec in specs}
    torch.set_num_threads(config.threads or available_cpus())
    if config.threads is None and device.type == "cpu":
        # For all of them, as the server does.
        choose_threads([(spec, most[spec.name]) for spec in specs], config.profiles, anew=True)
    max_batch = most[spec.name]
    model = load_chosen(spec, device, max_batch=max_batch, folder=config.profiles, anew=True)
    model = with_graphs(model, device, max_batch=max_batch, memory=config.cuda_graph_memory)
    key = profile_key(model, spec.checkpoint, device, max_batch)
    profile = measure(model, device, max_batch=max_batch, budget=budget, progress=progress)
    return model.name, key, profile, keep_profile(config.profiles, model.name, key, profile)
