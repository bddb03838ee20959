"""The `tome-server` command: its parser's frame, and how each of its commands is run."""

import argparse
import os
import sys
from collections.abc import Sequence

from tome_api.completion import add_completion
from tome_api.parser import Parser
from tome_api.terminal import never_refuse
from tome_server.cli import demo, evaluate, models, plan, profile, serve, settings, tune
from tome_server.errors import ConfigError, DatasetError, DeviceDiedError, ModelLoadError, PortInUseError
from tome_server.signals import interruptible

# A command's module is imported for its parser, so it imports torch, timm and pydantic only when it runs: they take
# seconds, and the plain install, which is the client alone, has none of them.
COMMANDS = (serve, demo, evaluate, tune, profile, settings, models, plan)

EPILOG = """examples:
  tome-server serve                                     the bundled model, on port 8500
  tome-server serve --model vit_base_patch16_224 --default-budget 200ms
  tome-server serve --config server.yaml
  tome-server demo                                      see it work
  tome-server evaluate --data images/ --output quality.json
  tome-server tune --data images/ --output quality.json how much each block should merge
  tome-server profile --picture profile.png             how long batches take at each r
  tome-server plan --rate 200 --budget 150ms            how many replicas that takes, and at what quality
"""

# How many kernels oneDNN caches. Its default of 1,024 is fewer than a model needs for batches of 1 to 8 at the r of its
# grid (about 1,400). Making dropped ones again takes some 25 ms a batch of the bundled model, twice that of one image.
KERNELS_KEPT = "8192"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, 1 for a failure (said on standard error), 2 for wrong usage, or 130 if Ctrl-C ended it.
    """
    never_refuse()
    with interruptible():
        sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int | str:
    """Run the command; returns its exit status, or a sentence that says why it failed."""
    args = _parser().parse_args(argv)
    # This must come before torch is imported. Otherwise its idle threads spin, and take the CPU from other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # This must come before any kernel is made. Each is for one number of tokens; batch sizes times r make thousands.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
    try:
        status: int = args.run(args)
    except (ConfigError, DatasetError, DeviceDiedError, ModelLoadError, PortInUseError) as error:
        return f"tome-server: {error}"
    except ModuleNotFoundError as error:
        # The plain install has this command too, but only the client's packages.
        return f"tome-server: {error}; the server needs: pip install 'tome-serving[server]'"
    except OSError as error:
        if error.filename is None:
            raise
        return f"tome-server: {error.filename}: {error.strerror}"
    return status


class _Version(argparse.Action):
    """Prints the version, which takes longer to look up than all flags to read."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002 (argparse's name)
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tome-serving {version('tome-serving')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tome-server",
        description="Serves Vision Transformers over gRPC, merging tokens (ToMe) as far as each deadline requires.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
