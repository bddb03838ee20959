"""Files of profiles: where they are kept, how they are written, and which of them hold for a key."""

import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tome_server.calibration.profile_key import ProfileKey, shortened
from tome_server.config.text_file import read_text, write_whole
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

FORMAT = 1


class ProfileError(Exception):
    """A stored profile can't be used, or a profile can't be stored; the message says why."""


def default_folder() -> Path:
    """Return where profiles are kept by default: a folder in the user's cache.

    Raises ProfileError if the user has no home folder.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ProfileError("there is neither a home folder nor XDG_CACHE_HOME to keep profiles in") from error
    return Path(cache) / "tome-serving" / "profiles"


def profile_path(folder: Path, name: str, key: ProfileKey) -> Path:
    """Return the file in `folder` that holds the profile of the model called `name`."""
    return folder / f"{file_name(name)}-{key.digest}.json"


def profile_text(key: ProfileKey, profile: Profile) -> str:
    """Return what a profile's file holds: JSON, one line for each part."""
    parts = {
        "format": FORMAT,
        "key": asdict(key),
        "batch_sizes": profile.sizes,
        "p50_seconds": [[_short(value) for value in row] for row in profile.p50],
        "p95_seconds": [[_short(value) for value in row] for row in profile.p95],
        "extra_group_seconds": _short(profile.extra_group),
        "packed": profile.one_call,
    }
    if profile.measured:
        measured = asdict(profile.measured)
        shares = {name: None if measured[name] is None else _short(measured[name]) for name in ("load", "spread")}
        parts["measured"] = measured | shares
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items()) + "\n}\n"


def load_profile(path: Path, key: ProfileKey) -> Profile:
    """Read a profile. Raises ProfileError if it isn't there, can't be read, or holds for another key."""
    document = _read(path)
    if different := list(key.differences(document["key"])):
        raise ProfileError(f"{path} was measured with other {'; '.join(different)}")
    try:
        return _profile(document, key)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_profile(path: Path) -> tuple[ProfileKey, Profile]:
    """Read a profile and its key, whatever that is. Raises ProfileError if it isn't there or can't be read."""
    document = _read(path)
    stored: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document["key"].items()
    }
    try:
        key = ProfileKey(**stored)
        return key, _profile(document, key)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def save_profile(path: Path, key: ProfileKey, profile: Profile) -> None:
    """Write a profile, whole or not at all, and its folder if need be. Raises ProfileError if it can't be written."""
    save_text(path, profile_text(key, profile))


def save_text(path: Path, text: str) -> None:
    """Write a file of the store, whole or not at all. Raises ProfileError if it can't be written."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise ProfileError(f"{path} can't be written: {error.strerror or error}") from error


def keep_profile(folder: Path | None, name: str, key: ProfileKey, profile: Profile) -> Path | None:
    """Store a profile in `folder` (None: `default_folder`). Return the file, or None after a warning in the log."""
    try:
        path = profile_path(folder or default_folder(), name, key)
        save_profile(path, key, profile)
    except ProfileError as error:
        log.warning("the profile of %s isn't kept, and will be measured again at the next start: %s", name, error)
        return None
    return path


def nearest_path(folder: Path, name: str, key: ProfileKey) -> Path:
    """Return the model's file or, if it isn't there, the one whose key differs least, so that messages can say how."""
    path = profile_path(folder, name, key)
    try:
        found = sorted(folder.glob(f"{file_name(name)}-????????.json"))
    except OSError:
        return path  # reading it will say why it can't be read
    others: list[tuple[int, Path]] = []
    for other in [] if path in found else found:
        try:
            others.append((len(list(key.differences(_read(other)["key"]))), other))
        except ProfileError:
            continue  # damaged
    return min(others, default=(0, path))[1]


def _read(path: Path) -> dict[str, Any]:
    """Return the document in a file, after a check of its format and key. Raises ProfileError."""
    try:
        document = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ProfileError(f"there is no {path}") from error
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or "format" not in document:
        raise ProfileError(f"{path} is no profile")
    if document["format"] != FORMAT:
        raise ProfileError(f"{path} has format {shortened(document['format'])}; this version reads {FORMAT}")
    if not isinstance(document.get("key"), dict):
        raise ProfileError(f"{path} is damaged: 'key' is missing")
    return document


def _profile(document: dict[str, Any], key: ProfileKey) -> Profile:
    """Return the profile in a document. Raises KeyError, TypeError or ValueError if it holds none."""
    sizes, one_call = document["batch_sizes"], document["packed"]
    if type(one_call) is not bool or any(type(size) is not int for size in sizes):
        raise TypeError("packed must be true or false, and batch sizes whole numbers")
    profile = Profile(
        sizes=tuple(sizes),
        rs=key.rs,
        p50=tuple(map(tuple, document["p50_seconds"])),
        p95=tuple(map(tuple, document["p95_seconds"])),
        extra_group=document["extra_group_seconds"],
        one_call=one_call,
        measured=_measured(document.get("measured")),
    )
    if profile.max_batch != key.max_batch:
        raise ValueError(f"batch sizes end at {profile.max_batch}")
    return profile


def _measured(part: dict[str, Any] | None) -> Measured | None:
    """Return how a profile was measured; None if an older version wrote it, which didn't record that.

    Raises KeyError, TypeError or ValueError for a damaged part.
    """
    if part is None:
        return None
    rounds, extrapolated = part["rounds"], part["extrapolated"]
    if type(rounds) is not int or type(extrapolated) is not bool:
        raise TypeError("rounds must be a whole number, and extrapolated true or false")
    return Measured(rounds, part["load"], part["spread"], extrapolated)


def _damaged(path: Path, error: Exception) -> ProfileError:
    return ProfileError(f"{path} is damaged: {f'{error} is missing' if isinstance(error, KeyError) else error}")


def _short(value: float) -> float:
    """Return six significant digits of a value, more than can be measured. Rounding keeps the order of values."""
    return float(f"{value:.6g}")


def file_name(name: str) -> str:
    """Return a model's name with all characters replaced that a file's name may not hold."""
    return re.sub(r"[^\w.-]", "_", name)
