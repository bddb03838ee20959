"""Matching and merging on the CPU, written in C: the results of `merging.matching`, to rounding.

As some fifty operators of torch, matching and merging are mostly overhead: each operator starts with a cold cache, as
the matrix products in between have emptied it. The C code needs a few passes over memory. It is built when the package
is installed; without a compiler, `merging.matching` runs instead.
"""

import torch
from torch import Tensor

from tome_server.merging import matching as by_torch
from tome_server.merging.matching import Matching, similarities
from tome_server.merging.schedule import mergeable

try:
    from tome_server.merging.cpu import _matching
except ImportError:
    BUILT = False
else:
    BUILT = True

_DTYPES = (torch.float32, torch.bfloat16)


def serves(*tensors: Tensor) -> bool:
    """Return whether the C code supports these tokens and keys: on the CPU, in a dtype it knows, without gradients."""
    return BUILT and all(
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in tensors
    )


def match(keys: Tensor, r: int, prefix: int) -> Matching:
    """Choose the `r` tokens that are most similar to another token; see `matching.match`."""
    batch, heads, tokens, dim = keys.shape
    r = min(r, mergeable(tokens, prefix))
    if r == 0:
        return by_torch.match(keys, r, prefix)
    # The C code gets addresses: sizes and dtypes that don't fit would have it read and write elsewhere.
    assert keys.dtype in _DTYPES
    assert keys.is_cpu
    assert r > 0
    assert prefix >= 0
    if keys.stride(3) != 1:
        keys = keys.contiguous()
    by_image, by_head, by_token, _ = keys.stride()
    # new_empty instead of empty, here and below: torch's defaults for dtype and device may have been changed.
    direction = keys.new_empty(batch, tokens, dim, dtype=torch.float32)
    bf16 = keys.dtype == torch.bfloat16
    _matching.directions(
        keys.data_ptr(), direction.data_ptr(), (batch, heads, tokens, dim), (by_image, by_head, by_token), bf16
    )
    similarity = similarities(direction, prefix)
    rows = keys.new_empty(batch * (tokens + r), dtype=torch.int64)
    order, merged, into = torch.split(rows, [batch * (tokens - r), batch * r, batch * r])
    shape = batch, similarity.shape[1], similarity.shape[2]
    _matching.match(similarity.data_ptr(), order.data_ptr(), merged.data_ptr(), into.data_ptr(), shape, r, prefix)
    return Matching(order.view(batch, tokens - r), merged.view(batch, r), into.view(batch, r))


def combine(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge tokens into the size-weighted mean of each destination and its sources; see `matching.combine`."""
    x, size = x.contiguous(), size.contiguous()
    batch, tokens, channels = x.shape
    left, r = matching.order.shape[1], matching.merged.shape[1]
    # As in `match`. What the rows of `matching` are isn't checked: they come from there.
    assert x.dtype in _DTYPES
    assert size.dtype == torch.float32
    assert size.shape == (batch, tokens)
    assert matching.order.shape == (batch, tokens - r)
    assert matching.merged.shape == matching.into.shape == (batch, r)
    assert x.is_cpu
    assert size.is_cpu
    for rows in (matching.order, matching.merged, matching.into):
        assert rows.dtype == torch.int64
        assert rows.is_cpu
        assert rows.is_contiguous()
    out, sizes = x.new_empty(batch, left, channels), size.new_empty(batch, left)
    _matching.combine(
        x.data_ptr(),
        size.data_ptr(),
        matching.order.data_ptr(),
        matching.merged.data_ptr(),
        matching.into.data_ptr(),
        out.data_ptr(),
        sizes.data_ptr(),
        batch * left,
        batch * r,
        channels,
        x.dtype == torch.bfloat16,
    )
    return out, sizes
