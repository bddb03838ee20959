"""The command line of `tome-server models`."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tome_server.cli.arguments import budget, device, positive, r_values, seconds, share

EPILOG = """examples:
  tome-server models add bundled:fashion --to models
  tome-server models add vit_base_patch16_224 --to models                       timm's weights, from the hub
  tome-server models add vit_small_patch14_dinov2 --name dinov2 --weights dinov2.onnx --to models
  tome-server models fit-head dinov2 --repository models --data photos/         a folder of one subfolder a class
  tome-server models inspect dinov2 --repository models
  tome-server models supported '*dinov3*'                                       can they be merged, and why not
  tome-server serve --repository models
"""


def add_models_commands(parser: argparse.ArgumentParser) -> None:
    """Give `tome-server models` its commands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter

    add = commands.add_parser(
        "add",
        help="make a model's folder from weights",
        description="Make a model's folder in a repository: of timm's pretrained weights, or of a file's. The model is "
        "loaded from it to prove that it can be served, its latencies here are measured and, given images, its quality "
        "at each r.",
    )
    add.add_argument("source", metavar="SOURCE", help="timm's name of an architecture, or bundled:fashion")
    add.add_argument("--to", type=Path, required=True, metavar="DIR", help="the repository; made if it isn't there")
    add.add_argument("--name", help="what requests call it (default: the source's own name)")
    add.add_argument(
        "--weights", type=Path, metavar="FILE", help=".safetensors, .pth or .onnx (default: timm's, from the hub)"
    )
    add.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line (default: ImageNet's if fit)")
    add.add_argument("--data", type=Path, metavar="PATH", help="images to measure the quality on, as of evaluate")
    add.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add.add_argument(
        "--version", type=positive, metavar="N", help="make this version of the model; what has none becomes version 1"
    )
    add.add_argument(
        "--kwargs", type=_mapping, default={}, metavar="YAML",
        help="arguments of timm's create_model, such as '{img_size: 224}' (default: as the weights tell)",
    )  # fmt: skip
    add.add_argument(
        "--input", type=_mapping, default={}, metavar="YAML",
        help="overrides of timm's data config, such as '{crop_pct: 1.0}'",
    )  # fmt: skip
    add.add_argument(
        "--default-budget", type=budget, metavar="TIME", help="budget of requests that set none, or none (default: 1s)"
    )
    add.add_argument("--license", default="", help="the weights' licence, to be kept with them")
    add.add_argument("--description", default="", help="told to clients")
    _add_measuring(add)
    add.add_argument("--no-profile", action="store_true", help="don't measure latencies")
    add.set_defaults(run=_command("add"))

    fit = commands.add_parser(
        "fit-head",
        help="fit a classifier to a labelled folder",
        description="Fit a linear classifier to what a stored model makes of labelled images, and store the model with "
        "it. Part of the images are held out, and the quality at each r is measured on those.",
    )
    _add_name(fit)
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
    _add_overwrite(fit, "the classifier and the quality that the model has")
    _add_measuring(fit)
    fit.add_argument("--no-profile", action="store_true", help="don't measure latencies")
    fit.set_defaults(run=_command("fit_head"))

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a stored model's quality at each r",
        description="Do what `tome-server evaluate` does with a stored model, and keep the result with it.",
    )
    _add_name(evaluate)
    evaluate.add_argument("--data", type=Path, required=True, metavar="PATH", help="images, as of evaluate")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    _add_dtype(evaluate)
    _add_overwrite(evaluate, "the quality that was measured before")
    _add_device(evaluate)
    evaluate.set_defaults(run=_command("evaluate"))

    tune = commands.add_parser(
        "tune",
        help="find how much each block of a stored model should merge at each r",
        description="Do what `tome-server tune` does with a stored model, and keep the result with it.",
    )
    _add_name(tune)
    add_tuning(tune)
    _add_dtype(tune)
    _add_overwrite(tune, "the quality that was measured before")
    _add_device(tune)
    tune.set_defaults(run=_command("tune"))

    profile = commands.add_parser(
        "profile",
        help="measure how long a stored model's batches take here",
        description="Do what `tome-server profile` does with a stored model, and keep the result with it.",
    )
    _add_name(profile)
    _add_measuring(profile)
    profile.set_defaults(run=_command("profile"))

    inspect = commands.add_parser(
        "inspect", help="show a stored model, having loaded it", description="Load a stored model and show what it is."
    )
    _add_name(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=_command("inspect"))

    listing = commands.add_parser("list", help="list the stored models", description="List the stored models.")
    _add_repository(listing)
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listing.set_defaults(run=_command("list_models"))

    remove = commands.add_parser("remove", help="delete a stored model, or one version", description="Delete a model.")
    _add_name(remove)
    remove.set_defaults(run=_command("remove"))

    supported = commands.add_parser(
        "supported",
        help="try which of timm's entry points can be merged",
        description="List timm's entry points, whether each can be merged, and why not, found out by building it.",
    )
    supported.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="those whose name fits: '*dinov3*'"
    )
    supported.add_argument("--json", action="store_true", help="print JSON instead of a table")
    supported.set_defaults(run=_command("supported"))


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Add what `tome-server tune` and `tome-server models tune` take beside a model."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="images as of evaluate, labelled or not: none to test on",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--r", type=r_values, metavar="R,R,…", help="the r values to tune (default: the model's grid)")
    which.add_argument(
        "--target-macs", type=share, metavar="SHARE",
        help="tune the first r of the grid that leaves no more than this share of the work",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=positive, default=512, metavar="N", help="images to use, chosen at random (default: 512)"
    )
    parser.add_argument(
        "--held-out", type=positive, metavar="N",
        help="how many of them to measure on, at least 30 (default: half): more tell smaller gains from chance",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=positive, default=48, metavar="N",
        help="schedules to run for the largest r; half as many for each other (default: 48)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", type=positive, metavar="N", help="blocks that may merge at all (default: a third of the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images and of the search")


def _add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, required=True, metavar="DIR", help="the folder of models")


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what requests call it")
    _add_repository(parser)
    parser.add_argument("--version", type=positive, metavar="N", help="one of its versions (default: the one served)")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="measure it in this type (default: its own, float32 if that is auto)",
    )


def _add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads for the model (default: measured)")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-batch", type=positive, metavar="N", help="the largest batch (default: the model's own, or 8)"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=20.0, metavar="S", help="how long to measure latencies (default: 20)"
    )
    _add_device(parser)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """Return what runs a command of `model_commands`, which takes more than the plain install has."""

    def run(args: argparse.Namespace) -> int:
        done: int = getattr(importlib.import_module("tome_server.cli.model_commands"), name)(args)
        return done

    return run


def _mapping(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping; write for example '{{img_size: 224}}'")
    return value
