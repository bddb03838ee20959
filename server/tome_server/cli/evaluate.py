"""`tome-server evaluate`: measure the quality of a model at each r."""

import argparse
import json
import sys
from pathlib import Path

from tome_server.cli.flags import Commands, add_model_flags, add_output, add_overwrite, models_of, positive, r_values
from tome_server.cli.output import check_place, write


def add_to(commands: Commands) -> None:
    """Add the command."""
    evaluate = commands.add_parser(
        "evaluate",
        usage="%(prog)s --data PATH [options]",
        help="measure top-1 and agreement with r = 0 at each r",
        description="Measure top-1 (where images are labelled) and agreement with r = 0 at each r of a model's grid.",
    )
    add_model_flags(evaluate)
    evaluate.add_argument(
        "--data", type=Path, required=True, metavar="PATH",
        help="folder of images, folder of one subfolder a class, or idx file of images",
    )  # fmt: skip
    evaluate.add_argument("--r", type=r_values, metavar="R,R,…", help="r values, besides 0 (default: the model's grid)")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add_output(evaluate)
    add_overwrite(evaluate)
    evaluate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print or write the report."""
    check_place("--output", args.output, args.overwrite)
    config, (spec, *_) = models_of(args)
    from tome_server.cli.offline import Machine, evaluate_model

    report = evaluate_model(spec, args.data, Machine.of(config), limit=args.limit, grid=args.r)
    text = json.dumps(report, indent=2) + "\n"
    if args.output:
        write(args.output, text)
    else:
        sys.stdout.write(text)
    return 0
