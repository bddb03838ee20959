"""Which code matches, merges and attends: torch's operators, or a faster kernel that takes the tensors at hand.

The algorithm names no kernel. `tome_server.merging.cpu` registers those written in C, when `tome_server.merging` is
imported.
"""

from typing import Protocol

import torch
from torch import Tensor

from tome_server.merging import matching as by_torch
from tome_server.merging.matching import Matching


class Matcher(Protocol):
    """Matching and merging, as `merging.matching` defines them."""

    def match(self, keys: Tensor, r: int, prefix: int) -> Matching:
        """Return `matching.match`."""
        ...

    def combine(self, x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
        """Return `matching.combine`."""
        ...


class MatchingKernel(Matcher, Protocol):
    """A faster Matcher, for some tensors only."""

    def serves(self, *tensors: Tensor) -> bool:
        """Return whether it takes such tokens and keys."""
        ...


class AttentionKernel(Protocol):
    """Faster attention, for some tensors only."""

    def serves(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> bool:
        """Return whether it takes such queries, keys, values, mask and dropout."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Return what `attention.attention` does for a mask `bias` [B, 1, 1, N], without dropout."""
        ...


MATCHING_KERNELS: list[MatchingKernel] = []
ATTENTION_KERNELS: list[AttentionKernel] = []


def matcher_for(*tensors: Tensor) -> Matcher:
    """Return the first kernel that takes these tokens and keys, or else torch's operators."""
    # Asked first: torch.compile can't follow what kernels look at.
    if not is_recording():
        for kernel in MATCHING_KERNELS:
            if kernel.serves(*tensors):
                return kernel
    return by_torch


def attention_kernel_for(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float
) -> AttentionKernel | None:
    """Return the first kernel that takes these arguments; None leaves attention to torch."""
    if not is_recording():
        for kernel in ATTENTION_KERNELS:
            if kernel.serves(q, k, v, bias, dropout):
                return kernel
    return None


def is_recording() -> bool:
    """Return whether torch records the operators of this call, to run them again without the Python between them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
