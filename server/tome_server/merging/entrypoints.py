"""Which of timm's entry points can be merged, found out by building each."""

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
    """Why it can't be merged; None if it can."""

    @property
    def supported(self) -> bool:
        """Whether it can be merged."""
        return self.reason is None


def entrypoints(pattern: str = "*") -> Iterator[Entrypoint]:
    """Try every entry point of the installed timm whose name fits `pattern`, as a shell's, in alphabetical order.

    Each is built without memory for its weights and with one block, of which timm's others are copies; but not where
    timm's module knows no class that could be merged, which most don't and which would take minutes.
    """
    wanted = set(timm.list_models(pattern))
    modules = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    for name in sorted(wanted):
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
        except AssertionError:  # some of its settings are one for each block
            model = timm.create_model(name)
    return model
