"""Flags: the values that they take, and those that several commands share."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from tome_api.durations import (
    BudgetClass,
    duration_text,
    parse_budget,
    parse_budgets,
    parse_duration,
    parse_positive_duration,
)
from tome_api.parser import Parser

if TYPE_CHECKING:
    from tome_server.config.server import ServerConfig
    from tome_server.models.spec import ModelSpec

_Value = TypeVar("_Value")

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What `add_subparsers` returns: the commands that another is added to."""

# Values. Each function raises argparse.ArgumentTypeError for a text that it does not take.


def r_values(text: str) -> list[int]:
    """A list such as 0,4,8."""
    values = text.split(",")
    if not all(value.strip().isdecimal() for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of r values; write for example 0,4,8")
    return [int(value) for value in values]


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write for example 0.999")
    return value


def budgets(text: str) -> tuple[BudgetClass, ...]:
    """One latency budget or a mix of several, each of them finite."""
    classes = _parsed(parse_budgets, text)
    if any(math.isinf(one.budget) for one in classes):
        raise argparse.ArgumentTypeError("requests without a deadline take no part in a plan; leave out none")
    return classes


def budget(text: str) -> float:
    """A latency budget, in seconds; infinite for `none`."""
    return _parsed(parse_budget, text)


def time(text: str) -> float:
    """A duration, in seconds."""
    return _parsed(parse_duration, text)


def positive_time(text: str) -> float:
    """A duration above 0, in seconds."""
    return _parsed(parse_positive_duration, text)


def device(text: str) -> str:
    """The name of a device, whether or not this machine has it."""
    from tome_server.config.server import parse_device

    _parsed(parse_device, text)
    return text


def _parsed(parse: Callable[[str], _Value], text: str) -> _Value:
    """Have argparse show the message of the ValueError that `parse` raises."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# Flags that several commands have.


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, and on which device: they override the settings of a file."""
    parser = command.add_argument_group("model and device")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML settings; flags override them")
    parser.add_argument("--model", metavar="SOURCE", help="bundled:fashion (default), or timm's name of a model")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="folder of models, each in a folder of its own")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="local weights, .safetensors, .pth or .onnx")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line")
    parser.add_argument(
        "--quality", type=Path, metavar="FILE", help="what tome-server evaluate wrote: what each r is worth"
    )
    parser.add_argument("--default-budget", metavar="TIME", help="budget of requests that set none (default: 1s)")
    parser.add_argument("--dtype", metavar="TYPE", help="auto (default), float32, bfloat16 or float16")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads for the model (default: measured)")


def models_of(args: argparse.Namespace) -> "tuple[ServerConfig, list[ModelSpec]]":
    """Return the settings that the flags of `add_model_flags` make, and the models that these name, at least one.

    A model of a repository that can't be loaded is named on standard error. Raises ConfigError or ModelLoadError for
    other faults, as far as they can be found before torch is imported.
    """
    from tome_server.config.flags import configured
    from tome_server.models.sources import find_models

    config = configured(args.config, vars(args))
    found = find_models(config)
    for name, fault in found.faults.items():
        print(f"tome-server: {name} can't be loaded: {fault}", file=sys.stderr)
    return config, found.specs


def add_stored_model(command: argparse.ArgumentParser) -> None:
    """Add what names a model of a repository."""
    command.add_argument("name", metavar="NAME", help="what requests call it")
    add_repository(command)
    command.add_argument("--version", type=positive, metavar="N", help="one of its versions (default: the one served)")


def add_repository(command: argparse.ArgumentParser) -> None:
    """Add the folder of models."""
    command.add_argument("--repository", type=Path, required=True, metavar="DIR", help="the folder of models")


def add_device(command: argparse.ArgumentParser) -> None:
    """Add what a stored model is run on."""
    command.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda or cuda:N")
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads for the model (default: measured)")


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add the type that a stored model is measured in."""
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="measure it in this type (default: its own, float32 if that is auto)",
    )


def add_profiling(command: Parser) -> None:
    """Add how the latencies of a stored model are measured."""
    command.add_argument(
        "--max-batch", type=positive, metavar="N", help="the largest batch (default: the model's own, or 8)"
    )
    add_profile_time(command, 20, "how long to measure latencies")
    add_device(command)


def add_profile_time(command: Parser, default: int, what: str) -> None:
    """Add how long latencies are measured, in seconds by default."""
    command.add_argument(
        "--profile-time",
        type=positive_time,
        default=float(default),
        metavar="TIME",
        help=f"{what} (default: {default}s)",
    )
    command.add_old_name("--seconds", "--profile-time", _with_unit)


def _with_unit(seconds: str) -> str:
    """Turn a number of seconds into a duration with a unit; leave any other text as it is."""
    try:
        value = float(seconds)
    except ValueError:
        return seconds
    return duration_text(value) if 0 < value < math.inf else seconds


def add_tuning(command: Parser) -> None:
    """Add how schedules are searched for, and on which images."""
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="images as of evaluate, labelled or not: none to test on",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--r", type=r_values, metavar="R,R,…", help="the r values to tune (default: the model's grid)")
    which.add_argument(
        "--target-macs", type=share, metavar="SHARE",
        help="tune the first r of the grid that leaves no more than this share of the work",
    )  # fmt: skip
    command.add_argument(
        "--limit", type=positive, default=512, metavar="N", help="only N images, chosen at random (default: 512)"
    )
    command.add_old_name("--images", "--limit")
    command.add_argument(
        "--held-out", type=positive, metavar="N",
        help="how many of them to measure on, at least 30 (default: half); with more, smaller gains are significant",
    )  # fmt: skip
    command.add_argument(
        "--trials", type=positive, default=48, metavar="N",
        help="schedules to run for the largest r; half as many for each other (default: 48)",
    )  # fmt: skip
    command.add_argument(
        "--blocks", type=positive, metavar="N", help="blocks that may merge at all (default: a third of the model's)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images and of the search")


def add_output(command: argparse.ArgumentParser) -> None:
    """Add the file that a command writes JSON to, in the place of standard output."""
    command.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON (default: standard output)")


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the choice of JSON."""
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_overwrite(command: argparse.ArgumentParser, what: str = "files that are there already") -> None:
    """Add the permission to replace `what`."""
    command.add_argument("--overwrite", action="store_true", help=f"replace {what}")
