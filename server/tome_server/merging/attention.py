"""Attention in which each key's logits are raised by the logarithm of its token's size (ToMe, equation 1)."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.cpu.matching_c import are_recorded

try:
    from tome_server.merging.cpu import _attention
except ImportError:
    BUILT = False
    _SUPPORTED = (False, False)
else:
    BUILT = True
    _SUPPORTED = _attention.supported()
# The types in which the C code attends on this processor.
IN_C = frozenset(t for t, can in zip((torch.float32, torch.bfloat16), _SUPPORTED, strict=True) if can)

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
    if _fits_in_c(q, k, v, bias, dropout):
        return _in_c(q, k, v, bias, scale)
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


def _fits_in_c(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Return whether the C code attends for these: for inference, on one thread of a CPU that it is written for."""
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    # Asked first: torch.compile can't follow the number of threads.
    return (
        not are_recorded()
        and q.dtype in IN_C
        and dropout == 0.0
        and all(type(t) is Tensor and t.dtype == q.dtype and t.device.type == "cpu" for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and k.numel() > 0
        and torch.get_num_threads() == 1
    )


def _in_c(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """As torch's, in 0.3 to 0.7 of the time: what is read more than once stays in the core's own cache."""
    batch, heads, queries, dim = q.shape
    tokens = k.shape[2]
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if bias is not None:
        bias = bias.float().expand(batch, 1, 1, tokens).contiguous()
    out = q.new_empty(batch, queries, heads, dim)
    _attention.attend(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        (batch, heads, queries, tokens, dim),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        scale,
        q.dtype == torch.bfloat16,
    )
    return out.transpose(1, 2)
