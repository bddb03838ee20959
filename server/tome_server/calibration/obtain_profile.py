"""Returns a model's profile: a stored one that still holds, or one that is measured now and stored."""

import logging
import threading
from pathlib import Path

import torch

from tome_server.calibration.profile_key import profile_key
from tome_server.calibration.profile_store import (
    DamagedProfileError,
    ProfileError,
    default_folder,
    keep_profile,
    load_profile,
    nearest_path,
)
from tome_server.calibration.profiling import Run, load_of_single_images, measure
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel
from tome_server.scheduling.measured import MOST_LOAD
from tome_server.scheduling.profile import Profile

log = logging.getLogger(__name__)


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
    """Return a model's stored profile, or measure one and store it.

    A stored profile that is provisional is measured again, and the better of the two is kept. A store that can't be
    used is no error: the log says why, and the model is measured.

    Args:
        model: The model on its device.
        checkpoint: What it was loaded from; None for timm's pretrained weights.
        device: The device that it runs on.
        max_batch: The largest batch to predict.
        budget: Seconds to measure for, about; this call blocks so long if it measures.
        folder: Where profiles are stored; None for `default_folder`.
        shipped: A folder of profiles that came with the model. It is only read.
        run: Runs a batch.

    Raises:
        Exception: What the model raises.
    """
    key = profile_key(model, checkpoint, device, max_batch)
    reasons, provisional = list[str](), list[tuple[Path, Profile]]()
    for place in (folder, shipped) if shipped and shipped.is_dir() else (folder,):
        try:
            path = nearest_path(place or default_folder(), model.info.name, key)
            profile = load_profile(path, key)
        except ProfileError as error:
            if isinstance(error, DamagedProfileError):
                log.warning("the stored profile of %s isn't used: %s", model.info.name, error)
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
    """Measure a model whose `profile` is provisional again. Store and return a better profile, or return None.

    Single images are run for a moment first: on a machine that is still about as busy as when `profile` was measured,
    nothing is measured. Blocks for at most about `budget` seconds. Raises InterruptedError once `stop` is set, and what
    the model raises.
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
    """Return whether a profile was measured under better conditions than another; unknown conditions count as good."""
    if profile.measured is None or other.measured is None:
        return profile.measured is None
    return profile.measured.better_than(other.measured)


def _doubts(profile: Profile) -> str:
    """Return why a profile is provisional, as the end of a sentence; empty if it isn't."""
    return f"; {profile.measured}; it will be measured again" if profile.provisional else ""


def _mixed(profile: Profile) -> str:
    return f"batches of several r run {'packed' if profile.one_call else 'split'}"
