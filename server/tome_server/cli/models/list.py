"""`tome-server models list`: list the stored models."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tome_api.tables import table
from tome_server.cli.flags import Commands, add_json, add_repository
from tome_server.errors import ConfigError

if TYPE_CHECKING:
    from tome_server.models.repository import Repository
    from tome_server.models.spec import ModelSpec


def add_to(commands: Commands) -> None:
    """Add the command."""
    listing = commands.add_parser("list", help="list the stored models", description="List the stored models.")
    add_repository(listing)
    add_json(listing)
    listing.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the models; name those that can't be loaded on standard error, and return 1 if there are any."""
    from tome_server.models.repository import Repository

    repository = Repository(args.repository)
    contents, models = repository.scan(), []
    for spec in contents.specs:
        try:
            models.append(_listed(repository, spec))
        except (ConfigError, OSError) as error:  # removed meanwhile
            contents.faults[spec.name] = ConfigError(str(error))
    for name, fault in contents.faults.items():
        print(f"{name} can't be loaded: {fault}", file=sys.stderr)
    print(json.dumps(models, indent=2) if args.json else _table(models))
    return 1 if contents.faults else 0


def _listed(repository: "Repository", spec: "ModelSpec") -> dict[str, Any]:
    return {
        "name": spec.name,
        "version": spec.version,
        "versions": repository.versions(spec.name),
        "architecture": spec.architecture,
        "bytes": spec.checkpoint.stat().st_size if spec.checkpoint else 0,
        "quality": spec.quality is not None,
    }


def _table(models: list[dict[str, Any]]) -> str:
    rows = [
        (
            model["name"],
            str(model["version"] or "-"),
            model["architecture"],
            f"{model['bytes'] / 1e6:.1f}",
            "yes" if model["quality"] else "no",
        )
        for model in models
    ]
    return table(("name", "version", "architecture", "MB", "quality measured"), rows)
