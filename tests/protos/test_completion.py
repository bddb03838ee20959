"""What shells complete the commands by. Each shell that is installed completes a line as a person would."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tome_api.completion import SHELLS, add_completion, completion
from tome_api.parser import Parser

# Completes the words that follow, and prints what they may become. zsh has no such way without a terminal.
COMPLETE = {
    "bash": 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _some_tool; printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": 'source $argv[1]; complete -C (string join " " $argv[2..]) | string replace -r "\\t.*" ""',
}


def parser() -> Parser:
    """A command with commands, one of which has commands of its own."""
    tool = Parser(prog="some-tool")
    add_completion(tool)
    commands = tool.add_subparsers()
    serve = commands.add_parser("serve")
    serve.add_argument("--dtype", choices=["auto", "float32", "bfloat16"])
    serve.add_argument("-p", "--port", type=int)
    serve.add_argument("--secret", help=argparse.SUPPRESS)
    models = commands.add_parser("models").add_subparsers()
    models.add_parser("add").add_argument("--force", action="store_true")
    models.add_parser("serve").add_argument("--place")
    return tool


def completed(shell: str, folder: Path, *words: str) -> set[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = folder / "script"
    script.write_text(completion(parser(), shell))
    command = [shell, *(["--no-config"] if shell == "fish" else ["--norc"]), "-c", COMPLETE[shell], str(script)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [*command, "some-tool", *words], capture_output=True, text=True, check=True, cwd=folder, env=environment
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize("shell", COMPLETE)
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], {"serve", "models"}),
        (["s"], {"serve"}),
        (["models", ""], {"add", "serve"}),
        (["models", "add", "--f"], {"--force"}),
        (["serve", "--p"], {"--port"}),
        (["models", "serve", "--p"], {"--place"}),
        (["serve", "--s"], set()),
        (["serve", "--dtype", ""], {"auto", "float32", "bfloat16"}),
        (["serve", "--dtype", "b"], {"bfloat16"}),
        (["serve", "--port", "1", "--d"], {"--dtype"}),
        (["--completion", "z"], {"zsh"}),
    ],
)
def test_commands_flags_and_choices_are_offered(
    shell: str, words: list[str], offered: set[str], tmp_path: Path
) -> None:
    assert completed(shell, tmp_path, *words) == offered


def test_a_file_may_follow_where_no_command_does(tmp_path: Path) -> None:
    """Then bash has nothing of ours to offer, and completes names of files."""
    assert completed("bash", tmp_path, "serve", "") == set()
    assert "complete -o default -F _some_tool some-tool" in completion(parser(), "bash")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script_without_an_error(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = tmp_path / "script"
    script.write_text(completion(parser(), shell))
    subprocess.run([shell, "-n", str(script)], check=True)


def test_the_flag_prints_the_script_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parser().parse_args(["--completion", "bash"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == completion(parser(), "bash")


def test_a_shell_that_is_not_known_is_answered_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--completion", "bsh"])
    assert "'bsh' is none of bash, zsh, fish; did you mean 'bash'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "offered"), [("client", ["em"], "embed"), ("server", ["models", "fit"], "fit-head")]
)
def test_both_commands_print_a_script_that_completes_them(command: str, words: list[str], offered: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    printed = [sys.executable, "-m", f"tome_{command}", "--completion", "bash"]
    script = subprocess.run(printed, capture_output=True, text=True, check=True).stdout
    line = " ".join([f"tome-{command}", *words])
    complete = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _tome_{command}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc"], input=script + complete, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{offered}\n", "")
