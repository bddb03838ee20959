"""The images that a run sends, and their labels."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tome_client.inputs import image_files


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to send."""

    name: str
    """Path inside its folder."""
    data: bytes
    """The encoded image."""
    label: str | None = None
    """The name or the index of its class; None if it is unknown."""


def read_samples(folder: Path, labels: Path | None = None, *, most: int | None = None, seed: int = 0) -> list[Sample]:
    """Reads the images in a folder and its subfolders.

    Labels come from a JSON file. Without one, the names of the subfolders are the labels if every image is in a
    subfolder, and otherwise there are no labels.

    Args:
        folder: The folder, with JPEG, PNG, WebP or BMP files.
        labels: A JSON file that maps each image's path inside the folder, or its name, to its label.
        most: Reads at most this many images, chosen at random.
        seed: Seed of that choice.

    Raises:
        ValueError: The folder has no images, the labels lack one of them, or the file is not a JSON object.
        OSError: A file cannot be read.
    """
    # Without this, a folder that is not there would look like an empty one.
    folder.stat()
    files = image_files(folder)
    if not files:
        raise ValueError(f"no JPEG, PNG, WebP or BMP image in {folder}")
    named = _labels(files, folder, labels)
    if most is not None and most < len(files):
        files = sorted(random.Random(f"images {seed}").sample(files, most))
    return [Sample(file.relative_to(folder).as_posix(), file.read_bytes(), named.get(file)) for file in files]


def _labels(files: list[Path], folder: Path, listed: Path | None) -> dict[Path, str]:
    if listed is None:
        by_folder = {file: file.parent.name for file in files if file.parent != folder}
        return by_folder if len(by_folder) == len(files) else {}
    try:
        labels = json.loads(listed.read_bytes())
    except ValueError as error:
        raise ValueError(f"{listed}: not JSON: {error}") from None
    if not isinstance(labels, dict):
        raise ValueError(  # noqa: TRY004 # The file is wrong, not the argument's type.
            f"{listed}: must be a JSON object that maps each image's name to its label"
        )
    named = {}
    for file in files:
        label = labels.get(file.relative_to(folder).as_posix(), labels.get(file.name))
        if label is None:
            raise ValueError(f"{listed}: no label for {file.relative_to(folder).as_posix()}")
        named[file] = str(label)
    return named
