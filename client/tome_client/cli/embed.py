"""`tome-client embed`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from tome_api.nearest import meant
from tome_api.parser import Parser
from tome_client.arguments import Commands, add_merging_arguments, budget
from tome_client.cli import bulk
from tome_client.cli.bulk import Outcome
from tome_client.cli.embedding_files import FORMATS, embedding_file
from tome_client.cli.images import add_image_arguments, named_images
from tome_client.requests import PredictOptions

_DESCRIPTION = """\
Writes the features (embeddings) of images to a file, in the order of the command line. This is bulk work: images have
no deadline unless --budget sets one, and the server runs them when it has room. An image that fails is reported and has
no row.
"""

_EXAMPLES = """\
examples:
  tome-client embed photos/ -o photos.npy                an array, and photos.paths.txt with the path of each row
  tome-client embed photos/ -o photos.jsonl              a line for each image
  tome-client embed photos/ -o photos.parquet            a table; needs pyarrow: pip install 'tome-serving[parquet]'
  tome-client embed photos/ -o photos.npy --normalize --float16      for search by cosine, in half the space
  tome-client embed photos/ -o photos.npy --r 0          without merging

Exits with 0 if every image was answered. If some were not, it exits with 1, and the file has the others.
"""


def add_to(commands: Commands, parent: Parser) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "embed",
        parents=[parent],
        usage="%(prog)s [options] -o FILE IMAGE [IMAGE ...]",
        help="write the features of images to a file",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=partial(_run, command))
    add_image_arguments(command)
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=_output,
        metavar="FILE",
        help=f"file to write, replaced if it exists: {', '.join(FORMATS)} by its suffix",
    )
    command.add_argument(
        "--normalize", action="store_true", help="divide the features of each image by their Euclidean length"
    )
    command.add_argument(
        "--float16", action="store_true", help="half the bytes, three digits, and infinite beyond 65,504"
    )
    command.add_argument(
        "--budget",
        type=budget,
        default=float("inf"),
        metavar="TIME",
        help="longest the server may take for each image, such as 200ms (default: none, no deadline)",
    )
    add_merging_arguments(command)


def _run(command: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Writes the features of images."""
    images = named_images(command, args)
    options = PredictOptions(
        **bulk.options_of(args), top_k=1, features=True, normalize=args.normalize, float16=args.float16
    )
    with embedding_file(args.output, float16=args.float16) as file:

        def write(one: Outcome) -> None:
            if one.result is not None:
                file.add(one.image, one.result)

        shown = bool(sys.stderr and sys.stderr.isatty())
        status = bulk.run(args, images, options, write, in_order=True, progress=shown)
    if written := file.description():
        print(written)
    return status


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise argparse.ArgumentTypeError(
            f"the format of {text!r} is not known; its name must end in one of {known}{meant(path.suffix, FORMATS)}"
        )
    return path
