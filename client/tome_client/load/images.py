"""The images that are sent, and what is known of them."""

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
    """Its class, by the model's name or index of it; None where nobody said."""


def read_samples(folder: Path, labels: Path | None = None, *, most: int | None = None, seed: int = 0) -> list[Sample]:
    """Reads the images in a folder and the folders in it, once.

    Labels come from a JSON file, or, where every image lies in a subfolder, are these folders' names; one that
    only some images have is none.

    Args:
        folder: Holds JPEG, PNG, WebP or BMP files.
        labels: A JSON object from an image's path inside the folder, or its name, to its label. Every image has one.
        most: Reads no more than this many, drawn by `seed`.
        seed: Of that draw.

    Raises:
        ValueError: No images in the folder; one that the labels leave out; labels that are no JSON object.
        OSError: A file cannot be read.
    """
    # A folder that is not there would look like an empty one.
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
        raise ValueError(  # noqa: TRY004 # The file's fault, not the caller's.
            f"{listed}: must be a JSON object, from an image's name to its label"
        )
    named = {}
    for file in files:
        label = labels.get(file.relative_to(folder).as_posix(), labels.get(file.name))
        if label is None:
            raise ValueError(f"{listed}: no label for {file.relative_to(folder).as_posix()}")
        named[file] = str(label)
    return named
