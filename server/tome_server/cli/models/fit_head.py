"""`tome-server models fit-head`: fit a classifier to a labelled folder, and store the model with it."""

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tome_server.cli.flags import Commands, add_overwrite, add_profiling, add_stored_model, positive, r_values, share
from tome_server.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from tome_server.calibration.datasets import Dataset
    from tome_server.models.head import Head
    from tome_server.models.repository import Repository
    from tome_server.models.spec import ModelSpec


def add_to(commands: Commands) -> None:
    """Add the command."""
    fit = commands.add_parser(
        "fit-head",
        help="fit a classifier to a labelled folder",
        description="Fit a linear classifier to what a stored model makes of labelled images, and store the model with "
        "it. Part of the images are held out, and the quality at each r is measured on those.",
    )
    add_stored_model(fit)
    fit.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder of one subfolder a class")
    fit.add_argument(
        "--holdout", type=share, default=0.25, metavar="SHARE",
        help="share of each class to measure on and not to fit to (default: 0.25)",
    )  # fmt: skip
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of those (default: 0)")
    fit.add_argument("--limit", type=positive, metavar="N", help="only N images, chosen at random")
    fit.add_argument(
        "--r", type=r_values, metavar="R,R,…",
        help="fit to what each of these r gives (default: 0 and the middle of the model's grid)",
    )  # fmt: skip
    fit.add_argument("--save-as", metavar="NAME", help="store the result as another model, and leave this one alone")
    add_overwrite(fit, "the classifier and the quality that the model has")
    add_profiling(fit)
    fit.add_argument("--no-profile", action="store_true", help="don't measure latencies")
    fit.set_defaults(run=run)


@dataclass(frozen=True)
class _Fitted:
    """A classifier, and the images it was fitted to."""

    head: "Head"
    images: int
    rs: list[int]


def run(args: argparse.Namespace) -> int:
    """Fit, store and measure."""
    from tome_server.cli.models.stored import check_writable, log_progress, stored

    repository, spec = stored(args)
    check_writable(repository.folder)
    name = args.save_as or args.name
    versions = repository.versions(name) if name in repository.names() else []
    _check_replacing(repository, spec, name, versions, args)
    import torch

    from tome_server.calibration.datasets import load_labelled
    from tome_server.cli.models.stored import print_quality
    from tome_server.execution.choose_device import choose_device
    from tome_server.models.preparing import headless_weights
    from tome_server.models.repository import read_folder

    log_progress()
    images = _some(load_labelled(args.data), args.limit, args.seed)
    kept, held = (images.subset(part) for part in images.split(args.holdout, args.seed))
    device = choose_device(args.device)
    torch.set_num_threads(args.threads or 1)
    weights = headless_weights(spec)
    fitted = _fit(spec, kept, device, args)

    def fill(folder: Path) -> None:
        _store(replace(spec, name=name), weights, fitted, held, folder, device, args)

    folder = repository.write(name, fill, version=versions[-1] + 1 if versions else None, replace=True)
    rs = ", ".join(map(str, fitted.rs))
    print(f"{folder}: {len(images.classes)} classes, fitted to {fitted.images} images at r = {rs}")
    print(f"cross-validated top-1 on those: {fitted.head.accuracy:.4f}")
    print(f"on the {len(held)} held out:")
    print_quality(read_folder(folder, name))
    return 0


def _check_replacing(
    repository: "Repository", spec: "ModelSpec", name: str, versions: list[int], args: argparse.Namespace
) -> None:
    """Raises ConfigError if storing the result would replace what it must not."""
    from tome_server.cli.models.stored import measured_or_fitted

    if name != args.name and name in repository.names() and not versions:
        raise ConfigError(f"--save-as: {repository.folder / name} exists; take another name")
    if name == args.name and not versions and not args.overwrite and (there := measured_or_fitted(spec)):
        raise ConfigError(
            f"{repository.folder / name} has {there}: --overwrite replaces that, --save-as NAME makes another model"
        )


def _some(images: "Dataset", limit: int | None, seed: int) -> "Dataset":
    """Return `limit` of the images, chosen at random, in their order."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(sorted(random.Random(seed).sample(range(len(images)), limit)))


def _fit(spec: "ModelSpec", images: "Dataset", device: "torch.device", args: argparse.Namespace) -> _Fitted:
    """Fit a head to the features of the images at several r. Raises ConfigError if there are too few images."""
    import torch

    from tome_server.calibration.features import pooled_features
    from tome_server.models.head_fitting import fit_head
    from tome_server.models.loading import load

    backbone = load(replace(spec, quality=None, quality_bfloat16=None), device)
    # A head that has seen merged tokens keeps more of its accuracy when they are, and loses none at r = 0.
    usual = (0, backbone.info.grid[len(backbone.info.grid) // 2].r)
    rs = sorted({min(r, backbone.info.largest_r) for r in args.r or usual})
    features = pooled_features(backbone, images, rs, device, progress=sys.stderr.isatty())
    try:
        head = fit_head(features, torch.tensor(images.labels), len(images.classes), seed=args.seed)
    except ValueError as error:
        raise ConfigError(f"{args.data}: {error}") from error
    return _Fitted(head, len(images), rs)


def _store(
    spec: "ModelSpec",
    weights: "Mapping[str, torch.Tensor]",
    fitted: _Fitted,
    held: "Dataset",
    folder: Path,
    device: "torch.device",
    args: argparse.Namespace,
) -> None:
    """Fill the empty `folder` with the model and its head, and measure it on the images held out."""
    from tome_server.calibration.evaluation import evaluate, quality_report
    from tome_server.cli.models.stored import measure_latencies, write_json
    from tome_server.cli.offline import float32_of
    from tome_server.models.loading import load
    from tome_server.models.preparing import carry_over, prepare_with_head
    from tome_server.models.spec import quality_file

    made = prepare_with_head(spec, weights, fitted.head, held.classes, folder)
    carry_over(spec, folder)
    model = made.model if device.type == "cpu" else load(made.spec, device)
    grid = [level.r for level in model.info.grid]
    reference = float32_of(made.spec, device)
    levels = evaluate(model, held, grid, device, reference=reference, progress=sys.stderr.isatty())
    report = quality_report(made.spec, model.info, levels, args.data.name, len(held), device)
    how = {"images": fitted.images, "r": fitted.rs, "penalty": fitted.head.penalty, "seed": args.seed}
    write_json(quality_file(folder, made.spec.dtype), report | {"fitted_to": how})
    if not args.no_profile:
        measure_latencies(made.spec, args)
