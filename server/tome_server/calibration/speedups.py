"""Keeps the measurements that choices are made by, beside the profiles, so that each is made once on a machine.

A speedup says how many times as fast one way of running a model is as another. Near the threshold of a choice, a second
measurement could turn it, and profiles that were measured before wouldn't hold any more. Only a speedup that was
measured while the machine was busy is measured again next time, since it may have chosen the slower way.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tome_server.calibration.cpu_load import LoadMeter
from tome_server.calibration.environment import device_name, software_versions
from tome_server.calibration.profile_store import ProfileError, default_folder, file_name, save_text
from tome_server.config.json_file import read_json
from tome_server.merging.cpu import attention_c
from tome_server.merging.cpu.packing import packed_dtypes
from tome_server.models.loading import Recall
from tome_server.models.spec import ModelSpec
from tome_server.scheduling.measured import MOST_LOAD

log = logging.getLogger(__name__)

# The bounds of a speedup: beyond, no machine could have measured it, and it would choose by itself for ever.
_LEAST, _MOST = 1e-3, 1e3


def speed_key(spec: ModelSpec, device: torch.device, threads: int, max_batch: int) -> dict[str, Any]:
    """Return what the speed of a model depends on, except for its dtype and what threads divide, as JSON values."""
    on_cpu = device.type == "cpu"
    key = {
        "model": spec.architecture,
        "kwargs": dict(spec.kwargs),
        "data": dict(spec.data),
        "proportional_attention": spec.proportional_attention,
        "device": device_name(device),
        "threads": threads if on_cpu else 0,
        "max_batch": max_batch,
        "packed": _names(packed_dtypes()) if on_cpu else [],
        "attention": _names(attention_c.DTYPES) if on_cpu else [],
        **software_versions(device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key, default=str))
    return plain


def _names(dtypes: Iterable[torch.dtype]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def model_speedups(
    spec: ModelSpec, device: torch.device, max_batch: int, folder: Path | None = None, *, anew: bool = False
) -> "Speedups":
    """Return what was measured of a model with as many threads as torch is set to; see Speedups."""
    key = speed_key(spec, device, torch.get_num_threads(), max_batch)
    return Speedups(spec.name, key, folder, spec.profiles, anew=anew)


class Speedups:
    """The speedups measured under one key. They share a file, so that none outlives another that it depends on."""

    def __init__(
        self,
        name: str,
        key: Mapping[str, Any],
        folder: Path | None = None,
        shipped: Path | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Read the speedups that are kept in a folder, if there are any.

        Args:
            name: What they were measured of: a model, or "server".
            key: What they hold for.
            folder: Where they are kept; None for `default_folder`. If it can't be used, the log warns of it.
            shipped: A folder that came with the model. It is only read, if there are none in `folder`.
            anew: Whether to ignore what is kept.
        """
        self._name, self._key, self._folder, self._warned = name, dict(key), folder, False
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:8]
        self._file = f"{file_name(name)}-{digest}.gains"
        found = None if anew else self._read(folder) or (shipped and self._read(shipped))
        self._found, self._loads = found or ({}, {})
        # Measured by this process, which doesn't measure them again, however busy the machine is.
        self._measured: set[str] = set()

    def get_or_measure(self, what: str, measure: Callable[[], float]) -> float:
        """Return the speedup called `what` that is kept, or else measure and keep it. Raises what `measure` raises.

        One that was measured while the machine was busy is measured again, and the one of less load is kept.
        """
        if what not in self._found or (what in self._loads and what not in self._measured):
            log.info("measuring what is gained by %s (%s), to be kept in %s", what, self._name, self._file)
            self._measure(what, measure)
        return self._found[what]

    def _measure(self, what: str, measure: Callable[[], float]) -> None:
        meter = LoadMeter()
        # Rounded as it is stored, or the next start could choose differently.
        gain, load = round(measure(), 3), round(meter.share() or 0.0, 3)
        self._measured.add(what)
        if load > MOST_LOAD:
            log.info(
                "what is gained by %s (%s) was measured while the machine was busy (%.0f%% of the time waiting for a "
                "CPU); it will be measured again next time",
                what, self._name, 100 * load,
            )  # fmt: skip
            if load > self._loads.get(what, 1.0):
                return
        self._found[what] = gain
        self._loads.pop(what, None)
        if load > MOST_LOAD:
            self._loads[what] = load
        self._write()

    def divided(self, dtype: str) -> Recall:
        """Return what `load` calls to learn how much faster one image is when threads divide it, in a dtype."""
        return partial(self.get_or_measure, f"one image divided in {dtype}")

    def _read(self, folder: Path | None) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return the speedups that are kept, and for those measured on a busy machine, the share of time it waited."""
        try:
            path = (folder or default_folder()) / self._file
            document = read_json(path)
            found = document.numbers("gains", _LEAST, _MOST)
            loads = document.numbers("busy", 0, 1) if "busy" in document.values else {}
            return (found, loads) if document.object("key").values == self._key else None
        except (ProfileError, OSError):
            return None
        except ValueError as error:
            log.warning("what was measured to choose by (%s) is measured again: %s: %s", self._name, path, error)
            return None

    def _write(self) -> None:
        parts: dict[str, Mapping[str, Any]] = {"key": self._key, "gains": self._found}
        if self._loads:
            parts["busy"] = self._loads
        text = "{\n" + ",\n".join(f'  "{name}": {json.dumps(part)}' for name, part in parts.items()) + "\n}\n"
        try:
            save_text((self._folder or default_folder()) / self._file, text)
        except ProfileError as error:
            if not self._warned:
                what = (
                    "what was measured to choose by (%s) isn't kept, and will be measured again at the next start: %s"
                )
                log.warning(what, self._name, error)
            self._warned = True
