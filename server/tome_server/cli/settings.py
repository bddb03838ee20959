"""`tome-server settings`: list every setting of a configuration file."""

import argparse
import json
import sys

from tome_server.cli.flags import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    settings = commands.add_parser(
        "settings",
        help="list every setting of a configuration file",
        description="List every setting of a configuration file, its default and what it means.",
    )
    settings.add_argument("--schema", action="store_true", help="print a JSON Schema of the file, as editors take it")
    settings.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, or the schema."""
    from tome_server.config.reference import settings_schema, settings_table

    sys.stdout.write(json.dumps(settings_schema(), indent=2) + "\n" if args.schema else settings_table())
    return 0
