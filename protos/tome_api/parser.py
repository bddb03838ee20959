"""The parser of both commands' command lines."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NoReturn

from tome_api.nearest import meant


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest name that it knows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._renamed: dict[str, _Renamed] = {}
        self._given: list[str] = []

    def add_old_name(self, old: str, new: str, convert: Callable[[str], str] = str) -> None:
        """Accepts a flag by its old name too, for one release: with a warning, and without showing it in the help.

        Args:
            old: Such as "--to".
            new: The name that `add_argument` knows.
            convert: Turns the value of the old flag into one of the new flag.
        """
        self._renamed[old] = _Renamed(new, convert)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses; an unknown flag is an error of this command, which suggests its own flags."""
        given = sys.argv[1:] if args is None else args
        self._given = list(self._with_new_names(given))
        found, unknown = super().parse_known_args(self._given, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag.startswith("-"):
                self.error(self._no_flag(flag))
            self.error(f"unexpected argument {unknown[0]!r}")
        return found, unknown

    def _with_new_names(self, args: Sequence[str]) -> Iterator[str]:
        """Yields the arguments, each old name of a flag replaced by the new one."""
        rest = iter(args)
        for arg in rest:
            if arg == "--":
                yield arg
                yield from rest
                return
            old, equals, value = arg.partition("=")
            renamed = self._renamed.get(old)
            if renamed is None:
                yield arg
                continue
            print(f"{self.prog}: {old} is now {renamed.flag}; the next release takes no other name", file=sys.stderr)
            if equals:
                yield f"{renamed.flag}={renamed.convert(value)}"
            else:
                yield renamed.flag
                if (following := next(rest, None)) is not None:
                    yield renamed.convert(following)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            if isinstance(action, argparse._SubParsersAction):
                # A flag of a command, given before it: argparse takes the flag's value for the command.
                for arg in takewhile(value.__ne__, self._given):
                    flag = arg.partition("=")[0]
                    if flag.startswith("-") and not any(
                        known.startswith(flag) for known in self._option_string_actions
                    ):
                        self.error(self._no_flag(flag))
            names = [str(choice) for choice in action.choices]
            what = f"{value!r} is none of {', '.join(names)}{meant(str(value), names)}"
            raise argparse.ArgumentError(action, what)

    def _no_flag(self, flag: str) -> str:
        """Returns what is wrong with a flag that this parser doesn't know."""
        commands = [one.choices for one in self._actions if isinstance(one, argparse._SubParsersAction)]
        takers = [name for name, one in (commands[0] if commands else {}).items() if flag in one._option_string_actions]
        if takers:
            return f"{flag} is a flag of {' and '.join(takers)}, and comes after the command"
        return f"there is no flag {flag}{meant(flag, self._option_string_actions)}"

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong, and exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists what it takes\n")


@dataclass(frozen=True, slots=True)
class _Renamed:
    """The new name of a flag, and how its values are converted."""

    flag: str
    convert: Callable[[str], str]
