"""The files that commands write: nothing is replaced unasked, and nothing that took long to make is lost."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from tome_server.errors import ConfigError


def check_place(flag: str, path: Path | None, overwrite: bool) -> None:
    """Raises ConfigError if the file of `flag` can't be written, or is there and `overwrite` is not given.

    It is called before the work whose result the file is to hold.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder; name a file in it")
    if path.is_file() and not overwrite:
        raise ConfigError(f"{flag}: {path} exists; --overwrite replaces it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag}: {path} can't be written")


def write(path: Path, text: str) -> None:
    """Write the file of --output; where that fails, print its text and raise ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.stdout.write(text)
        raise ConfigError(f"--output: {path}: {error.strerror}; what it was to hold is printed instead") from error


def drawing(flag: str, path: Path, overwrite: bool) -> ModuleType:
    """Return the module that draws pictures, once it is sure that one can be drawn at `path`.

    It is called before the work that the picture shows. Raises ConfigError if matplotlib is missing, which draws, if
    `path` names another kind of file, or can't be written.
    """
    check_place(flag, path, overwrite)
    try:
        pictures = importlib.import_module("tome_server.cli.pictures")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{flag}: {error}; it needs: pip install 'tome-serving[plots]'") from error
    if path.suffix not in pictures.FORMATS:
        raise ConfigError(f"{flag}: {path} must end in one of {', '.join(pictures.FORMATS)}")
    return pictures
