"""`tome-server models remove`: delete a stored model, or one version of it."""

import argparse

from tome_server.cli.flags import Commands, add_stored_model


def add_to(commands: Commands) -> None:
    """Add the command."""
    remove = commands.add_parser("remove", help="delete a stored model, or one version", description="Delete a model.")
    add_stored_model(remove)
    remove.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Delete it."""
    from tome_server.models.repository import Repository

    print(f"removed {Repository(args.repository).remove(args.name, args.version)}")
    return 0
