"""Bounds the memory that building a network may take: a mistyped argument would otherwise use up all there is."""

from collections.abc import Callable
from typing import Any

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from torch.overrides import TorchFunctionMode

from tome_server.models.spec import ModelSpec

# How many times the memory of its weights a network may take while it is built: float32 takes four times as much as
# the smallest type of a file, and some tensors are only needed to initialise others.
_TIMES = 8
_BESIDES = 256 * 2**20
# For an architecture whose weights' size isn't known beforehand: about that of timm's largest.
_UNKNOWN = 32 * 2**30
# The functions that make the tensors of modules.
_MAKERS = frozenset({
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros,
})  # fmt: skip


class TooLargeError(Exception):
    """A network would take far more memory than its weights."""


class BoundedBuilding(TorchFunctionMode):
    """Counts the bytes of all tensors that are made, before they are. Raises TooLargeError beyond `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in the place of each of torch's functions."""
        kwargs = kwargs or {}
        if func in _MAKERS and "out" not in kwargs:
            self._made += func(*args, **{**kwargs, "device": "meta"}).nbytes
            if self._made > self._most:
                raise TooLargeError(
                    f"kwargs make it take more than {_mib(self._made)} of memory; {_mib(self._most)} are the most that "
                    "its weights can need"
                )
        return func(*args, **kwargs)


def most_bytes(spec: ModelSpec) -> int:
    """Return how many bytes building a model may take: a few times what its weights do.

    Those are the checkpoint's or, for weights that aren't in one file, the architecture's without arguments.
    """
    if spec.checkpoint is not None and spec.checkpoint.suffix != ".onnx":
        return _TIMES * spec.checkpoint.stat().st_size + _BESIDES
    try:
        with torch.device("meta"):
            usual = timm.create_model(spec.architecture)
    except Exception:  # some architectures can't be built without memory
        return _UNKNOWN
    held: int = sum(part.nbytes for part in (*usual.parameters(), *usual.buffers()))
    return _TIMES * held + _BESIDES


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
