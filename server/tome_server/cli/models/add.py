"""`tome-server models add`: make a model's folder from weights."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_server.cli.flags import Commands, add_profiling, budget, positive
from tome_server.errors import ConfigError

if TYPE_CHECKING:
    from tome_server.models.preparing import Prepared, Recipe


def add_to(commands: Commands) -> None:
    """Add the command."""
    add = commands.add_parser(
        "add",
        help="make a model's folder from weights",
        description="Make a model's folder in a repository: of timm's pretrained weights, or of a file's. The model is "
        "loaded from it to prove that it can be served, its latencies here are measured and, given images, its quality "
        "at each r.",
    )
    add.add_argument("source", metavar="SOURCE", help="timm's name of an architecture, or bundled:fashion")
    add.add_argument(
        "--repository", type=Path, required=True, metavar="DIR", help="the repository; made if it isn't there"
    )
    add.add_old_name("--to", "--repository")
    add.add_argument("--name", help="what requests call it (default: the source's own name)")
    add.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help=".safetensors, .pth or .onnx (default: timm's, from the hub)"
    )
    add.add_old_name("--weights", "--checkpoint")
    add.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line (default: ImageNet's if fit)")
    add.add_argument("--data", type=Path, metavar="PATH", help="images to measure the quality on, as of evaluate")
    add.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add.add_argument(
        "--version", type=positive, metavar="N", help="make this version of the model; what has none becomes version 1"
    )
    add.add_argument(
        "--kwargs", type=_mapping, default={}, metavar="YAML",
        help="arguments of timm's create_model, such as '{img_size: 224}' (default: those that fit the weights)",
    )  # fmt: skip
    add.add_argument(
        "--input", type=_mapping, default={}, metavar="YAML",
        help="overrides of timm's data config, such as '{crop_pct: 1.0}'",
    )  # fmt: skip
    add.add_argument(
        "--default-budget", type=budget, metavar="TIME", help="budget of requests that set none, or none (default: 1s)"
    )
    add.add_argument("--license", default="", help="the weights' licence, to be kept with them")
    add.add_argument("--description", default="", help="a text for clients")
    add_profiling(add)
    add.add_argument("--no-profile", action="store_true", help="don't measure latencies")
    add.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the folder, and measure the model in it."""
    recipe = _recipe(args)
    from tome_server.cli.models.stored import check_writable, log_progress, measure_latencies, measure_quality
    from tome_server.models.preparing import prepare
    from tome_server.models.repository import Repository
    from tome_server.models.spec import BUNDLED_PREFIX

    log_progress()
    args.repository.mkdir(parents=True, exist_ok=True)
    check_writable(args.repository)
    repository = Repository(args.repository)
    name = args.name or args.source.removeprefix(BUNDLED_PREFIX).split(".")[0]
    prepared: list[Prepared] = []

    def fill(folder: Path) -> None:
        made = prepare(recipe, name, folder)
        prepared.append(made)
        if args.data:
            measure_quality(made.spec, args)
        if not args.no_profile:
            measure_latencies(made.spec, args)

    folder = repository.write(name, fill, version=args.version, replace=False)
    [made] = prepared
    if made.left_out:
        some = ", ".join(made.left_out[:3])
        print(f"left out {len(made.left_out)} tensors that are no part of a {args.source}: {some}, …", file=sys.stderr)
    what = f"{made.model.info.num_classes} classes" if made.model.info.num_classes else "no classifier, features alone"
    print(f"{folder}: {args.source}, {what}")
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    """Return what the folder is made of. Raises ConfigError, ModelLoadError or DatasetError."""
    from tome_server.models.spec import BUNDLED_PREFIX
    from tome_server.models.timm_names import check_architecture
    from tome_server.models.weights.checkpoint_header import check_header

    bundled = args.source.startswith(BUNDLED_PREFIX)
    if not bundled:
        check_architecture(args.source)
    if args.checkpoint:
        check_header(args.checkpoint)
    if args.data:
        from tome_server.calibration.datasets import load_labelled

        load_labelled(args.data)
    if bundled and (args.checkpoint or args.labels or args.kwargs or args.input):
        raise ConfigError(f"{args.source} is complete as it is: its weights, labels and input can't be set")
    from tome_server.models.preparing import Recipe

    return Recipe(
        source=args.source,
        weights=args.checkpoint,
        labels=args.labels,
        kwargs=args.kwargs,
        data=args.input,
        default_budget=args.default_budget,
        license=args.license,
        description=args.description,
    )


def _mapping(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping; write for example '{{img_size: 224}}'")
    return value
