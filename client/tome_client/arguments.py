"""What the commands that ask for predictions have in common on the command line."""

from __future__ import annotations

import argparse

from tome_client.durations import parse_duration
from tome_client.requests import PredictOptions


def add_merging_arguments(command: argparse.ArgumentParser) -> None:
    """Adds which model to ask, and the bounds in which the server may merge."""
    command.add_argument("--model", default="", metavar="NAME", help="which model (default: the server's first)")
    command.add_argument("--r", type=int, metavar="N", help="merge exactly N tokens in each block")
    command.add_argument("--min-r", type=int, metavar="N", help="let the server merge no fewer")
    command.add_argument("--max-r", type=int, metavar="N", help="let the server merge no more")
    command.add_argument(
        "--min-quality", type=share, metavar="SHARE", help="keep at least this share of the quality at r = 0, as 0.99"
    )


def merging_options(args: argparse.Namespace) -> PredictOptions:
    """Returns what the arguments of `add_merging_arguments` ask for."""
    return PredictOptions(model=args.model, r=args.r, min_r=args.min_r, max_r=args.max_r, min_quality=args.min_quality)


def error_text(error: Exception) -> str:
    """Returns what an error says; of a file, its name and what the system says of it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def duration(text: str) -> float:
    """Reads a duration, in seconds, for argparse."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """Reads a share, from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"not a share: {text!r}; write it like 0.99, from 0 to 1")
    return value
