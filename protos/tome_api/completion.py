"""Completion of commands, flags and their choices in shells, written from the commands' parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")

# `command` becomes the words that name a command, such as "tome-server models add".
_BASH = """\
{function}() {{
  local command={prog} words word
  for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
    case "$command $word" in
      {commands}) command="$command $word" ;;
    esac
  done
  case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{choices}
    *) case "$command" in
{flags}
    esac ;;
  esac
  # A word that begins no flag is a command or, by default, a file.
  [[ "${{COMP_WORDS[COMP_CWORD]}}" == -* ]] || words=${{words%% --*}}
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F {function} {prog}
"""

_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
autoload -Uz bashcompinit && bashcompinit
"""


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --completion, which prints what a shell completes the command by."""
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=SHELLS,
        help=f"print a script for the shell to read, and exit; in bash: source <({parser.prog} --completion bash)",
    )


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, values: Any, __: str | None = None) -> None:
        print(completion(parser, values), end="")
        parser.exit()


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the script for one of SHELLS."""
    commands = list(_commands(parser, parser.prog))
    if shell == "fish":
        return "".join(_fish(path.split(), one, [path.split() for path, _ in commands]) for path, one in commands)
    flags, choices = [], []
    for path, one in commands:
        words = " ".join([*_subcommands(one), "", *(flag for flag in _flags(one) if flag.startswith("--"))])
        flags.append(f"      {shlex.quote(path)}) words={shlex.quote(words)} ;;")
        for flag, action in _flags(one).items():
            if action.choices:
                known = shlex.quote(" ".join(map(str, action.choices)))
                choices.append(f"    {shlex.quote(f'{path} {flag}')}) words={known} ;;")
    return (_ZSH if shell == "zsh" else "") + _BASH.format(
        function=f"_{parser.prog.replace('-', '_')}",
        prog=parser.prog,
        commands="|".join(shlex.quote(path) for path, _ in commands[1:]),
        flags="\n".join(flags),
        choices="\n".join(choices),
    )


def _commands(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields each command, with the words that name it; the parser itself comes first."""
    yield path, parser
    for name, one in _subcommands(parser).items():
        yield from _commands(one, f"{path} {name}")


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: one for flag, one in parser._option_string_actions.items() if one.help != argparse.SUPPRESS}


def _fish(words: list[str], parser: argparse.ArgumentParser, every: list[list[str]]) -> str:
    """Returns the lines for the command that `words` name, one of `every`."""
    below = list(_subcommands(parser))
    # fish only knows which words were seen: a command of the same name, but below another, is told by the other's.
    others = [one[-2] for one in every if one[-1] == words[-1] and len(one) > len(words)]
    conditions = [f"__fish_seen_subcommand_from {name}" for name in words[1:]]
    conditions += [f"not __fish_seen_subcommand_from {' '.join(names)}" for names in (below, others) if names]
    start = f"complete -c {words[0]} -n {shlex.quote('; and '.join(conditions) or 'true')}"
    lines = [f"{start} -f -a {shlex.quote(' '.join(below))}"] if below else []
    for flag, action in _flags(parser).items():
        if flag.startswith("--"):
            takes = "" if action.nargs == 0 else " -r"
            takes += f" -f -a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            lines.append(f"{start} -l {flag[2:]}{takes}")
    return "".join(f"{line}\n" for line in lines)
