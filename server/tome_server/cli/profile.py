"""`tome-server profile`: measure how long batches take at each r."""

import argparse
import sys
from pathlib import Path

from tome_server.cli.flags import Commands, add_json, add_model_flags, add_overwrite, add_profile_time, models_of
from tome_server.cli.output import check_place, drawing, write


def add_to(commands: Commands) -> None:
    """Add the command."""
    profile = commands.add_parser(
        "profile",
        usage="%(prog)s [options]",
        help="measure how long batches take at each r",
        description="Measure how long batches of each size take at each r of a model's grid, and keep that where the "
        "server looks for it at its start.",
    )
    add_model_flags(profile)
    profile.add_argument("--max-batch", type=int, metavar="N", help="the largest batch (default: 8)")
    add_profile_time(profile, 40, "how long to measure")
    profile.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON as well")
    profile.add_argument("--picture", type=Path, metavar="FILE", help="where to draw it: .png, .svg or .pdf")
    add_json(profile)
    add_overwrite(profile)
    profile.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure; print the profile, and write and draw it where the flags say."""
    check_place("--output", args.output, args.overwrite)
    pictures = drawing("--picture", args.picture, args.overwrite) if args.picture else None
    config, (spec, *others) = models_of(args)
    from tome_server.calibration.profile_store import profile_text
    from tome_server.cli.offline import Machine, profile_model
    from tome_server.cli.tables import profile_table

    key, profile, kept = profile_model(
        spec, Machine.of(config), beside=others, budget=args.profile_time, progress=sys.stderr.isatty()
    )
    text = profile_text(key, profile)
    sys.stdout.write(text if args.json else profile_table(profile))
    if args.output:
        write(args.output, text)
    if pictures:
        pictures.draw_profile(profile, f"{spec.name} on {key.device}, {key.dtype}", args.picture)
    print(f"measured {spec.name} in {key.dtype}", file=sys.stderr)
    if kept:
        print(f"kept for the server in {kept}", file=sys.stderr)
    return 0
