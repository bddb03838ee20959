"""`tome-server models evaluate`: measure a stored model's quality at each r."""

import argparse
from dataclasses import replace
from pathlib import Path

from tome_server.cli.flags import Commands, add_device, add_dtype, add_overwrite, add_stored_model, positive


def add_to(commands: Commands) -> None:
    """Add the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a stored model's quality at each r",
        description="Measure top-1 (where images are labelled) and agreement with r = 0 of a stored model at each r of "
        "its grid, and keep the report with it.",
    )
    add_stored_model(evaluate)
    evaluate.add_argument("--data", type=Path, required=True, metavar="PATH", help="images, as of evaluate")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    add_dtype(evaluate)
    add_overwrite(evaluate, "the quality that was measured before")
    add_device(evaluate)
    evaluate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, keep the report, and print its table."""
    from tome_server.cli.models.stored import check_report, log_progress, measure_quality, print_quality, stored

    log_progress()
    _, spec = stored(args)
    if args.dtype:
        spec = replace(spec, dtype=args.dtype)
    check_report(spec, args.overwrite)
    measure_quality(spec, args)
    print_quality(spec)
    return 0
