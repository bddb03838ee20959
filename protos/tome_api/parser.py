"""How both commands read their command lines."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from tome_api.nearest import meant


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
