"""Work on a model that is not served: evaluation, tuning and profiling, in the process of the command."""

import argparse
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
from tome_server.calibration.profile_key import ProfileKey, profile_key
from tome_server.calibration.profile_store import keep_profile
from tome_server.calibration.profiling import measure
from tome_server.calibration.tuning import Tuned, divide, tune
from tome_server.config.server import ServerConfig
from tome_server.errors import ConfigError
from tome_server.execution.choose_device import choose_device
from tome_server.execution.cpus import available_cpus
from tome_server.execution.cuda_graphs import with_graphs
from tome_server.models.loaded import LoadedModel, with_schedules
from tome_server.models.loading import load, outline
from tome_server.models.quality_report import stored_schedules
from tome_server.models.spec import ModelSpec
from tome_server.scheduling.profile import Profile


@dataclass(frozen=True)
class Machine:
    """What a model is run on, and how, as a server's settings have it."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; None: as many as the process may use CPUs, or for a profile as many as are measured to be best."""
    max_batch: int = 8
    """The largest batch, of models that have none of their own."""
    profiles: Path | None = None
    """Where profiles are kept; None: in the user's cache."""
    cuda_graph_memory: int = 2**30
    """Bytes that a model's CUDA graphs may take."""

    @classmethod
    def of(cls, config: ServerConfig) -> "Machine":
        """Return what a server with these settings would run its models on."""
        return cls(
            device=config.device,
            threads=config.threads,
            max_batch=config.batching.max_batch,
            profiles=config.profiles,
            cuda_graph_memory=config.cuda_graph_memory,
        )


def evaluate_model(
    spec: ModelSpec, data: Path, machine: Machine, *, limit: int | None = None, grid: Sequence[int] | None = None
) -> dict[str, object]:
    """Measure the quality of a model at each r on the images at `data`; returns the report that quality.json holds.

    A dtype of auto is float32 here, which others are compared with.

    Args:
        spec: The model. Its own quality reports are not read, so that they can't keep it from being measured.
        data: Images, labelled or not.
        machine: What to run it on.
        limit: How many images to use, the first ones; None: all.
        grid: The r values; None: those of the model's grid.

    Raises:
        ConfigError, ModelLoadError, DatasetError: In words for the operator.
    """
    images = load_labelled(data)
    spec, device = _unmeasured(spec), choose_device(machine.device)
    torch.set_num_threads(machine.threads or available_cpus())
    model = load(spec, device)
    reference = float32_of(spec, device)
    rs = grid or [level.r for level in model.info.grid]
    levels = evaluate(model, images, rs, device, reference=reference, limit=limit, progress=sys.stderr.isatty())
    return quality_report(spec, model.info, levels, data.name, min(limit or len(images), len(images)), device)


def _unmeasured(spec: ModelSpec) -> ModelSpec:
    """Return `spec` without its quality reports, merging by the schedules that they hold."""
    return replace(spec, quality=None, quality_bfloat16=None, schedules=stored_schedules(spec))


@dataclass(frozen=True)
class Tuning:
    """How `tune_model` searches."""

    rs: Sequence[int] | None = None
    """The r values to find schedules for; None: those of the model's grid."""
    target_macs: float | None = None
    """In place of `rs`, the first r of the grid that leaves no more than this share of the work."""
    images: int | None = 512
    """How many images to use, for the search and the measurement together; None: all."""
    held_out: int | None = None
    """How many of the images to measure on; None: half."""
    trials: int = 48
    """Schedules to run for the largest r; half as many for each other."""
    blocks: int | None = None
    """How many blocks may merge at all; None: a third of them."""
    seed: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Tuning":
        """Return what the flags of `add_tuning` ask for."""
        return cls(args.r, args.target_macs, args.limit, args.held_out, args.trials, args.blocks, args.seed)


def tune_model(spec: ModelSpec, data: Path, machine: Machine, tuning: Tuning) -> tuple[dict[str, object], list[Tuned]]:
    """Find schedules for a model on the images at `data`, and measure its quality with those that are better.

    Returns:
        The report that quality.json holds, measured on the images that were not searched on; an r for which no
        schedule is better keeps the schedule that it had. And how each schedule that was found compares with r in
        every block, in descending order of r.

    Raises:
        ConfigError, ModelLoadError, DatasetError: In words for the operator.
    """
    searched, held_out = divide(load_labelled(data), tuning.images, tuning.held_out, tuning.seed)
    spec, device = _unmeasured(spec), choose_device(machine.device)
    torch.set_num_threads(machine.threads or available_cpus())
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
    model = with_schedules(model, {**model.info.schedules, **better})
    levels = evaluate(model, held_out, model.info.rs, device, reference=float32_of(spec, device), progress=shown)
    report = quality_report(spec, model.info, levels, data.name, len(held_out), device)
    how = {"images": len(searched), "held_out": len(held_out), "trials": tuning.trials, "seed": tuning.seed}
    return report | {"tuned": how | {"levels": [each.fields() for each in found]}}, found


def _rs_to_tune(model: LoadedModel, tuning: Tuning) -> Sequence[int]:
    if tuning.target_macs is None:
        return tuning.rs or [r for r in model.info.rs if r > 0]
    most = tuning.target_macs * model.info.cost(0).total
    for r in model.info.rs:
        if r > 0 and model.count(r).total <= most:
            return [r]
    least = model.count(model.info.rs[-1]).total / model.info.cost(0).total
    raise ConfigError(
        f"target MACs of {tuning.target_macs:g}: {model.info.name} is served with no less than {least:.3f} of its "
        f"work, at r = {model.info.rs[-1]}"
    )


def float32_of(spec: ModelSpec, device: torch.device) -> LoadedModel | None:
    """Return the same model in float32, which one of another type is compared with; None if it is in float32."""
    return None if spec.dtype in ("auto", "float32") else load(replace(spec, dtype="float32", quality=None), device)


def profile_model(
    spec: ModelSpec, machine: Machine, *, beside: Sequence[ModelSpec] = (), budget: float, progress: bool = False
) -> tuple[ProfileKey, Profile, Path | None]:
    """Measure how long batches of a model take, and keep that for the server.

    What the server would choose by measuring, such as the number of threads, is measured anew.

    Args:
        spec: The model.
        machine: What to run it on.
        beside: Other models of the same server, for which the number of threads is chosen as well.
        budget: Seconds to measure for, at most.
        progress: Whether to show a bar on standard error.

    Returns:
        What the profile holds for, the profile, and where it is kept: None if it can't be, which is logged.

    Raises:
        ConfigError, ModelLoadError: In words for the operator.
    """
    # The server outlines models too; without that the profile would be kept under another key.
    specs = [outline(one).spec for one in (spec, *beside)]
    spec, device = specs[0], choose_device(machine.device)
    torch.set_num_threads(machine.threads or available_cpus())
    if machine.threads is None and device.type == "cpu":
        models = [(one, one.max_batch or machine.max_batch) for one in specs]
        choose_threads(models, machine.profiles, anew=True)
    max_batch = spec.max_batch or machine.max_batch
    model = load_chosen(spec, device, max_batch=max_batch, folder=machine.profiles, anew=True)
    model = with_graphs(model, device, max_batch=max_batch, memory=machine.cuda_graph_memory)
    key = profile_key(model, spec.checkpoint, device, max_batch)
    profile = measure(model, device, max_batch=max_batch, budget=budget, progress=progress)
    return key, profile, keep_profile(machine.profiles, model.info.name, key, profile)
