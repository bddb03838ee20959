"""`tome-server tune`: find how much each block should merge at each r."""

import argparse
import json
import sys

from tome_server.cli.flags import Commands, add_model_flags, add_output, add_overwrite, add_tuning, models_of
from tome_server.cli.output import check_place, write


def add_to(commands: Commands) -> None:
    """Add the command."""
    tune = commands.add_parser(
        "tune",
        usage="%(prog)s --data PATH [options]",
        help="find how much each block should merge at each r",
        description="Search how many tokens each block should merge at each r, so that answers stay nearer to those at "
        "r = 0 than with r in every block, for no more work. Half of the images are searched on, the others measured "
        "on. A schedule is kept if on those it shifts less probability to other classes than r in every block, by at "
        "least two standard errors of the difference; of schedules that are no better, one in forty does so by chance. "
        "What is written serves as a quality report, and has the schedules that were kept.",
    )
    add_model_flags(tune)
    add_tuning(tune)
    add_output(tune)
    add_overwrite(tune)
    tune.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, and print the report; or write it, and print the schedules that were found."""
    check_place("--output", args.output, args.overwrite)
    config, (spec, *_) = models_of(args)
    from tome_server.cli.offline import Machine, Tuning, tune_model
    from tome_server.cli.tables import tuning_table

    report, found = tune_model(spec, args.data, Machine.of(config), Tuning.of(args))
    text = json.dumps(report, indent=2) + "\n"
    if args.output:
        write(args.output, text)
        sys.stdout.write(tuning_table(found))
    else:
        sys.stdout.write(text)
    return 0
