"""Command lines: flags that have a new name."""

import pytest

from tome_api.parser import Parser


@pytest.fixture
def parser() -> Parser:
    """A command with a required flag that was called --to, and was given in thousands."""
    outer = Parser(prog="outer")
    command: Parser = outer.add_subparsers(required=True).add_parser("command", prog="outer command")
    command.add_argument("--count", type=int, required=True, help="how many")
    command.add_argument("--name")
    command.add_argument("rest", nargs="*")
    command.add_old_name("--thousands", "--count", lambda text: f"{text}000")
    return outer


@pytest.mark.parametrize("given", [["--thousands", "3"], ["--thousands=3"]])
def test_an_old_name_stands_for_the_new_one_and_a_warning_says_so(
    parser: Parser, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parser.parse_args(["command", *given, "--name", "x"]).count == 3000
    assert capsys.readouterr().err == (
        "outer command: --thousands is now --count; the next release takes no other name\n"
    )


def test_the_new_name_warns_of_nothing(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.parse_args(["command", "--count", "3"]).count == 3
    assert capsys.readouterr().err == ""


def test_an_old_name_without_a_value_lacks_one(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["command", "--thousands"])
    assert caught.value.code == 2
    assert "argument --count: expected one argument" in capsys.readouterr().err


def test_what_follows_two_dashes_is_no_flag(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser.parse_args(["command", "--count", "1", "--", "--thousands", "3"])
    assert (args.count, args.rest) == (1, ["--thousands", "3"])
    assert capsys.readouterr().err == ""


def test_help_and_advice_know_the_new_name_alone(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["command", "--help"])
    shown = capsys.readouterr().out
    assert "--count" in shown
    assert "--thousands" not in shown
    with pytest.raises(SystemExit):
        parser.parse_args(["command", "--count", "1", "--thousand", "3"])
    assert "--thousands" not in capsys.readouterr().err


def test_the_command_line_of_the_process_is_read_likewise(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["outer", "command", "--thousands", "2"])
    assert parser.parse_args().count == 2000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--count", "3", "command"], "outer: --count is a flag of command, and comes after the command"),
        (["--name=x", "command", "--count", "3"], "outer: --name is a flag of command, and comes after the command"),
        (["--cuont", "3", "command"], "outer: there is no flag --cuont"),
        (["--help-me", "command", "--count", "3"], "outer: there is no flag --help-me; did you mean '--help'?"),
        (["3", "command"], "outer: argument {command}: '3' is none of command"),
    ],
)
def test_a_flag_of_a_command_that_comes_before_it_is_not_taken_for_a_command(
    argv: list[str], said: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[0] == said
