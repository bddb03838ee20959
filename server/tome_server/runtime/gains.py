"""Keeps beside the profiles what was measured to choose by, so that each choice is made once on a machine.

A gain says how many times as fast one way of running a model is as another. Where that is about what a choice asks for,
measuring again could turn it; and what was profiled before wouldn't hold any more.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tome_server.merging import attention
from tome_server.merging.packing import packed_dtypes
from tome_server.models.loading import Recall
from tome_server.models.spec import ModelSpec
from tome_server.runtime.profile_store import ProfileError, code, default_folder, device_name, file_name, write_whole

log = logging.getLogger(__name__)


def speed_key(spec: ModelSpec, device: torch.device, threads: int, max_batch: int) -> dict[str, Any]:
    """Return all that the speed of a model depends on, its dtype and what threads divide apart, as JSON has it."""
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
        "attention": _names(attention.IN_C) if on_cpu else [],
        **code(device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(key, default=str))
    return plain


def _names(dtypes: Iterable[torch.dtype]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def model_gains(
    spec: ModelSpec, device: torch.device, max_batch: int, folder: Path | None = None, *, anew: bool = False
) -> "Gains":
    """Return what was measured of a model on as many threads as torch is set to; see Gains."""
    key = speed_key(spec, device, torch.get_num_threads(), max_batch)
    return Gains(spec.name, key, folder, spec.profiles, anew=anew)


class Gains:
    """What was measured under one key: all of it in one file, so that no gain outlives those that it depends on."""

    def __init__(
        self,
        name: str,
        key: Mapping[str, Any],
        folder: Path | None = None,
        shipped: Path | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Those kept for `name` and `key` in `folder` (None: `default_folder`), or in `shipped`, which is only read.

        `anew` forgets them. A folder that can't be used is warned of, and stops nothing.
        """
        self._name, self._key, self._folder, self._warned = name, dict(key), folder, False
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:8]
        self._file = f"{file_name(name)}-{digest}.gains"
        self._found = {} if anew else self._read(folder) or (shipped and self._read(shipped)) or {}

    def recall(self, what: str, measure: Callable[[], float]) -> float:
        """Return the gain called `what` as it is kept, or else measure and keep it. Raises what `measure` raises."""
        if what not in self._found:
            log.info("measuring what is gained by %s (%s), to be kept in %s", what, self._name, self._file)
            # As it will be read, or the choice could be another then.
            gain = round(measure(), 3)
            self._found[what] = gain
            self._write()
        return self._found[what]

    def divided(self, dtype: str) -> Recall:
        """Return what `load` is to recall: what one image gains by being divided among the threads in a dtype."""
        return partial(self.recall, f"one image divided in {dtype}")

    def _read(self, folder: Path | None) -> dict[str, float] | None:
        try:
            document = json.loads(((folder or default_folder()) / self._file).read_text(encoding="utf-8"))
            found = {str(what): float(gain) for what, gain in document["gains"].items()}
            return found if document["key"] == self._key and all(gain > 0 for gain in found.values()) else None
        except (ProfileError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _write(self) -> None:
        text = f'{{\n  "key": {json.dumps(self._key)},\n  "gains": {json.dumps(self._found)}\n}}\n'
        try:
            write_whole((self._folder or default_folder()) / self._file, text)
        except ProfileError as error:
            if not self._warned:
                what = (
                    "what was measured to choose by (%s) isn't kept, and will be measured again at the next start: %s"
                )
                log.warning(what, self._name, error)
            self._warned = True
