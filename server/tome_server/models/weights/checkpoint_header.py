"""Reads what the header of a .safetensors file says about its tensors, without torch, whose import takes seconds."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tome_server.config.text_file import open_regular
from tome_server.errors import ConfigError

SUFFIX = ".safetensors"
# The beginning of the file that git-lfs leaves in place of one that it hasn't fetched.
_POINTER = b"version https://git-lfs"
# More than a thousand times what the header of a model of hundreds of tensors takes.
MOST_HEADER = 16 * 2**20
# The types that weights may have, by safetensors' names.
_FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header describes it."""

    dtype: str
    """safetensors' name of the type, such as F32."""
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether its type is one that weights may have."""
        return self.dtype in _FLOATING


def check_header(path: Path) -> None:
    """Raises ConfigError for weights that are missing, can't be read, or are damaged by what their header says.

    Files of other formats than .safetensors are only checked to be there, and neither empty nor compressed.
    """
    try:
        with open_regular(path) as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        why = "is no file" if path.is_dir() or not path.exists() else f"can't be read: {error.strerror}"
        raise ConfigError(f"checkpoint {path} {why}") from error
    except ValueError as error:
        raise ConfigError(f"checkpoint {path} can't be read: {error}") from error
    if not start:
        raise ConfigError(f"checkpoint {path} can't be read: the file is empty")
    if start == _POINTER:
        raise ConfigError(f"checkpoint {path} is a pointer of Git LFS, not the weights: git lfs pull fetches them")
    if path.suffix == SUFFIX:
        # safetensors itself takes headers of 100 MB, which become a few hundred MB in memory.
        if (size := int.from_bytes(start[:8], "little")) > MOST_HEADER:
            raise ConfigError(
                f"checkpoint {path} can't be read: it is not a .safetensors file (its header would have {size:,} bytes)"
            )
        read_header(path)
    else:
        _check_archive(path)


def _check_archive(path: Path) -> None:
    """Raises ConfigError for an archive that holds more than the file has bytes: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return  # another format, or damaged, which reading it will say
    held = sum(part.file_size for part in parts)
    if held > path.stat().st_size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ConfigError(
            f"checkpoint {path} can't be read: it is an archive that is compressed, and would become "
            f"{held:,} bytes; torch.save compresses nothing"
        )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a .safetensors file by name. Raises ConfigError if it can't be read, or is cut short."""
    try:
        with safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            return {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"checkpoint {path} can't be read: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    text = str(error).removeprefix("Error while deserializing header: ")
    if "not fully covered" in text:
        return "the file is cut short, or longer than its header says"
    return f"it is not a .safetensors file ({text})"
