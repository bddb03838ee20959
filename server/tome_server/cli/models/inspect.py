"""`tome-server models inspect`: load a stored model and show what it is."""

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from tome_api.tables import table
from tome_server.cli.flags import Commands, add_json, add_stored_model

if TYPE_CHECKING:
    from tome_server.config.model_overrides import ModelOverrides
    from tome_server.models.loaded import LoadedModel
    from tome_server.models.repository import Repository
    from tome_server.models.spec import ModelSpec


def add_to(commands: Commands) -> None:
    """Add the command."""
    inspect = commands.add_parser(
        "inspect", help="show a stored model, having loaded it", description="Load a stored model and show what it is."
    )
    add_stored_model(inspect)
    add_json(inspect)
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model and print what is known of it."""
    from tome_server.cli.models.stored import stored
    from tome_server.cli.tables import quality_table
    from tome_server.models.loading import load
    from tome_server.models.preparing import CPU

    repository, spec = stored(args)
    fields = _fields(repository, spec, load(spec, CPU))
    if args.json:
        print(json.dumps(fields, indent=2))
        return 0
    facts = [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in fields.items()
        if key != "levels" and value not in (None, "", [])
    ]
    print(table((), facts))
    sys.stdout.write(quality_table(fields["levels"]))
    return 0


def _fields(repository: "Repository", spec: "ModelSpec", model: "LoadedModel") -> dict[str, Any]:
    from tome_server.models.spec import weights_digest

    assert spec.checkpoint is not None
    return {
        "name": spec.name,
        "version": spec.version,
        "versions": repository.versions(spec.name),
        "folder": str(spec.checkpoint.parent),
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "weights_sha256": weights_digest(spec.checkpoint),
        "bytes": spec.checkpoint.stat().st_size,
        "input_size": list(model.info.preprocess.settings.input_size),
        "patches": list(model.info.patch_grid),
        "classes": model.info.num_classes,
        "features": model.info.feature_dim,
        "default_budget": "none" if spec.default_budget == math.inf else spec.default_budget,
        **_set(spec.overrides),
        "profiles": sorted(path.name for path in spec.profiles.glob("*.json")) if spec.profiles else [],
        "description": spec.description,
        "levels": [
            {
                "r": level.r,
                "macs": level.cost.total,
                "top1": level.quality.top1 if level.quality else None,
                "agreement": level.quality.agreement if level.quality else None,
                "schedule": model.info.schedules.get(level.r),
            }
            for level in model.info.grid
        ],
    }


def _set(overrides: "ModelOverrides | None") -> dict[str, Any]:
    """Return the overrides that are set, those in sections beside the others."""
    settings = overrides.model_dump(exclude_none=True) if overrides else {}
    return {**settings.pop("batching", {}), **settings.pop("limits", {}), **settings}
