"""What the command line's arguments may be. Each raises argparse.ArgumentTypeError for text that is none."""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from tome_api.durations import BudgetClass, parse_budget, parse_budgets, parse_duration
from tome_server.config.nearest import meant


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, with the nearest name that it knows."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; an unknown flag is wrong usage of this very command, whose flags are the ones to choose from."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag.startswith("-"):
                self.error(f"there is no flag {flag}{meant(flag, self._option_string_actions)}")
            self.error(f"unexpected argument {unknown[0]!r}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            what = f"{value!r} is none of {', '.join(names)}{meant(str(value), names)}"
            raise argparse.ArgumentError(action, what)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists what it takes\n")


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
