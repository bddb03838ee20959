"""`tome-client models`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tome_api.parser import Parser
from tome_client.arguments import Commands
from tome_client.cli.connecting import connect
from tome_client.json_text import json_text
from tome_client.tables import model_details, model_table


def add_to(commands: Commands, parent: Parser) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "models",
        parents=[parent],
        usage="%(prog)s [options] [NAME]",
        help="list or describe models",
        description="Lists the models of a server. Given a name, describes that model: its input, and the cost and "
        "accuracy of each r.",
    )
    command.set_defaults(run=_run)
    command.add_argument("name", nargs="?", metavar="NAME", help="describe only this model, in full")
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    """Lists the hosted models, or describes one."""
    with connect(args) as client:
        if args.name is None:
            listed = client.models()
            fields: object = [asdict(one) for one in listed]
            text = model_table(listed)
        else:
            model = client.model(args.name)
            fields = asdict(model)
            text = model_details(model)
    print(json_text(fields) if args.json else text)
    return 0
