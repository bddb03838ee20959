"""The command `tome-client`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from tome_api.parser import Parser
from tome_api.terminal import never_refuse
from tome_client.arguments import Commands, add_merging_arguments, budget, error_text, merging_options, warn
from tome_client.client import Client
from tome_client.connection import connection, connection_options
from tome_client.errors import TomeError
from tome_client.inputs import image_files
from tome_client.json_text import json_text
from tome_client.load.command import add_load_command
from tome_client.reachability import advice
from tome_client.requests import PredictOptions, StreamItem, unsendable
from tome_client.results import PredictResult
from tome_client.tables import model_details, model_table, prediction_header, prediction_line, prediction_text
from tome_client.version import __version__

_EXAMPLES = """\
examples:
  tome-client predict shirt.png                     one image, within the model's default budget
  tome-client predict *.jpg photos/                 files and folders, without a deadline
  tome-client predict *.jpg --budget 50ms           each answered within 50 ms, or refused
  tome-client predict shirt.png --r 8 --json        exactly 8 tokens merged in each block
  tome-client models                                which models the server has
  tome-client models fashion                        what each r of a model costs and keeps
  tome-client visualize shirt.png --r 8 -o out.png  which patches were merged
  tome-client load --images DIR --rate 40 --budget 100ms    what share of 40 requests a second is answered in time
  TOME_TARGET=vision.example:443 tome-client --tls models

Exits with 0 if everything was answered, 1 if anything failed, 2 if the command line is wrong, 130 after Ctrl-C.
"""


# The codes of calls that reach no server. gRPC gives UNKNOWN for a target that it can't parse.
_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN)


_INTERRUPTED = 130

# The status that a shell reports for a command that SIGPIPE ended: the reader of its output, such as `head`, is done.
_PIPE_CLOSED = 141


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
        return _PIPE_CLOSED
    except (TomeError, ImportError, OSError, ValueError) as error:
        warn(f"{error_text(error)}{_hint(error, args)}")
        return 1
    except KeyboardInterrupt:
        warn("interrupted")
        return _INTERRUPTED
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
    # The flags may also follow a command. There, those that are left out must not undo those before the command.
    parent = connection_options(default=argparse.SUPPRESS)
    # Otherwise argparse would put the usage above in front of each command's.
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)

    _add_predict(commands, parent)
    _add_models(commands, parent)
    _add_visualize(commands, parent)
    add_load_command(commands, parent)
    return parser


def _add_predict(commands: Commands, parent: Parser) -> None:
    command = commands.add_parser(
        "predict",
        parents=[parent],
        usage="%(prog)s [options] IMAGE [IMAGE ...]",
        help="classify images",
        description="Classifies images and shows, for each, how much the server merged. Several images share one "
        "stream, and each result is printed as soon as it arrives. An image that can't be answered within --budget is "
        "refused immediately, and the refusal says which budget would have been accepted.",
    )
    command.set_defaults(run=predict)
    command.add_argument(
        "images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP or BMP file, or a folder of such files"
    )
    command.add_argument(
        "--budget",
        type=budget,
        # A budget that is left out differs from `none`.
        default=argparse.SUPPRESS,
        metavar="TIME",
        help="longest the server may take for each image, such as 50ms or 0.2s, or none for no deadline "
        "(default: the model's default budget for one image; none for several images or a folder)",
    )
    add_merging_arguments(command)
    command.add_argument(
        "--top-k", type=int, default=3, metavar="K", help="number of classes to show (default: %(default)s)"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print one JSON array when all images are done; numbers that aren't finite are printed as null",
    )


def _add_models(commands: Commands, parent: Parser) -> None:
    command = commands.add_parser(
        "models",
        parents=[parent],
        usage="%(prog)s [options] [NAME]",
        help="list or describe models",
        description="Lists the models of a server. Given a name, describes that model: its input, and the cost and "
        "accuracy of each r.",
    )
    command.set_defaults(run=models)
    command.add_argument("name", nargs="?", metavar="NAME", help="describe only this model, in full")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_visualize(commands: Commands, parent: Parser) -> None:
    command = commands.add_parser(
        "visualize",
        parents=[parent],
        usage="%(prog)s [options] -o FILE IMAGE",
        help="draw which patches were merged",
        description="Draws the model's input beside its merged tokens. Each patch has the mean colour of the patches "
        "it was merged with, and lines separate the tokens. Needs Pillow: pip install 'tome-serving[visualize]'",
    )
    command.set_defaults(run=visualize)
    command.add_argument("image", metavar="IMAGE", help="JPEG, PNG, WebP or BMP file")
    command.add_argument("--model", default="", metavar="NAME", help="name of the model (default: the server's first)")
    command.add_argument(
        "--r", type=int, metavar="N", help="tokens to merge in each block (default: the server chooses)"
    )
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write the picture to")


def predict(args: argparse.Namespace) -> int:
    """Classifies images, and prints each result as soon as it arrives."""
    images, empty = _images(args.images)
    for folder in empty:
        warn(f"{folder}: there is no JPEG, PNG, WebP or BMP file in this folder")
    shown = _Array(images) if args.json else _Lines(images)
    answered = 0
    failed: Counter[str] = Counter()
    lost: TomeError | None = None
    interrupted = False
    try:
        with _client(args) as client:
            for number, one in _classified(client, images, args):
                if one.error:
                    failed[one.error.code.name] += 1
                    # Errors of a stream's items come from a server, so it was reached.
                    hint = _hint(one.error, args) if len(images) == 1 else ""
                    warn(f"{one.image}: {error_text(one.error)}{hint}")
                else:
                    answered += 1
                shown.add(number, one)
    except TomeError as error:
        lost = error
    except KeyboardInterrupt:
        lost = TomeError(grpc.StatusCode.CANCELLED, "interrupted")
        interrupted = True
    shown.end(lost)
    if failed and len(images) > 1:
        how = ", ".join(f"{count} {code}" for code, count in failed.most_common())
        warn(f"{failed.total()} of {len(images)} images failed: {how}")
    without = f"{len(images) - answered - failed.total()} of {len(images)} images have no answer"
    if interrupted:
        warn(f"interrupted; {without}")
        return _INTERRUPTED
    if lost:
        warn(f"{without}: {error_text(lost)}{_hint(lost, args)}")
    return int(bool(empty or lost or failed))


def models(args: argparse.Namespace) -> int:
    """Lists the hosted models, or describes one."""
    with _client(args) as client:
        if args.name is None:
            listed = client.models()
            fields: object = [asdict(one) for one in listed]
            text = model_table(listed)
        else:
            model = client.model(args.name)
            fields = asdict(model)
            text = model_details(model)
    print(json_text(fields) if args.json else text)
    return 0


def visualize(args: argparse.Namespace) -> int:
    """Draws an image beside its merged tokens."""
    # Here because Pillow, which it imports, is not part of the plain install.
    from tome_client.visualize import picture_of

    with _client(args) as client:
        result = client.predict(args.image, model=args.model, r=args.r, top_k=1, token_map=True)
        expects = client.model(result.model).input
    if result.token_map is None:
        raise ValueError(f"{args.target} sent no token map")
    picture_of(args.image, expects, result.token_map).save(args.output)
    merging = result.merging
    print(
        f"{args.output}: {', '.join(prediction_text(one) for one in result.predictions)}; "
        f"r {merging.r}, {merging.tokens_in} → {merging.tokens_out} tokens, "
        f"{merging.saved_share:.1%} of FLOPs saved"
    )
    return 0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one image of the command line: it has a result or an error."""

    image: str
    result: PredictResult | None
    error: TomeError | None
    round_trip: float | None
    """Seconds from sending to the result or error; None if the stream was lost before either."""

    def fields(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return {
            "image": self.image,
            "result": asdict(self.result) if self.result else None,
            "error": _error_fields(self.error) if self.error else None,
            "round_trip": self.round_trip,
        }


class _Lines:
    """Prints results as lines of a table, each as soon as it arrives."""

    def __init__(self, images: Sequence[str]) -> None:
        self._width = max(map(len, ("image", *images)))
        self._begun = False

    def add(self, number: int, one: _Outcome) -> None:  # noqa: ARG002 # The signature is that of _Array.add.
        """Prints the result, if there is one."""
        if one.result is None:
            return
        if not self._begun:
            print(prediction_header(self._width))
            self._begun = True
        print(prediction_line(self._width, one.image, one.result, one.round_trip or 0.0), flush=True)

    def end(self, lost: TomeError | None) -> None:
        """Does nothing: all is printed."""


class _Array:
    """Prints outcomes as one JSON array, in the order of the command line, when there are no more."""

    def __init__(self, images: Sequence[str]) -> None:
        self._images = images
        self._outcomes: dict[int, _Outcome] = {}

    def add(self, number: int, one: _Outcome) -> None:
        """Keeps an outcome."""
        self._outcomes[number] = one

    def end(self, lost: TomeError | None) -> None:
        """Prints the array; images without an outcome have the error that lost them."""
        every = (self._outcomes.get(at) or _Outcome(image, None, lost, None) for at, image in enumerate(self._images))
        print(json_text([one.fields() for one in every]))


def _images(named: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the files that the arguments name, those in folders included, and the folders that have none."""
    images: list[str] = []
    empty: list[str] = []
    for name in named:
        if Path(name).is_dir():
            files = image_files(Path(name))
            images += map(str, files)
            empty += [] if files else [name]
        else:
            images.append(name)
    return images, empty


def _classified(client: Client, images: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[int, _Outcome]]:
    """Yields each image's position and what became of it, in order of completion.

    A single image is sent with Predict, so that it gets the model's default budget. Several images share a stream, so
    that they can share batches, and have no deadline unless the arguments set one.

    Raises:
        TomeError: The stream as a whole failed.
    """
    options = PredictOptions(**merging_options(args), top_k=args.top_k)
    if "budget" in args:
        options["budget"] = args.budget
    if images == args.images and len(images) == 1:
        yield 0, _predicted(client, images[0], options)
        return
    if not images:
        return
    sent: dict[str, float] = {}

    def items() -> Iterator[StreamItem]:
        for number, image in enumerate(images):
            sent[str(number)] = time.perf_counter()
            yield StreamItem(str(number), image, options)

    for one in client.predict_stream(items()):
        now, number = time.perf_counter(), int(one.id)
        yield number, _Outcome(images[number], one.result, one.error, now - sent.pop(one.id, now))


def _predicted(client: Client, image: str, options: PredictOptions) -> _Outcome:
    start = time.perf_counter()
    result, error = None, None
    try:
        result = client.predict(image, **options)
    except TomeError as refused:
        error = refused
    except (OSError, ValueError) as unreadable:
        error = unsendable(unreadable)
    return _Outcome(image, result, error, time.perf_counter() - start)


def _client(args: argparse.Namespace) -> Client:
    return Client(args.target, **connection(args))


def _hint(error: Exception, args: argparse.Namespace) -> str:
    """Returns what may help after an error, where it may mean that no server was reached."""
    # A server that refuses a request gives a reason. Then it was reached, and there is nothing to advise.
    if not isinstance(error, TomeError) or error.code not in _UNREACHED or error.reason is not None:
        return ""
    advised = advice(args.target, tls=bool(args.tls or args.ca or args.certificate))
    return f"; {advised}" if advised else ""


def _error_fields(error: TomeError) -> dict[str, Any]:
    return {
        "code": error.code.name,
        "message": error.message,
        "field_violations": [asdict(violation) for violation in error.field_violations],
        "reason": error.reason,
        "metadata": dict(error.metadata),
        "smallest_latency": error.smallest_latency,
        "retry_delay": error.retry_delay,
    }
