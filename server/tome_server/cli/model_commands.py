"""What the `tome-server models` commands do: make, show, measure and remove the models of a repository."""

import argparse
import json
import logging
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_server.config.text_file import read_text
from tome_server.errors import ConfigError
from tome_server.models.checkpoint_header import SUFFIX, check_header, read_header
from tome_server.models.repository import Repository, read_folder
from tome_server.models.spec import BUNDLED_PREFIX, quality_file, weights_digest
from tome_server.models.timm_names import check_architecture

# torch and timm take seconds to import, so each command imports what it needs when it runs.
if TYPE_CHECKING:
    from tome_server.calibration.datasets import Dataset
    from tome_server.config.server import ServerConfig
    from tome_server.models.preparing import Prepared
    from tome_server.models.spec import ModelSpec
    from tome_server.scheduling.profile import Profile


def add(args: argparse.Namespace) -> int:
    """Make a model's folder from weights."""
    if not args.source.startswith(BUNDLED_PREFIX):
        check_architecture(args.source)
    if args.weights:
        check_header(args.weights)
    from tome_server.calibration.datasets import load_labelled
    from tome_server.models.preparing import Recipe, prepare

    _log()
    if args.data:
        load_labelled(args.data)  # before anything is done
    if args.source.startswith(BUNDLED_PREFIX) and (args.weights or args.labels or args.kwargs or args.input):
        raise ConfigError(f"{args.source} is complete as it is: its weights, labels and input can't be set")
    recipe = Recipe(
        source=args.source,
        weights=args.weights,
        labels=args.labels,
        kwargs=args.kwargs,
        data=args.input,
        default_budget=args.default_budget,
        license=args.license,
        description=args.description,
    )
    args.to.mkdir(parents=True, exist_ok=True)
    _check_writable(args.to)
    repository = Repository(args.to)
    name = args.name or args.source.removeprefix(BUNDLED_PREFIX).split(".")[0]
    prepared: list[Prepared] = []

    def fill(folder: Path) -> None:
        made = prepare(recipe, name, folder)
        prepared.append(made)
        if args.data:
            _measure_quality(made.spec, args)
        if not args.no_profile:
            _measure_latencies(made.spec, args)

    folder = repository.write(name, fill, version=args.version, replace=False)
    [made] = prepared
    if made.left_out:
        some = ", ".join(made.left_out[:3])
        print(f"left out {len(made.left_out)} tensors that are no part of a {args.source}: {some}, …", file=sys.stderr)
    what = f"{made.model.num_classes} classes" if made.model.num_classes else "no classifier, features alone"
    print(f"{folder}: {args.source}, {what}")
    return 0


def fit_head(args: argparse.Namespace) -> int:
    """Fit a classifier to labelled images and store the model with it."""
    repository, spec = _stored(args)
    _check_writable(repository.folder)
    name = args.save_as or args.name
    versions = repository.versions(name) if name in repository.names() else []
    if name != args.name and name in repository.names() and not versions:
        raise ConfigError(f"--save-as: {repository.folder / name} exists; take another name")
    if name == args.name and not versions and not args.overwrite and (there := _measured_or_fitted(spec)):
        raise ConfigError(
            f"{repository.folder / name} has {there}: --overwrite replaces that, --save-as NAME makes another model"
        )
    import torch

    from tome_server.calibration.datasets import load_labelled
    from tome_server.calibration.evaluation import evaluate as measure_quality
    from tome_server.calibration.evaluation import quality_report
    from tome_server.calibration.features import pooled_features
    from tome_server.cli.offline import float32_of
    from tome_server.execution.choose_device import choose_device
    from tome_server.models.head import fit_head
    from tome_server.models.loading import load
    from tome_server.models.preparing import carry_over, headless_weights, prepare_with_head

    _log()
    images = _some(load_labelled(args.data), args.limit, args.seed)
    kept, held = images.split(args.holdout, args.seed)
    device = choose_device(args.device)
    torch.set_num_threads(args.threads or 1)
    weights = headless_weights(spec)
    backbone = load(replace(spec, quality=None, quality_bfloat16=None), device)
    # A head that has seen merged tokens keeps more of its accuracy when they are, and loses none at r = 0.
    usual = (0, backbone.grid[len(backbone.grid) // 2].r)
    rs = sorted({min(r, backbone.largest_r) for r in args.r or usual})
    training = images.subset(kept)
    features = pooled_features(backbone, training, rs, device, progress=sys.stderr.isatty())
    try:
        head = fit_head(features, torch.tensor(training.labels), len(images.classes), seed=args.seed)
    except ValueError as error:
        raise ConfigError(f"{args.data}: {error}") from error

    def fill(folder: Path) -> None:
        made = prepare_with_head(replace(spec, name=name), weights, head, images.classes, folder)
        carry_over(spec, folder)
        model = made.model if device.type == "cpu" else load(made.spec, device)
        grid = [level.r for level in model.grid]
        reference = float32_of(made.spec, device)
        levels = measure_quality(
            model, images.subset(held), grid, device, reference=reference, progress=sys.stderr.isatty()
        )
        report = quality_report(made.spec, model, levels, args.data.name, len(held), device)
        fitted = {"images": len(kept), "r": rs, "penalty": head.penalty, "seed": args.seed}
        _write_json(quality_file(folder, made.spec.dtype), report | {"fitted_to": fitted})
        if not args.no_profile:
            _measure_latencies(made.spec, args)

    folder = repository.write(name, fill, version=versions[-1] + 1 if versions else None, replace=True)
    print(f"{folder}: {len(images.classes)} classes, fitted to {len(kept)} images at r = {', '.join(map(str, rs))}")
    print(f"cross-validated top-1 on those: {head.accuracy:.4f}")
    print(f"on the {len(held)} held out:")
    _print_levels(read_folder(folder, name))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure a stored model's quality."""
    _log()
    _, spec = _stored(args)
    if args.dtype:
        spec = replace(spec, dtype=args.dtype)
    _check_report(spec, args.overwrite)
    _measure_quality(spec, args)
    _print_levels(spec)
    return 0


def tune(args: argparse.Namespace) -> int:
    """Find how much each block of a stored model should merge, and keep that with it."""
    _, spec = _stored(args)
    if args.dtype:
        spec = replace(spec, dtype=args.dtype)
    _check_report(spec, args.overwrite)
    from tome_server.cli.offline import Tuning, tune_model
    from tome_server.cli.tuning_table import table

    _log()
    assert spec.checkpoint is not None
    tuning = Tuning(args.r, args.target_macs, args.images, args.held_out, args.trials, args.blocks, args.seed)
    report, found = tune_model(_settings(spec, args), args.data, tuning)
    _write_report(spec, report)
    sys.stdout.write(table(found))
    if spec.dtype == "auto" and spec.quality_bfloat16 is not None:
        print(
            f"{spec.quality_bfloat16.name} still has the schedules of before: tome-server models evaluate {spec.name} "
            "--dtype bfloat16 measures these",
            file=sys.stderr,
        )
    _print_levels(spec)
    return 0


def profile(args: argparse.Namespace) -> int:
    """Measure a stored model's latencies."""
    from tome_server.cli.profile_table import table

    _log()
    _, spec = _stored(args)
    assert spec.profiles is not None
    _check_writable(spec.profiles)
    sys.stdout.write(table(_measure_latencies(spec, args)))
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Load a stored model and show what it is."""
    from tome_server.models.loading import load
    from tome_server.models.preparing import CPU

    repository, spec = _stored(args)
    model = load(spec, CPU)
    assert spec.checkpoint is not None
    fields: dict[str, Any] = {
        "name": spec.name,
        "version": spec.version,
        "versions": repository.versions(spec.name),
        "folder": str(spec.checkpoint.parent),
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "weights_sha256": weights_digest(spec.checkpoint),
        "bytes": spec.checkpoint.stat().st_size,
        "input_size": list(model.preprocess.settings.input_size),
        "patches": list(model.patch_grid),
        "classes": model.num_classes,
        "features": model.feature_dim,
        "default_budget": "none" if spec.default_budget == math.inf else spec.default_budget,
        **{name: value for name, value in asdict(spec.own).items() if name != "file" and value is not None},
        "profiles": sorted(path.name for path in spec.profiles.glob("*.json")) if spec.profiles else [],
        "description": spec.description,
        "levels": [
            {
                "r": level.r,
                "macs": level.cost.total,
                "top1": level.quality.top1 if level.quality else None,
                "agreement": level.quality.agreement if level.quality else None,
                "schedule": model.schedules.get(level.r),
            }
            for level in model.grid
        ],
    }
    if args.json:
        print(json.dumps(fields, indent=2))
        return 0
    for key, value in fields.items():
        if key != "levels" and value not in (None, "", []):
            print(f"{key:<16}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    _print_table(fields["levels"])
    return 0


def list_models(args: argparse.Namespace) -> int:
    """List the stored models; those that can't be loaded are said on standard error, and make the exit status 1."""
    repository = Repository(args.repository)
    contents, models = repository.scan(), []
    for spec in contents.specs:
        try:
            models.append(_listed(repository, spec))
        except (ConfigError, OSError) as error:  # removed meanwhile
            contents.faults[spec.name] = ConfigError(str(error))
    for name, fault in contents.faults.items():
        print(f"{name} can't be loaded: {fault}", file=sys.stderr)
    _print_models(models, args)
    return 1 if contents.faults else 0


def _listed(repository: Repository, spec: "ModelSpec") -> dict[str, Any]:
    return {
        "name": spec.name,
        "version": spec.version,
        "versions": repository.versions(spec.name),
        "architecture": spec.architecture,
        "bytes": spec.checkpoint.stat().st_size if spec.checkpoint else 0,
        "quality": spec.quality is not None,
    }


def _print_models(models: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(models, indent=2))
        return
    rows = [("name", "version", "architecture", "MB", "quality measured")]
    rows += [
        (
            str(model["name"]),
            str(model["version"] or "-"),
            str(model["architecture"]),
            f"{model['bytes'] / 1e6:.1f}",
            "yes" if model["quality"] else "no",
        )
        for model in models
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def supported(args: argparse.Namespace) -> int:
    """Try which of timm's entry points can be merged."""
    import tome_server.merging.timm_import  # noqa: F401  isort: skip
    import timm
    from tqdm import tqdm

    from tome_server.merging.entrypoints import entrypoints

    found = list(
        tqdm(
            entrypoints(args.pattern),
            total=len(timm.list_models(args.pattern)),
            desc="trying",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
    )
    if not found:
        raise ConfigError(f"timm {timm.__version__} has no entry point that fits {args.pattern!r}")
    can = sum(entry.supported for entry in found)
    if args.json:
        models = [{"name": entry.name, "supported": entry.supported, "reason": entry.reason} for entry in found]
        print(json.dumps({"timm": timm.__version__, "supported": can, "of": len(found), "models": models}, indent=2))
        return 0
    width = max(len(entry.name) for entry in found)
    for entry in found:
        print(f"{entry.name:<{width}}  {'supported' if entry.supported else f'no: {entry.reason}'}")
    print(f"{can} of {len(found)} entry points of timm {timm.__version__} supported")
    return 0


def remove(args: argparse.Namespace) -> int:
    """Delete a stored model, or one version of it."""
    print(f"removed {Repository(args.repository).remove(args.name, args.version)}")
    return 0


def _stored(args: argparse.Namespace) -> "tuple[Repository, ModelSpec]":
    repository = Repository(args.repository)
    return repository, repository.spec(args.name, args.version)


def _some(images: "Dataset", limit: int | None, seed: int) -> "Dataset":
    """Return `limit` of the images, chosen at random, in their order."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(sorted(random.Random(seed).sample(range(len(images)), limit)))


def _measure_quality(spec: "ModelSpec", args: argparse.Namespace) -> None:
    """Evaluate a stored model and keep the report with it."""
    from tome_server.cli.offline import evaluate_model

    _write_report(spec, evaluate_model(_settings(spec, args), args.data, limit=args.limit))


def _check_writable(folder: Path) -> None:
    """Raises ConfigError for a folder that nothing can be written to, before the work whose result is to go there."""
    while not folder.exists():  # it will be made
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} can't be written to: it is read-only, or another user's")


def _check_report(spec: "ModelSpec", overwrite: bool) -> None:
    """Raises ConfigError if a stored model has a quality report that isn't to be replaced, or none can be written."""
    assert spec.checkpoint is not None
    _check_writable(spec.checkpoint.parent)
    file = quality_file(spec.checkpoint.parent, spec.dtype)
    if file.is_file() and not overwrite:
        raise ConfigError(f"{file} holds {_reported(file)}; --overwrite replaces it")


def _reported(file: Path) -> str:
    """Say what a quality report holds."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads(read_text(file))
        return f"the quality measured on {int(report['images']):,} images of {report['data']}"
    return "a quality report"


def _measured_or_fitted(spec: "ModelSpec") -> str:
    """Say what a new classifier would replace: the one that a stored model has, and what was measured with it."""
    assert spec.checkpoint is not None
    there = []
    if spec.checkpoint.suffix == SUFFIX:
        head = read_header(spec.checkpoint).get("head.weight")
        there += [f"a classifier of {head.shape[0]} classes"] if head and head.shape else []
    elif spec.labels or spec.kwargs.get("num_classes"):
        there.append("a classifier")
    there += [_reported(file) for file in (spec.quality, spec.quality_bfloat16) if file]
    return " and ".join(there)


def _write_report(spec: "ModelSpec", report: "Mapping[str, Any]") -> None:
    """Keep a stored model's quality report with it; say so if the one that it replaces told of more images."""
    assert spec.checkpoint is not None
    file = quality_file(spec.checkpoint.parent, spec.dtype)
    before: Any = None
    with suppress(OSError, ValueError):
        before = json.loads(read_text(file))
    _write_json(file, report)
    match before, report:
        case {"images": int(most), "data": str(old)}, {"images": int(images), "data": str(new)} if images < most:
            print(f"{file.name} was of {most:,} images of {old}, and is now of {images:,} of {new}", file=sys.stderr)


def _measure_latencies(spec: "ModelSpec", args: argparse.Namespace) -> "Profile":
    """Profile a stored model here and keep that with it."""
    from tome_server.cli.offline import profile_model

    _, _, profile, kept = profile_model(
        _settings(spec, args), budget=args.seconds, progress=sys.stderr.isatty(), stored=spec
    )
    if kept is None:
        raise ConfigError(f"{spec.profiles} can't be written")
    return profile


def _settings(spec: "ModelSpec", args: argparse.Namespace) -> "ServerConfig":
    """Return the settings of a server of this model alone, which keeps its profiles with the model."""
    from tome_server.config.server import BatchingConfig, ModelConfig, ServerConfig

    model = ModelConfig(
        source=spec.architecture,
        name=spec.name,
        kwargs=dict(spec.kwargs),
        checkpoint=spec.checkpoint,
        labels=spec.labels,
        quality=spec.quality,
        data=dict(spec.data),
        proportional_attention=spec.proportional_attention,
        dtype=spec.dtype,
    )
    return ServerConfig(
        models=(model,),
        device=args.device,
        threads=args.threads,
        profiles=spec.profiles,
        batching=BatchingConfig(max_batch=getattr(args, "max_batch", None) or spec.own.max_batch or 8),
    )


def _print_levels(spec: "ModelSpec") -> None:
    assert spec.checkpoint is not None
    _print_table(json.loads(read_text(quality_file(spec.checkpoint.parent, spec.dtype)))["levels"])


def _print_table(levels: "Sequence[Mapping[str, Any]]") -> None:
    most = levels[0]["macs"]
    print(f"{'r':>4}  {'GMACs':>7}  {'saved':>6}  {'top-1':>6}  {'agreement':>9}")
    for level in levels:
        top1, agreement = (f"{level[key]:.4f}" if level[key] is not None else "-" for key in ("top1", "agreement"))
        saved = f"{1 - level['macs'] / most:.1%}"
        print(f"{level['r']:>4}  {level['macs'] / 1e9:>7.3f}  {saved:>6}  {top1:>6}  {agreement:>9}")


def _write_json(path: Path, content: object) -> None:
    from tome_server.calibration.profile_store import ProfileError, write_whole

    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except ProfileError as error:
        raise ConfigError(str(error)) from error


def _log() -> None:
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(message)s")
    logging.getLogger("tome_server").setLevel("INFO")
