"""`tome-server models`: make, show, measure and remove the models of a repository."""

import argparse

from tome_server.cli.flags import Commands
from tome_server.cli.models import add, evaluate, fit_head, inspect, list, profile, remove, supported, tune  # noqa: A004

COMMANDS = (add, fit_head, evaluate, tune, profile, inspect, list, remove, supported)

EPILOG = """examples:
  tome-server models add bundled:fashion --repository models
  tome-server models add vit_base_patch16_224 --repository models               timm's weights, from the hub
  tome-server models add vit_small_patch14_dinov2 --name dinov2 --checkpoint dinov2.onnx --repository models
  tome-server models fit-head dinov2 --repository models --data photos/         a folder of one subfolder a class
  tome-server models inspect dinov2 --repository models
  tome-server models supported '*dinov3*'                                       can they be merged, and why not
  tome-server serve --repository models
"""


def add_to(commands: Commands) -> None:
    """Add the command and its own commands."""
    models = commands.add_parser(
        "models",
        help="make, show and measure the models of a repository",
        description="Make, show, measure and remove the models of a repository: a folder that `tome-server serve "
        "--repository` serves.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = models.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(own)
