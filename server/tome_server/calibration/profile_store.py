"""Keeps profiles in a folder, so that a model is measured once on a machine, and knows which still hold."""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tome_server.calibration.profiling import Run, load_of_single_images, measure
from tome_server.config.text_file import read_text
from tome_server.execution.executor import run_batch
from tome_server.merging.cpu import attention_c, matching_c
from tome_server.models.loaded import LoadedModel
from tome_server.models.spec import weights_digest
from tome_server.scheduling.measured import MOST_LOAD, Measured
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)

FORMAT = 1
# Characters of a value that a message shows.
_SHOWN = 60


class ProfileError(Exception):
    """A stored profile can't be used, or one can't be stored; the message says what is the matter."""


@dataclass(frozen=True)
class ProfileKey:
    """All that a profile holds for. Where any of it differs, latencies may."""

    model: str
    """timm's architecture"""
    weights: str
    """SHA-256 of the checkpoint's file, or hub: and the name of pretrained ones"""
    input_size: tuple[int, ...]
    """channels, height, width"""
    macs: tuple[int, ...]
    """Multiply-accumulates of one image at each r: arguments of the architecture show here."""
    proportional_attention: bool
    device: str
    """the processor's or GPU's name, and whether CUDA graphs are used"""
    dtype: str
    threads: int
    """torch's, which a GPU doesn't care about: 0 there"""
    torch: str
    timm: str
    tome_serving: str
    max_batch: int
    rs: tuple[int, ...]
    """the r grid"""
    schedules: str = ""
    """tokens merged in each block, at those r of the grid where it isn't r in every block"""
    division: str = ""
    """what a few threads divide among them (merging/cpu/data_parallel.py); empty where torch divides operations"""
    merging: str = "torch"
    """whose code matches and merges tokens: C, where it was built, or torch's operators"""
    attention: str = "torch"
    """whose attention runs on one thread: C, where it was built for such a processor, or torch's"""

    @property
    def digest(self) -> str:
        """Eight characters that other keys don't share."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]


def profile_key(model: LoadedModel, checkpoint: Path | None, device: torch.device, max_batch: int) -> ProfileKey:
    """Return what a profile of `model`, measured now, holds for.

    `checkpoint` is what the model was loaded from, None for pretrained weights from the hub, which go by their name.
    """
    grid, dtype = tuple(level.r for level in model.info.grid), next(model.merged.parameters()).dtype
    return ProfileKey(
        model=model.info.architecture,
        weights=weights_digest(checkpoint) if checkpoint else f"hub:{model.info.architecture}",
        input_size=tuple(model.info.preprocess.settings.input_size),
        macs=tuple(model.info.cost(r).total for r in grid),
        proportional_attention=model.merged.proportional_attention,
        device=device_name(device) + (" with CUDA graphs" if model.graphs else ""),
        dtype=str(dtype).removeprefix("torch."),
        threads=_threads() if device.type == "cpu" else 0,
        max_batch=max_batch,
        rs=grid,
        schedules="; ".join(
            f"{r}: {' '.join(map(str, model.info.schedules[r]))}" for r in grid if r in model.info.schedules
        ),
        division=model.merged.division,
        attention="C" if dtype in attention_c.DTYPES and device.type == "cpu" else "torch",
        **code(device),
    )


def code(device: torch.device) -> dict[str, str]:
    """Return whose code runs whatever the model, as keys name it: versions, and whether merging is in C."""
    return {
        "merging": "C" if matching_c.BUILT and device.type == "cpu" else "torch",
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "tome_serving": _own_version(),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("tome-serving")
    except importlib.metadata.PackageNotFoundError:  # run from its source, not installed
        return "0+unknown"


def device_name(device: torch.device) -> str:
    """Return the processor's or GPU's name as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name(Path("/proc/cpuinfo")) or platform.processor() or platform.machine()


def default_folder() -> Path:
    """Return where profiles are kept unless told: a folder in the user's cache. Raises ProfileError without a home."""
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
    """Read a profile. Raises ProfileError if there is none, it can't be read, or holds for another key."""
    document = _read(path)
    if different := list(_differences(document["key"], key)):
        raise ProfileError(f"{path} was measured with other {'; '.join(different)}")
    try:
        return _profile(document, key)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_profile(path: Path) -> tuple[ProfileKey, Profile]:
    """Read a profile and what it holds for, whatever that is. Raises ProfileError if there is none or it can't be."""
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
    """Write a profile, whole or not at all; its folder is made if need be. Raises ProfileError if it can't be."""
    write_whole(path, profile_text(key, profile))


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all; its folder is made if need be. Raises ProfileError if it can't be."""
    # Servers may share the folder, so each writes to a file of its own.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ProfileError(f"{path} can't be written: {error.strerror or error}") from error


def obtain_profile(
    model: LoadedModel,
    checkpoint: Path | None,
    device: torch.device,
    *,
    max_batch: int,
    budget: float,
    folder: Path | None = None,
    shipped: Path | None = None,
    run: Run = run_batch,
) -> Profile:
    """Return the profile stored in `folder` (None: `default_folder`) or `shipped`, or measure one and store it.

    `shipped` is a folder that came with the model, and is only read. Where what is stored is provisional, it is
    measured again, and the better of the two is kept.
    Blocks, for at most about `budget` seconds if it measures. A store that can't be used never stops a server: the log
    says why it can't. Raises what the model raises.
    """
    key = profile_key(model, checkpoint, device, max_batch)
    reasons, provisional = list[str](), list[tuple[Path, Profile]]()
    for place in (folder, shipped) if shipped and shipped.is_dir() else (folder,):
        try:
            path = _stored(place or default_folder(), model.info.name, key)
            profile = load_profile(path, key)
        except ProfileError as error:
            reasons.append(str(error))
            continue
        if not profile.provisional:
            log.info("profile of %s read from %s: %s", model.info.name, path, _mixed(profile))
            return profile
        reasons.append(f"{path} was {profile.measured}")
        provisional.append((path, profile))
    log.info("measuring how fast %s is, for about %.0f s: %s", model.info.name, budget, "; ".join(reasons))
    profile = measure(model, device, max_batch=max_batch, budget=budget, run=run)
    kept: Path | None = None
    for path, stored in provisional:
        if _is_better(stored, profile):
            kept, profile = path, stored
    if kept:
        log.info("profile of %s read from %s: %s%s", model.info.name, kept, _mixed(profile), _doubts(profile))
        return profile
    keep_profile(folder, model.info.name, key, profile)
    log.info("profile of %s measured: %s%s", model.info.name, _mixed(profile), _doubts(profile))
    return profile


def measure_again(
    model: LoadedModel,
    checkpoint: Path | None,
    device: torch.device,
    *,
    profile: Profile,
    max_batch: int,
    budget: float,
    folder: Path | None,
    run: Run,
    stop: threading.Event,
) -> Profile | None:
    """Return and store a better profile of a model than the provisional `profile`; None if there is none to be had now.

    On a machine that is still about as busy as when `profile` was measured, that is found out by running single images
    for a moment. Blocks, for at most about `budget` seconds. Raises InterruptedError once `stop` is set, and what the
    model raises.
    """
    load = load_of_single_images(model, device, run=run, stop=stop)
    before = profile.measured.load if profile.measured else None
    if load is not None and before is not None and load > max(MOST_LOAD, before / 2):
        log.debug("%s isn't measured again while %.0f%% of the time is spent waiting", model.info.name, 100 * load)
        return None
    found = measure(model, device, max_batch=max_batch, budget=budget, run=run, stop=stop)
    if not _is_better(found, profile):
        return None
    keep_profile(folder, model.info.name, profile_key(model, checkpoint, device, max_batch), found)
    log.info(
        "profile of %s measured again while nothing else ran: %s%s", model.info.name, _mixed(found), _doubts(found)
    )
    return found


def _is_better(profile: Profile, other: Profile) -> bool:
    """Return whether a profile was measured under better circumstances than another; good if nothing is known."""
    if profile.measured is None or other.measured is None:
        return profile.measured is None
    return profile.measured.better_than(other.measured)


def _doubts(profile: Profile) -> str:
    """Return what makes a profile provisional, as the end of a sentence; empty if nothing does."""
    return f"; {profile.measured}; it will be measured again" if profile.provisional else ""


def _mixed(profile: Profile) -> str:
    return f"batches of several r run {'packed' if profile.one_call else 'split'}"


def keep_profile(folder: Path | None, name: str, key: ProfileKey, profile: Profile) -> Path | None:
    """Store a profile where `obtain_profile` will look for it; returns the file, or None after a warning in the log."""
    try:
        path = profile_path(folder or default_folder(), name, key)
        save_profile(path, key, profile)
    except ProfileError as error:
        log.warning("the profile of %s isn't kept, and will be measured again at the next start: %s", name, error)
        return None
    return path


def _stored(folder: Path, name: str, key: ProfileKey) -> Path:
    """Return the model's file or, if it isn't there, the one that differs least: to say in what it differs."""
    path = profile_path(folder, name, key)
    try:
        found = sorted(folder.glob(f"{file_name(name)}-????????.json"))
    except OSError:
        return path  # reading it will say why it can't be
    others: list[tuple[int, Path]] = []
    for other in [] if path in found else found:
        try:
            others.append((len(list(_differences(_read(other)["key"], key))), other))
        except ProfileError:
            continue  # damaged, and of no interest
    return min(others, default=(0, path))[1]


def _read(path: Path) -> dict[str, Any]:
    """Return the document in a file, its format and key checked to be such."""
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
        raise ProfileError(f"{path} has format {_shown(document['format'])}; this version reads {FORMAT}")
    if not isinstance(document.get("key"), dict):
        raise ProfileError(f"{path} is damaged: 'key' is missing")
    return document


def _profile(document: dict[str, Any], key: ProfileKey) -> Profile:
    """Raises KeyError, TypeError or ValueError if it is none."""
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
    """Return how a profile was measured, None where that isn't recorded: older versions didn't.

    Raises KeyError, TypeError or ValueError if it is none.
    """
    if part is None:
        return None
    rounds, extrapolated = part["rounds"], part["extrapolated"]
    if type(rounds) is not int or type(extrapolated) is not bool:
        raise TypeError("rounds must be a whole number, and extrapolated true or false")
    return Measured(rounds, part["load"], part["spread"], extrapolated)


def _damaged(path: Path, error: Exception) -> ProfileError:
    return ProfileError(f"{path} is damaged: {f'{error} is missing' if isinstance(error, KeyError) else error}")


def _differences(stored: dict[str, Any], key: ProfileKey) -> Iterator[str]:
    """Say in what a stored key differs: name, and both values."""
    for name, value in asdict(key).items():
        value = list(value) if isinstance(value, tuple) else value
        if name not in stored or stored[name] != value:
            yield f"{name} ({_shown(stored.get(name))}, not {_shown(value)})"


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _short(value: float) -> float:
    """Six significant digits: rounding keeps order, and nobody measures better."""
    return float(f"{value:.6g}")


def file_name(name: str) -> str:
    """Return a model's name as a file's may be."""
    return re.sub(r"[^\w.-]", "_", name)


def _threads() -> int:
    """Return how many threads torch was last told to use: a new thread goes by that, as the executor's does."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


def _cpu_name(cpuinfo: Path) -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
