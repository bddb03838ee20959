"""Attention in which each key's logits are raised by the logarithm of its token's size (ToMe, equation 1)."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.dispatch import attention_kernel_for

# How sizes [B, N] become what is added to the logits, of tokens of a type.
BiasOf: TypeAlias = Callable[[Tensor, torch.dtype], Tensor]

# Kernels want heads of a multiple of so many channels.
_ALIGNED = 8


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(size) of tokens [B, N] as a mask [B, 1, 1, N], to be added to the logits."""
    bias = size.log().to(dtype)
    if size.is_cuda:
        # Memory-efficient attention there wants all strides of a mask to be multiples of 8 elements, or copies it in
        # each block: also those of the new dimensions, which are what the rows are long when these are made.
        tokens = size.shape[1]
        return F.pad(bias, (0, -tokens % _ALIGNED))[:, None, None, :tokens]
    return bias[:, None, None, :]


def size_column(size: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001  it is rounded once it has been scaled
    """Return log(size) of tokens [B, N] as a column [B, 1, N, 1], to be folded into the keys."""
    return size.log()[:, None, :, None]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Return what queries [B, heads, Q, dim] find among keys and values [B, heads, N, dim]: [B, heads, Q, dim].

    `bias` is a mask [B, 1, 1, N] or a column [B, 1, N, 1]. They come to the same; but no kernel of FlashAttention
    takes a mask, and a column costs wider heads.
    """
    if bias is not None and bias.shape[2] == k.shape[2]:
        return _folded(q, k, v, bias, dropout, scale)
    if (kernel := attention_kernel_for(q, k, v, bias, dropout)) is not None:
        return kernel.attend(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def _folded(q: Tensor, k: Tensor, v: Tensor, column: Tensor, dropout: float, scale: float) -> Tensor:
    """Attend with one channel more: in queries it is 1, in keys the bias over the scale, in values nothing."""
    dim = q.shape[-1]
    more = -dim % _ALIGNED or _ALIGNED
    ones = F.pad(q.new_ones(1, 1, 1, 1), (0, more - 1)).expand(*q.shape[:-1], more)
    biases = F.pad((column / scale).to(k.dtype), (0, more - 1)).expand(*k.shape[:-1], more)
    q, k, v = torch.cat([q, ones], dim=-1), torch.cat([k, biases], dim=-1), F.pad(v, (0, more))
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return found[..., :dim]
