"""Which images a command line names: files, folders, patterns, standard input, and lists of paths."""

from __future__ import annotations

import argparse
import codecs
import glob
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tome_client.inputs import Image, image_files

STDIN = "-"

IMAGE_USAGE = "[options] IMAGE [IMAGE ...]"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class NamedImages:
    """The images that a command line names, in its order."""

    names: list[str]
    """The paths as they were given, or found in folders and by patterns, in the order of their names there; "-" for
    standard input."""
    problems: list[str]
    """A line for each argument that stands for no image."""
    alone: bool
    """Whether the command line is one file, or standard input: then a person or a script asks for this image now."""
    stdin: bytes
    """What "-" stands for."""

    def image(self, number: int) -> Image:
        """Returns the image to send."""
        name = self.names[number]
        return self.stdin if name == STDIN else name


def add_image_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that name the images; `named_images` reads them."""
    command.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="JPEG, PNG, WebP or BMP file; a folder, for all such files in it and below; a pattern in quotes, such as "
        "'photos/**/*.jpg'; or - for an image on standard input. URLs are not fetched",
    )
    command.add_argument(
        "--from-file",
        metavar="FILE",
        help="read names of images from this file too, one a line, or from standard input if it is -",
    )


def named_images(command: argparse.ArgumentParser, args: argparse.Namespace) -> NamedImages:
    """Finds the images that the arguments name; ends the command if they name none, or standard input twice.

    Raises:
        OSError: The file of --from-file or standard input can't be read.
    """
    if not args.images and args.from_file is None:
        command.error("the following arguments are required: IMAGE, or --from-file FILE")
    if STDIN in args.images and args.from_file == STDIN:
        command.error("standard input is either an image or the list of --from-file, not both")
    given = list(args.images)
    names: list[str] = []
    problems: list[str] = []
    if args.from_file is not None:
        listed = _listed(args.from_file)
        given += listed
        if not listed:
            problems.append(f"{args.from_file}: there is no name of an image in this list")
    for one in given:
        if _URL.match(one):
            problems.append(f"{one}: URLs are not fetched; download the image and name its file, or pipe it to -")
        elif _is(one, Path.is_dir):
            found = list(map(str, image_files(Path(one))))
            names += found
            if not found:
                problems.append(f"{one}: there is no JPEG, PNG, WebP or BMP file in this folder")
        elif any(sign in one for sign in "*?[") and not _is(one, Path.exists):
            found = sorted(file for file in glob.iglob(one, recursive=True) if Path(file).is_file())  # noqa: PTH207
            names += found
            if not found:
                problems.append(f"{one}: no file matches this pattern")
        else:
            names.append(one)
    stdin = _stdin() if STDIN in names else b""
    return NamedImages(
        names, problems, alone=args.from_file is None and len(given) == 1 and names == given, stdin=stdin
    )


def _is(name: str, question: Callable[[Path], bool]) -> bool:
    """Whether the answer is yes; no for a name that is too long for a file."""
    with suppress(OSError):
        return question(Path(name))
    return False


def _listed(file: str) -> list[str]:
    """Returns the lines of a list, in the encoding of file names, without the empty ones."""
    data = _stdin() if file == STDIN else Path(file).read_bytes()
    lines = map(os.fsdecode, data.removeprefix(codecs.BOM_UTF8).splitlines())
    # In a list, - is a file of that name.
    return [f"./{STDIN}" if line == STDIN else line for line in lines if line]


def _stdin() -> bytes:
    """Reads standard input.

    Raises:
        ValueError: It is a terminal, on which a person would wait for the command and it for the person.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("- stands for standard input, and nothing is piped into it")
    return sys.stdin.buffer.read()
