"""The frame of `tome-client`: its parser, and how each of its commands is run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tome_api.completion import add_completion
from tome_api.parser import Parser
from tome_api.terminal import never_refuse
from tome_client.arguments import error_text, warn
from tome_client.cli import embed, models, predict, visualize, wait
from tome_client.cli.connecting import hint
from tome_client.cli.statuses import INTERRUPTED, PIPE_CLOSED
from tome_client.connection import connection_options
from tome_client.errors import TomeError
from tome_client.load.command import add_load_command
from tome_client.version import __version__

_EXAMPLES = """\
examples:
  tome-client predict shirt.png                     one image, within the model's default budget
  tome-client predict *.jpg photos/                 files and folders, without a deadline
  tome-client predict *.jpg --budget 50ms           each answered within 50 ms, or refused
  tome-client predict shirt.png --r 8 --json        exactly 8 tokens merged in each block
  tome-client embed photos/ --output photos.npy     the features of every image in a folder
  tome-client models                                which models the server has
  tome-client models fashion                        what each r of a model costs and keeps
  tome-client visualize shirt.png --r 8 -o out.png  which patches were merged
  tome-client load --images DIR --rate 40 --budget 100ms    what share of 40 requests a second is answered in time
  tome-client wait --timeout 2m                     until the server is ready
  TOME_TARGET=vision.example:443 tome-client --tls models

Exits with 0 if everything was answered, 1 if anything failed, 2 if the command line is wrong, 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    never_refuse()
    args = argument_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        print(end="", flush=True)  # Unlike a stream's own flush, this may have no stream.
    except BrokenPipeError:
        # Python flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (TomeError, ImportError, OSError, ValueError) as error:
        warn(f"{error_text(error)}{hint(error, args)}")
        return 1
    except KeyboardInterrupt:
        warn("interrupted")
        return INTERRUPTED
    return status


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    parser = Parser(
        prog="tome-client",
        usage="%(prog)s [options] COMMAND ...",
        description="Has a tome-serving server classify images, within a latency budget if you set one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[connection_options()],
    )
    parser.add_argument("--version", action="version", version=f"tome-client {__version__}")
    add_completion(parser)
    # The flags may also follow a command. There, those that are left out must not undo those before the command.
    parent = connection_options(default=argparse.SUPPRESS)
    # Otherwise argparse would put the usage above in front of each command's.
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)

    predict.add_to(commands, parent)
    embed.add_to(commands, parent)
    models.add_to(commands, parent)
    visualize.add_to(commands, parent)
    add_load_command(commands, parent)
    wait.add_to(commands, parent)
    return parser
