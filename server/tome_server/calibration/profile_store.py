"""Files of profiles: where they are kept, how they are written, and which of them hold for a key."""

import json
import logging
import os
import re
from dataclasses import asdict, fields
from pathlib import Path

from tome_server.calibration.profile_key import ProfileKey
from tome_server.config.json_file import JsonObject, read_json, shown
from tome_server.config.text_file import write_whole
from tome_server.scheduling.measured import Measured
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

FORMAT = 1
# Figures outside of these bounds are damage. Python takes longer than the least to launch one kernel; the largest of
# timm's models takes a tenth of the most for an image, on one slow CPU.
LEAST_SECONDS = 1e-7
MOST_SECONDS_AN_IMAGE = 600.0
_MOST_BATCH = 4096
_MOST_R = 2**14
_MOST_ROUNDS = 10**6
_MOST_SPREAD = 1e6
_MOST_OPERATIONS = 10**18


class ProfileError(Exception):
    """A stored profile can't be used, or a profile can't be stored; the message says why."""


class DamagedProfileError(ProfileError):
    """A file holds no profile, or figures that no measurement gives."""


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
    """Read a profile.

    Raises ProfileError if it isn't there, holds for another key, or can't be read: DamagedProfileError if what it holds
    is no profile.
    """
    document, stored = _read(path)
    if different := list(key.differences(stored.values)):
        raise ProfileError(f"{path} was measured with other {'; '.join(different)}")
    try:
        return _profile(document, key)
    except ValueError as error:
        raise _damaged(path, error) from error


def read_profile(path: Path) -> tuple[ProfileKey, Profile]:
    """Read a profile and its key, whatever that is.

    Raises ProfileError if it isn't there or can't be read: DamagedProfileError if what it holds is no profile.
    """
    document, stored = _read(path)
    try:
        key = _key(stored)
        return key, _profile(document, key)
    except ValueError as error:
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
            others.append((len(list(key.differences(_read(other)[1].values))), other))
        except ProfileError:
            continue  # damaged
    return min(others, default=(0, path))[1]


def _read(path: Path) -> tuple[JsonObject, JsonObject]:
    """Return the document in a file and its key, after a check of its format. Raises ProfileError."""
    try:
        document = read_json(path)
    except FileNotFoundError as error:
        raise ProfileError(f"there is no {path}") from error
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedProfileError(f"{path} can't be read: {error}") from error
    if "format" not in document.values:
        raise DamagedProfileError(f"{path} is no profile: format is missing")
    if document.values["format"] != FORMAT:
        raise ProfileError(f"{path} has format {shown(document.values['format'])}; this version reads {FORMAT}")
    try:
        return document, document.object("key")
    except ValueError as error:
        raise _damaged(path, error) from error


def _key(stored: JsonObject) -> ProfileKey:
    """Return a key of any model and machine. Raises ValueError if a field of it isn't as it must be."""
    texts = ("model", "weights", "device", "dtype", "torch", "timm", "tome_serving")
    later = ("schedules", "division", "merging", "attention")
    rs = stored.wholes("rs", 0, _MOST_R, _MOST_R)
    if unknown := stored.values.keys() - {field.name for field in fields(ProfileKey)}:
        raise ValueError(f"{stored.place}.{shown(min(unknown))} is unknown")
    return ProfileKey(
        **{name: stored.text(name) for name in (*texts, *(name for name in later if name in stored.values))},
        input_size=stored.wholes("input_size", 1, _MOST_R, 3),
        macs=stored.wholes("macs", 0, _MOST_OPERATIONS, _MOST_R),
        proportional_attention=stored.truth("proportional_attention"),
        threads=stored.whole("threads", 0, _MOST_R),
        max_batch=stored.whole("max_batch", 1, _MOST_BATCH),
        rs=rs,
    )


def _profile(document: JsonObject, key: ProfileKey) -> Profile:
    """Return the profile in a document. Raises ValueError if it holds none."""
    sizes = document.wholes("batch_sizes", 1, _MOST_BATCH, _MOST_BATCH)
    if not sizes or sizes[-1] != key.max_batch:
        raise ValueError(f"batch sizes end at {sizes[-1] if sizes else 'none'}")
    most = MOST_SECONDS_AN_IMAGE * key.max_batch
    profile = Profile(
        sizes=sizes,
        rs=key.rs,
        p50=document.table("p50_seconds", LEAST_SECONDS, most, _MOST_R),
        p95=document.table("p95_seconds", LEAST_SECONDS, most, _MOST_R),
        extra_group=document.number("extra_group_seconds", 0, most),
        one_call=document.truth("packed"),
        measured=_measured(document),
    )
    for size, row in zip(profile.sizes, profile.p95, strict=True):
        if row[0] > MOST_SECONDS_AN_IMAGE * size:
            raise ValueError(f"p95_seconds has {row[0]:g} s for a batch of {size}, more than any model takes")
    return profile


def _measured(document: JsonObject) -> Measured | None:
    """Return how a profile was measured; None if an older version wrote it, which didn't record that.

    Raises ValueError for a damaged part.
    """
    if not document.holds("measured"):
        return None
    part = document.object("measured")
    if "load" not in part.values:
        raise ValueError(f"{part.place}.load is missing")
    return Measured(
        rounds=part.whole("rounds", 0, _MOST_ROUNDS),
        load=part.number("load", 0, 1) if part.holds("load") else None,
        spread=part.number("spread", 1 / _MOST_SPREAD, _MOST_SPREAD),
        extrapolated=part.truth("extrapolated"),
    )


def _damaged(path: Path, error: Exception) -> DamagedProfileError:
    return DamagedProfileError(f"{path} is damaged: {error}")


def _short(value: float) -> float:
    """Return six significant digits of a value, more than can be measured. Rounding keeps the order of values."""
    return float(f"{value:.6g}")


def file_name(name: str) -> str:
    """Return a model's name with all characters replaced that a file's name may not hold."""
    return re.sub(r"[^\w.-]", "_", name)
