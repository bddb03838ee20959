"""What the command line's arguments may be. Each raises argparse.ArgumentTypeError for text that is none."""

import argparse
import math

from tome_api.durations import BudgetClass, parse_budget, parse_budgets, parse_duration


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


def positive_number(text: str, what: str = "number") -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no {what} above 0")
    return value


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    return positive_number(text, "number of seconds")


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write for example 0.999")
    return value


def budgets(text: str) -> tuple[BudgetClass, ...]:
    """One latency budget or a mix of several, each of them an end."""
    try:
        classes = parse_budgets(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if any(math.isinf(one.budget) for one in classes):
        raise argparse.ArgumentTypeError("requests without a deadline take no part in a plan; leave out none")
    return classes


def budget(text: str) -> float:
    """A latency budget, in seconds; infinite for `none`."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """The name of a device, which need not be there."""
    from tome_server.config.server import parse_device

    try:
        parse_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def time(text: str) -> float:
    """A duration, in seconds."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
