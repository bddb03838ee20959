"""Flags that the commands share, and the values that flags take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from tome_api import durations
from tome_api.parser import Parser
from tome_client.requests import PredictOptions

_Value = TypeVar("_Value")

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What `add_subparsers` returns: the commands that another is added to."""


def add_merging_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the model and limit how much the server may merge."""
    command.add_argument("--model", default="", metavar="NAME", help="name of the model (default: the server's first)")
    command.add_argument("--r", type=int, metavar="N", help="merge exactly N tokens in each block")
    command.add_argument("--min-r", type=int, metavar="N", help="merge at least N tokens in each block")
    command.add_argument("--max-r", type=int, metavar="N", help="merge at most N tokens in each block")
    command.add_argument(
        "--min-quality",
        type=share,
        metavar="SHARE",
        help="keep at least this share of the model's quality at r = 0, such as 0.99",
    )


def merging_options(args: argparse.Namespace) -> PredictOptions:
    """Returns the options that the arguments of `add_merging_arguments` set."""
    return PredictOptions(model=args.model, r=args.r, min_r=args.min_r, max_r=args.max_r, min_quality=args.min_quality)


def error_text(error: Exception) -> str:
    """Returns an error's message in one line; for a file, its name and the system's message."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def warn(text: str) -> None:
    """Prints a line to standard error, in the command's name."""
    print(f"tome-client: {text}", file=sys.stderr, flush=True)


def duration(text: str) -> float:
    """Reads a duration above 0, in seconds, for argparse."""
    return _read(durations.parse_positive_duration, text)


def duration_or_zero(text: str) -> float:
    """Reads a duration, in seconds, for argparse."""
    return _read(durations.parse_duration, text)


def budget(text: str) -> float:
    """Reads a latency budget, in seconds, for argparse; `none` is infinite."""
    return _read(durations.parse_budget, text)


def budgets(text: str) -> Sequence[durations.BudgetClass]:
    """Reads a latency budget or a mix of several for argparse."""
    return _read(durations.parse_budgets, text)


def share(text: str) -> float:
    """Reads a share, from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1; write for example 0.99")
    return value


def _read(parse: Callable[[str], _Value], text: str) -> _Value:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
