"""`tome-client predict`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from tome_api.parser import Parser
from tome_client.arguments import Commands, add_merging_arguments, budget
from tome_client.cli import bulk
from tome_client.cli.bulk import Outcome
from tome_client.cli.images import IMAGE_USAGE, add_image_arguments, named_images
from tome_client.cli.progress import at_terminal
from tome_client.json_text import json_line
from tome_client.requests import PredictOptions
from tome_client.tables import prediction_header, prediction_line

_DESCRIPTION = """\
Classifies images and shows, for each, how much the server merged. Several images share one stream, and each result is
printed as soon as it arrives. An image that can't be answered within --budget is refused immediately, and the refusal
says which budget would have been accepted.
"""

_EXAMPLES = """\
examples:
  tome-client predict shirt.png                          one image, within the model's default budget
  tome-client predict photos/ 'more/**/*.jpg'            all images in a folder and below, and those of a pattern
  tome-client predict *.jpg --budget 50ms                each answered within 50 ms, or refused
  find . -newer stamp | tome-client predict --from-file -          the files that another command lists
  curl -s https://host/shirt.png | tome-client predict -           an image from elsewhere
  tome-client predict photos/ --json > answers.jsonl     one JSON object a line

Exits with 0 if every image was answered, and 1 if one was not.
"""


def add_to(commands: Commands, parent: Parser) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "predict",
        parents=[parent],
        usage=f"%(prog)s {IMAGE_USAGE}",
        help="classify images",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=partial(_run, command))
    add_image_arguments(command)
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
        help="print a line of JSON for each image, as soon as it is answered or has failed; numbers that aren't finite "
        "are printed as null",
    )


def _run(command: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Classifies images, and prints each result as soon as it arrives."""
    images = named_images(command, args)
    options = PredictOptions(**bulk.options_of(args), top_k=args.top_k)
    show = _show_json if args.json else _table(images.names)
    return bulk.run(args, images, options, show, progress=at_terminal())


def _show_json(one: Outcome) -> None:
    print(json_line(one.fields()), flush=True)


def _table(names: Sequence[str]) -> Callable[[Outcome], None]:
    """Returns a function that prints results as lines of a table, the first after the header."""
    width = max(map(len, ("image", *names)))
    begun = False

    def show(one: Outcome) -> None:
        nonlocal begun
        if one.result is None:
            return
        if not begun:
            print(prediction_header(width))
            begun = True
        print(prediction_line(width, one.image, one.result, one.round_trip), flush=True)

    return show
