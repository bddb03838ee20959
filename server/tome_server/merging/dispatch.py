"""Chooses the code that runs matching, merging and attention: torch's operators, or a faster kernel.

The algorithm knows no kernel. `tome_server.merging.cpu` registers the kernels written in C when `tome_server.merging`
is imported.
"""

from typing import Protocol

import torch
from torch import Tensor

from tome_server.merging import matching as by_torch
from tome_server.merging.matching import Matching


class Matcher(Protocol):
    """Matching and merging, with the results that `merging.matching` defines."""

    def match(self, keys: Tensor, r: int, prefix: int) -> Matching:
        """Choose the tokens to merge; see `matching.match`."""
        ...

    def combine(self, x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
        """Merge tokens; see `matching.combine`."""
        ...


class MatchingKernel(Matcher, Protocol):
    """A faster Matcher that supports only some tensors."""

    def serves(self, *tensors: Tensor) -> bool:
        """Return whether the kernel supports these tokens and keys."""
        ...


class AttentionKernel(Protocol):
    """Faster attention that supports only some tensors."""

    def serves(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> bool:
        """Return whether the kernel supports these arguments of `attention.attention`."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Return `attention.attention` of these arguments, without dropout; `bias` is a mask [B, 1, 1, N]."""
        ...


MATCHING_KERNELS: list[MatchingKernel] = []
ATTENTION_KERNELS: list[AttentionKernel] = []


def matcher_for(*tensors: Tensor) -> Matcher:
    """Return the first kernel that supports these tokens and keys, or torch's operators if none does."""
    # Checked first: torch.compile can't trace the checks of the kernels.
    if not is_recording():
        for kernel in MATCHING_KERNELS:
            if kernel.serves(*tensors):
                return kernel
    return by_torch


def attention_kernel_for(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float
) -> AttentionKernel | None:
    """Return the first kernel that supports these arguments of `attention.attention`; None if none does."""
    if not is_recording():
        for kernel in ATTENTION_KERNELS:
            if kernel.serves(q, k, v, bias, dropout):
                return kernel
    return None


def is_recording() -> bool:
    """Return whether torch is recording operators, to run them later without the Python code in between."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
