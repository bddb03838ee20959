"""What the commands of `tome-server models` do with a stored model: find, measure and protect it."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_server.config.json_file import read_json
from tome_server.config.model_overrides import ModelOverrides
from tome_server.config.text_file import write_whole
from tome_server.errors import ConfigError
from tome_server.models.quality_report import MOST_IMAGES
from tome_server.models.repository import Repository
from tome_server.models.spec import ModelSpec, quality_file
from tome_server.models.weights.checkpoint_header import SUFFIX, read_header

# These modules import torch, which takes seconds: faults are reported before.
if TYPE_CHECKING:
    from tome_server.cli.offline import Machine
    from tome_server.scheduling.profile import Profile


def stored(args: argparse.Namespace) -> tuple[Repository, ModelSpec]:
    """Return the repository, and the model, that the flags of `add_stored_model` name. Raises ConfigError."""
    repository = Repository(args.repository)
    return repository, repository.spec(args.name, args.version)


def machine_of(spec: ModelSpec, args: argparse.Namespace) -> "Machine":
    """Return what the flags of `add_device` and `add_profiling` say; profiles are kept with the model."""
    from tome_server.cli.offline import Machine

    return Machine(
        device=args.device,
        threads=args.threads,
        max_batch=getattr(args, "max_batch", None) or 8,
        profiles=spec.profiles,
    )


def measure_quality(spec: ModelSpec, args: argparse.Namespace) -> None:
    """Evaluate a stored model on the images of --data, and keep the report with it."""
    from tome_server.cli.offline import evaluate_model

    write_report(spec, evaluate_model(spec, args.data, machine_of(spec, args), limit=args.limit))


def measure_latencies(spec: ModelSpec, args: argparse.Namespace) -> "Profile":
    """Profile a stored model on this machine, and keep the profile with it."""
    from tome_server.cli.offline import profile_model

    if args.max_batch:
        overrides = spec.overrides or ModelOverrides()
        batching = overrides.batching.model_copy(update={"max_batch": args.max_batch})
        spec = replace(spec, overrides=overrides.model_copy(update={"batching": batching}))
    _, profile, kept = profile_model(
        spec, machine_of(spec, args), budget=args.profile_time, progress=sys.stderr.isatty()
    )
    if kept is None:
        raise ConfigError(f"{spec.profiles} can't be written")
    return profile


def check_writable(folder: Path) -> None:
    """Raises ConfigError if nothing can be written to `folder`, or to where it will be made.

    It is called before the work whose result is to go there.
    """
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} can't be written to: it is read-only, or another user's")


def check_report(spec: ModelSpec, overwrite: bool) -> None:
    """Raises ConfigError if a stored model has a quality report that isn't to be replaced, or none can be written."""
    assert spec.checkpoint is not None
    check_writable(spec.checkpoint.parent)
    file = quality_file(spec.checkpoint.parent, spec.dtype)
    if file.is_file() and not overwrite:
        raise ConfigError(f"{file} holds {_reported(file)}; --overwrite replaces it")


def measured_or_fitted(spec: ModelSpec) -> str:
    """Name what a new classifier would replace: the classifier of a stored model, and what was measured with it."""
    assert spec.checkpoint is not None
    there = []
    if spec.checkpoint.suffix == SUFFIX:
        head = read_header(spec.checkpoint).get("head.weight")
        there += [f"a classifier of {head.shape[0]} classes"] if head and head.shape else []
    elif spec.labels or spec.kwargs.get("num_classes"):
        there.append("a classifier")
    there += [_reported(file) for file in (spec.quality, spec.quality_bfloat16) if file]
    return " and ".join(there)


def _reported(file: Path) -> str:
    """Name what a quality report holds."""
    with suppress(OSError, ValueError):
        report = read_json(file)
        return f"the quality measured on {report.whole('images', 0, MOST_IMAGES):,} images of {report.text('data')}"
    return "a quality report"


def write_report(spec: ModelSpec, report: Mapping[str, Any]) -> None:
    """Keep a quality report with a stored model; say on standard error if it replaces one of more images."""
    assert spec.checkpoint is not None
    file = quality_file(spec.checkpoint.parent, spec.dtype)
    before: Any = None
    with suppress(OSError, ValueError):
        before = read_json(file).values
    write_json(file, report)
    match before, report:
        case {"images": int(most), "data": str(old)}, {"images": int(images), "data": str(new)} if images < most:
            print(f"{file.name} was of {most:,} images of {old}, and is now of {images:,} of {new}", file=sys.stderr)


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all. Raises ConfigError if it can't be written."""
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror or error}") from error


def print_quality(spec: ModelSpec) -> None:
    """Print the quality report that a stored model has."""
    from tome_server.cli.tables import quality_table

    assert spec.checkpoint is not None
    report = read_json(quality_file(spec.checkpoint.parent, spec.dtype))
    sys.stdout.write(quality_table(report.values["levels"]))


def log_progress() -> None:
    """Write the server's log, and warnings of other libraries, to standard error as plain lines."""
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(message)s")
    logging.getLogger("tome_server").setLevel("INFO")
