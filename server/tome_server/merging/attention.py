"""Attention that adds the logarithm of each key's size to its logits: proportional attention (ToMe, equation 1)."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.dispatch import attention_kernel_for

BiasOf: TypeAlias = Callable[[Tensor, torch.dtype], Tensor]
"""Turns the sizes [B, N] of tokens of a dtype into the `bias` of `attention`."""

# Kernels need the channels of a head, and the strides of a mask, to be multiples of this.
_ALIGNED = 8


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(size) for sizes [B, N], as a mask [B, 1, 1, N] to add to the logits."""
    bias = size.log().to(dtype)
    if size.is_cuda:
        # Memory-efficient attention copies a mask in each block unless all of its strides are multiples of 8 elements.
        # The new dimensions count too: each gets the length of a row as its stride.
        tokens = size.shape[1]
        return F.pad(bias, (0, -tokens % _ALIGNED))[:, None, None, :tokens]
    return bias[:, None, None, :]


def size_column(size: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001  rounded later, after scaling
    """Return log(size) for sizes [B, N], as a column [B, 1, N, 1] to fold into the keys."""
    return size.log()[:, None, :, None]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Return softmax(scale * q k^T + bias) v, [B, heads, Q, dim].

    Args:
        q: [B, heads, Q, dim] queries.
        k: [B, heads, N, dim] keys.
        v: [B, heads, N, dim] values.
        bias: added to the logits of each key: a mask [B, 1, 1, N] or a column [B, 1, N, 1]. Both give the same result.
            No FlashAttention kernel takes a mask; a column needs wider heads.
        dropout: probability of dropping a weight.
        scale: factor of the products of queries and keys.
    """
    if bias is not None and bias.shape[2] == k.shape[2]:
        return _folded(q, k, v, bias, dropout, scale)
    if (kernel := attention_kernel_for(q, k, v, bias, dropout)) is not None:
        return kernel.attend(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def _folded(q: Tensor, k: Tensor, v: Tensor, column: Tensor, dropout: float, scale: float) -> Tensor:
    """Attend with one more channel, which is 1 in queries, bias / scale in keys and 0 in values."""
    dim = q.shape[-1]
    more = -dim % _ALIGNED or _ALIGNED
    ones = F.pad(q.new_ones(1, 1, 1, 1), (0, more - 1)).expand(*q.shape[:-1], more)
    biases = F.pad((column / scale).to(k.dtype), (0, more - 1)).expand(*k.shape[:-1], more)
    q, k, v = torch.cat([q, ones], dim=-1), torch.cat([k, biases], dim=-1), F.pad(v, (0, more))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out[..., :dim]
