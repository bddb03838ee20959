"""What a profile holds for: a model, its weights, a machine and the software on it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tome_server.calibration.environment import device_name, software_versions
from tome_server.config.json_file import shown
from tome_server.merging.cpu import attention_c
from tome_server.models.loaded import LoadedModel
from tome_server.models.spec import weights_digest


@dataclass(frozen=True)
class ProfileKey:
    """All that a profile holds for. If any of it differs, latencies may differ too."""

    model: str
    """timm's architecture"""
    weights: str
    """SHA-256 of the checkpoint, or hub:NAME for timm's pretrained weights"""
    input_size: tuple[int, ...]
    """channels, height, width"""
    macs: tuple[int, ...]
    """Multiply-accumulates of one image at each r, which also tell the architecture's arguments apart"""
    proportional_attention: bool
    device: str
    """the processor's or GPU's name, and whether CUDA graphs are used"""
    dtype: str
    threads: int
    """torch's CPU threads; 0 on a GPU, where they don't matter"""
    torch: str
    timm: str
    tome_serving: str
    max_batch: int
    rs: tuple[int, ...]
    """the r grid"""
    schedules: str = ""
    """tokens merged in each block, for those r of the grid where that isn't r in every block"""
    division: str = ""
    """what a few threads divide among themselves (merging/cpu/data_parallel.py); empty if torch divides operations"""
    merging: str = "torch"
    """what matches and merges tokens: C, if that was built, or torch's operators"""
    attention: str = "torch"
    """what computes attention on one thread: C, if it was built for such a processor, or torch"""

    @property
    def digest(self) -> str:
        """Eight hexadecimal characters of its hash, by which files are named."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]

    def differences(self, stored: Mapping[str, Any]) -> Iterator[str]:
        """Say in what a stored key differs from this one: the field's name, and both values."""
        for name, value in asdict(self).items():
            wanted = list(value) if isinstance(value, tuple) else value
            if name not in stored or stored[name] != wanted:
                yield f"{name} ({shown(stored.get(name))}, not {shown(wanted)})"


def profile_key(model: LoadedModel, checkpoint: Path | None, device: torch.device, max_batch: int) -> ProfileKey:
    """Return the key of a profile of `model` that is measured now.

    `checkpoint` is what the model was loaded from; None means timm's pretrained weights, which are told by their name.
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
        **software_versions(device),
    )


def _threads() -> int:
    """Return the number of threads that torch was last set to use.

    A new thread has that number, like the thread that runs batches; the calling one may have another.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()
