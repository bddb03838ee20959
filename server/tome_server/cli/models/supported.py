"""`tome-server models supported`: try which of timm's entry points can be merged."""

import argparse
import json
import sys

from tome_api.tables import table
from tome_server.cli.flags import Commands, add_json
from tome_server.errors import ConfigError


def add_to(commands: Commands) -> None:
    """Add the command."""
    supported = commands.add_parser(
        "supported",
        help="try which of timm's entry points can be merged",
        description="List timm's entry points, whether each can be merged, and why not, found out by building it.",
    )
    supported.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="those whose name fits: '*dinov3*'"
    )
    add_json(supported)
    supported.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build each entry point that fits the pattern, and print whether it can be merged."""
    import tome_server.merging.timm_import  # noqa: F401  isort: skip
    import timm
    from tqdm import tqdm

    from tome_server.merging.entrypoints import entrypoints

    found = list(
        tqdm(
            entrypoints(args.pattern),
            total=len(timm.list_models(args.pattern)),
            desc="trying",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
    )
    if not found:
        raise ConfigError(f"timm {timm.__version__} has no entry point that fits {args.pattern!r}")
    can = sum(entry.supported for entry in found)
    if args.json:
        models = [{"name": entry.name, "supported": entry.supported, "reason": entry.reason} for entry in found]
        print(json.dumps({"timm": timm.__version__, "supported": can, "of": len(found), "models": models}, indent=2))
        return 0
    print(table((), [(entry.name, "supported" if entry.supported else f"no: {entry.reason}") for entry in found]))
    print(f"{can} of {len(found)} entry points of timm {timm.__version__} supported")
    return 0
