"""Files of embeddings: .npy, .jsonl and .parquet, written row by row.

numpy is not part of the plain install. Its file format is a header followed by the numbers.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tome_client.json_text import json_line
from tome_client.results import PredictResult

# The .npy header with its magic string: it holds any shape, and numpy aligns the numbers to 64 bytes.
_HEADER_BYTES: Final = 128

# A Parquet file is written in groups of rows, so one group is kept in memory.
_GROUP_ROWS: Final = 1024


class EmbeddingFile(ABC):
    """A file that rows are added to. It is written under another name, and moved to its place when it is complete."""

    def __init__(self, path: Path, *, float16: bool) -> None:
        self._path = path
        self._float16 = float16
        self._part = path.with_name(f"{path.name}.part")
        self._dim = 0
        # Rows, and what `_write` returned after the last of them. One value, so that Ctrl-C can't part them.
        self._written = (0, 0)

    def add(self, image: str, result: PredictResult) -> None:
        """Adds the features of an image.

        Raises:
            ValueError: There are none, or not as many as in the rows before.
            OSError: The file can't be written.
        """
        features = result.features
        if features is None:
            raise ValueError(f"{image}: the server sent no features")
        if self._rows == 0:
            self._dim = len(features)
        if len(features) != self._dim:
            raise ValueError(
                f"{image}: got {len(features)} features, and {self._dim} for the images before; was the model replaced?"
            )
        self._written = (self._rows + 1, self._write(image, result, features))

    def description(self) -> str:
        """Returns what was written, for a person; an empty text if nothing was."""
        return f"{self._path}: {self._rows:,} × {self._dim} {self._dtype}" if self._rows else ""

    def complete(self) -> None:
        """Moves the file to its place. Without a row there is no file, and an older one stays."""
        self._finish()
        if self._rows:
            self._part.replace(self._path)

    @abstractmethod
    def discard(self) -> None:
        """Closes the files, and removes those that were not moved."""

    @property
    def _rows(self) -> int:
        return self._written[0]

    @property
    def _dtype(self) -> str:
        return "float16" if self._float16 else "float32"

    def _packed(self, features: Sequence[float]) -> bytes:
        return struct.pack(f"<{len(features)}{'e' if self._float16 else 'f'}", *features)

    @abstractmethod
    def _write(self, image: str, result: PredictResult, features: Sequence[float]) -> int:
        """Writes a row; returns where it ends in the file whose rows have no fixed length, if there is one."""

    @abstractmethod
    def _finish(self) -> None:
        """Writes what is still to be written, and closes the file. An interrupted row is cut off."""


class _JsonLines(EmbeddingFile):
    """A JSON object a line."""

    def __init__(self, path: Path, *, float16: bool) -> None:
        super().__init__(path, float16=float16)
        self._file = self._part.open("wb")

    def discard(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _write(self, image: str, result: PredictResult, features: Sequence[float]) -> int:
        # float16 and float32 have up to 5 and 9 digits, and Python would write all 17 of the double.
        digits = ".5g" if self._float16 else ".9g"
        values = [float(format(value, digits)) for value in features]
        row = {"path": image, "model": result.model, "r": result.merging.r, "embedding": values}
        self._file.write(json_line(row).encode() + b"\n")
        return self._file.tell()

    def _finish(self) -> None:
        self._file.truncate(self._written[1])
        self._file.close()


class _Npy(EmbeddingFile):
    """An array of numpy's, and beside it a text file that has the path of each row in its lines."""

    def __init__(self, path: Path, *, float16: bool) -> None:
        super().__init__(path, float16=float16)
        self._paths = path.with_suffix(".paths.txt")
        self._paths_part = self._paths.with_name(f"{self._paths.name}.part")
        self._file = self._part.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)
        self._listed = self._paths_part.open("wb")

    def discard(self) -> None:
        self._file.close()
        self._listed.close()
        self._part.unlink(missing_ok=True)
        self._paths_part.unlink(missing_ok=True)

    def description(self) -> str:
        """Returns what was written, for a person; an empty text if nothing was."""
        return f"{written}; the path of each row: {self._paths}" if (written := super().description()) else ""

    def complete(self) -> None:
        """Moves both files to their places."""
        super().complete()
        if self._rows:
            self._paths_part.replace(self._paths)

    def _write(self, image: str, result: PredictResult, features: Sequence[float]) -> int:  # noqa: ARG002
        if len(image.splitlines()) != 1:
            raise ValueError(f"{image!r}: a path with a line break can't be listed in {self._paths}; write .jsonl")
        self._file.write(self._packed(features))
        self._listed.write(image.encode(errors="surrogateescape") + b"\n")
        return self._listed.tell()

    def _finish(self) -> None:
        self._file.truncate(_HEADER_BYTES + self._rows * self._dim * (2 if self._float16 else 4))
        self._file.seek(0)
        self._file.write(_npy_header("<f2" if self._float16 else "<f4", (self._rows, self._dim)))
        self._file.close()
        self._listed.truncate(self._written[1])
        self._listed.close()


class _Parquet(EmbeddingFile):
    """A table with the columns path, model, r and embedding."""

    def __init__(self, path: Path, *, float16: bool) -> None:
        super().__init__(path, float16=float16)
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "writing .parquet needs pyarrow: pip install 'tome-serving[parquet]'; .npy and .jsonl need nothing more"
            ) from None
        self._arrow: Any = pyarrow
        self._parquet: Any = pyarrow.parquet
        self._writer: Any = None
        self._group: list[tuple[str, str, int, bytes]] = []

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._part.unlink(missing_ok=True)

    def _write(self, image: str, result: PredictResult, features: Sequence[float]) -> int:
        # Parquet's texts are UTF-8, and the names of files may be any bytes.
        path = image.encode(errors="surrogateescape").decode(errors="replace")
        self._group.append((path, result.model, result.merging.r, self._packed(features)))
        if len(self._group) == _GROUP_ROWS:
            self._write_group()
        return 0

    def _write_group(self) -> None:
        arrow = self._arrow
        group, self._group = self._group, []
        values = arrow.float16() if self._float16 else arrow.float32()
        schema = arrow.schema(
            {
                "path": arrow.string(),
                "model": arrow.string(),
                "r": arrow.int32(),
                "embedding": arrow.list_(values, self._dim),
            }
        )
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._part, schema)
        paths, models, merged, packed = zip(*group, strict=True)
        numbers = arrow.Array.from_buffers(values, len(packed) * self._dim, [None, arrow.py_buffer(b"".join(packed))])
        embeddings = arrow.FixedSizeListArray.from_arrays(numbers, self._dim)
        columns = [arrow.array(paths), arrow.array(models), arrow.array(merged, arrow.int32()), embeddings]
        self._writer.write_table(arrow.Table.from_arrays(columns, schema=schema))

    def _finish(self) -> None:
        if self._group:
            self._write_group()
        if self._writer is not None:
            self._writer.close()


_FILES: Final[dict[str, Callable[..., EmbeddingFile]]] = {".npy": _Npy, ".jsonl": _JsonLines, ".parquet": _Parquet}

FORMATS: Final = tuple(_FILES)
"""The suffixes of the files that can be written."""


@contextmanager
def embedding_file(path: Path, *, float16: bool) -> Iterator[EmbeddingFile]:
    """Opens a file of the format that the path's suffix names. After an exception nothing of it is left.

    Raises:
        ModuleNotFoundError: The format is .parquet, and pyarrow is not installed.
        OSError: The file can't be written.
    """
    file = _FILES[path.suffix.lower()](path, float16=float16)
    try:
        yield file
        file.complete()
    finally:
        file.discard()


def _npy_header(dtype: str, shape: tuple[int, int]) -> bytes:
    """Returns the header of numpy's format 1.0, padded to _HEADER_BYTES."""
    described = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return prefix + described.ljust(_HEADER_BYTES - 11).encode() + b"\n"
