"""`tome-server models profile`: measure how long a stored model's batches take here."""

import argparse
import sys

from tome_server.cli.flags import Commands, add_profiling, add_stored_model


def add_to(commands: Commands) -> None:
    """Add the command."""
    profile = commands.add_parser(
        "profile",
        help="measure how long a stored model's batches take here",
        description="Measure how long batches of each size of a stored model take on this machine at each r of its "
        "grid, and keep the profile with the model.",
    )
    add_stored_model(profile)
    add_profiling(profile)
    profile.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, keep the profile with the model, and print it."""
    from tome_server.cli.models.stored import check_writable, log_progress, measure_latencies, stored
    from tome_server.cli.tables import profile_table

    log_progress()
    _, spec = stored(args)
    assert spec.profiles is not None
    check_writable(spec.profiles)
    sys.stdout.write(profile_table(measure_latencies(spec, args)))
    return 0
