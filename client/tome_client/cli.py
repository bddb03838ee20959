"""The command `tome-client`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from tome_client.arguments import add_merging_arguments, duration, error_text, merging_options
from tome_client.client import Client
from tome_client.connection import connection, connection_options
from tome_client.errors import TomeError
from tome_client.json_text import json_text
from tome_client.load.command import add_load_command
from tome_client.requests import PredictOptions, StreamItem
from tome_client.results import PredictResult
from tome_client.tables import model_details, model_table, prediction_table, prediction_text
from tome_client.version import __version__

_EXAMPLES = """\
examples:
  tome-client predict shirt.png                     no deadline of its own: the model's default
  tome-client predict *.jpg --budget 50ms           each answered in 50 ms, or refused
  tome-client predict shirt.png --r 8 --json        exactly 8 tokens merged in each block
  tome-client models                                what is hosted
  tome-client models fashion                        what each r of one model costs and keeps
  tome-client visualize shirt.png --r 8 -o out.png  which patches were merged
  tome-client load --images DIR --rate 40 --budget 100ms    what share of 40 requests a second is answered in time
  TOME_TARGET=vision.example:443 tome-client --tls models

Exits with 0 if all was answered, 1 if anything failed, 2 if the command line is wrong.
"""


# By what gRPC says.
_HINTS = {
    "Failed to connect": "is a server running there? tome-server serve starts one, --target names another",
    "DNS resolution failed": "--target names the server, as HOST:PORT",
    "WRONG_VERSION_NUMBER": "the server there speaks plain text: leave out --tls and --ca",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = argument_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (TomeError, ImportError, OSError, ValueError) as error:
        print(f"tome-client: {_one_line(error)}{_hint(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser; what it parses has the command as `run`."""
    parser = argparse.ArgumentParser(
        prog="tome-client",
        usage="%(prog)s [options] COMMAND ...",
        description="Asks a tome-serving server to classify images within a latency budget.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[connection_options()],
    )
    parser.add_argument("--version", action="version", version=f"tome-client {__version__}")
    # After a command too, where what is not given must not undo what stood before it.
    parent = connection_options(default=argparse.SUPPRESS)
    # Else the usage above would stand in front of each command.
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog)

    command = commands.add_parser(
        "predict",
        parents=[parent],
        usage="%(prog)s [options] IMAGE [IMAGE ...]",
        help="classify images",
        description="Classifies images, all of them over one stream, and shows for each what the server merged to be "
        "in time. One that can't be answered within --budget is refused at once, with the smallest latency possible.",
    )
    command.set_defaults(run=predict)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP or BMP file")
    command.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="longest the server may take for each, such as 50ms or 0.2s (default: what the model's settings say)",
    )
    add_merging_arguments(command)
    command.add_argument("--top-k", type=int, default=3, metavar="K", help="classes to show (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print a JSON array; what is no finite number is null")

    command = commands.add_parser(
        "models",
        parents=[parent],
        usage="%(prog)s [options] [NAME]",
        help="list or describe models",
        description="Lists the models of a server or, given a name, tells what one takes and what each r of it costs "
        "and keeps.",
    )
    command.set_defaults(run=models)
    command.add_argument("name", nargs="?", metavar="NAME", help="describe this model in full")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = commands.add_parser(
        "visualize",
        parents=[parent],
        usage="%(prog)s [options] -o FILE IMAGE",
        help="draw which patches were merged",
        description="Draws the model's input beside its merged tokens: every patch in the mean "
        "colour of the patches it was merged with, lines between tokens. Needs Pillow: "
        "pip install 'tome-serving[visualize]'",
    )
    command.set_defaults(run=visualize)
    command.add_argument("image", metavar="IMAGE", help="an image file")
    command.add_argument("--model", default="", metavar="NAME", help="which model (default: the server's first)")
    command.add_argument(
        "--r", type=int, metavar="N", help="tokens to merge in each block (default: the server chooses)"
    )
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="picture to write")

    add_load_command(commands, parent)
    return parser


def predict(args: argparse.Namespace) -> int:
    """Classifies the images named."""
    outcomes = _classify(args)
    for one in outcomes:
        if one.error:
            print(f"tome-client: {one.image}: {_one_line(one.error)}{_hint(one.error)}", file=sys.stderr)
    if args.json:
        print(json_text([one.fields() for one in outcomes]))
    elif any(one.result for one in outcomes):
        print(prediction_table((one.image, one.result, one.round_trip) for one in outcomes if one.result))
    return int(any(one.error for one in outcomes))


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
    round_trip: float
    """Seconds from sending to answer."""

    def fields(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return {
            "image": self.image,
            "result": asdict(self.result) if self.result else None,
            "error": _error_fields(self.error) if self.error else None,
            "round_trip": self.round_trip,
        }


def _classify(args: argparse.Namespace) -> list[_Outcome]:
    """Sends the images over one stream, so that they can share batches; returns them in order."""
    options = PredictOptions(**merging_options(args), budget=args.budget, top_k=args.top_k)
    sent: dict[str, float] = {}
    outcomes: dict[str, _Outcome] = {}

    def outcome(number: str, result: PredictResult | None, error: TomeError | None) -> _Outcome:
        now = time.perf_counter()
        return _Outcome(args.images[int(number)], result, error, now - sent.get(number, now))

    def items() -> Iterator[StreamItem]:
        for number, image in enumerate(args.images):
            sent[str(number)] = time.perf_counter()
            yield StreamItem(str(number), image, options)

    unanswered = TomeError(grpc.StatusCode.UNKNOWN, "the stream ended without an answer")
    with _client(args) as client:
        try:
            for one in client.predict_stream(items()):
                outcomes[one.id] = outcome(one.id, one.result, one.error)
        except TomeError as error:
            unanswered = error
    return [outcomes.get(number) or outcome(number, None, unanswered) for number in map(str, range(len(args.images)))]


def _client(args: argparse.Namespace) -> Client:
    return Client(args.target, **connection(args))


def _one_line(error: Exception) -> str:
    return " ".join(error_text(error).split())


def _hint(error: Exception | None) -> str:
    """Returns what may mend it, of what stands in the way of a connection."""
    return next((f"; {hint}" for part, hint in _HINTS.items() if part in str(error)), "")


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
