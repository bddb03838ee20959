"""Which of timm's entry points can be merged, determined by building each."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import timm
import torch
from torch import nn

from tome_server.merging.support import EMBED, UnsupportedModelError, check_supported


@dataclass(frozen=True)
class Entrypoint:
    """One of timm's entry points."""

    name: str
    reason: str | None
    """why it can't be merged; None if it can"""

    @property
    def supported(self) -> bool:
        """Whether it can be merged."""
        return self.reason is None


def entrypoints(pattern: str = "*") -> Iterator[Entrypoint]:
    """Check the entry points of the installed timm whose names match a shell pattern, in alphabetical order.

    Each is built on the meta device, without memory for weights, and with one block, since all blocks of a model are of
    one class. Modules of timm that use no supported class are skipped without building: most of them, which would take
    minutes.
    """
    names = set(timm.list_models(pattern))
    modules = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    for name in sorted(names):
        yield Entrypoint(name, _why_not(name, modules[name]))


def _why_not(name: str, module: str) -> str | None:
    if not any(value in EMBED for value in vars(sys.modules[f"timm.models.{module}"]).values() if _is_model(value)):
        *others, last = (cls.__name__ for cls in EMBED)
        return f"timm's {module} builds no {', '.join(others)} or {last}"
    try:
        check_supported(_built(name))
    except UnsupportedModelError as error:
        return str(error)
    return None


def _is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _built(name: str) -> nn.Module:
    with torch.device("meta"):
        try:
            model: nn.Module = timm.create_model(name, depth=1)
        except AssertionError:  # the entry point has settings for each block, which don't fit a depth of one
            model = timm.create_model(name)
    return model
