"""`tome-server models tune`: find how much each block of a stored model should merge at each r."""

import argparse
import sys
from dataclasses import replace

from tome_server.cli.flags import Commands, add_device, add_dtype, add_overwrite, add_stored_model, add_tuning


def add_to(commands: Commands) -> None:
    """Add the command."""
    tune = commands.add_parser(
        "tune",
        help="find how much each block of a stored model should merge at each r",
        description="Search how many tokens each block of a stored model should merge at each r, as described by "
        "`tome-server tune --help`, and keep the report, with the schedules that are better, with the model.",
    )
    add_stored_model(tune)
    add_tuning(tune)
    add_dtype(tune)
    add_overwrite(tune, "the quality that was measured before")
    add_device(tune)
    tune.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, keep the report with its schedules, and print both."""
    from tome_server.cli.models.stored import (
        check_report,
        log_progress,
        machine_of,
        print_quality,
        stored,
        write_report,
    )

    _, spec = stored(args)
    if args.dtype:
        spec = replace(spec, dtype=args.dtype)
    check_report(spec, args.overwrite)
    from tome_server.cli.offline import Tuning, tune_model
    from tome_server.cli.tables import tuning_table

    log_progress()
    report, found = tune_model(spec, args.data, machine_of(spec, args), Tuning.of(args))
    write_report(spec, report)
    sys.stdout.write(tuning_table(found))
    if spec.dtype == "auto" and spec.quality_bfloat16 is not None:
        print(
            f"{spec.quality_bfloat16.name} still has the schedules of before: tome-server models evaluate {spec.name} "
            "--dtype bfloat16 measures these",
            file=sys.stderr,
        )
    print_quality(spec)
    return 0
