"""Matching and merging on the CPU in a few passes over memory, written in C: what `matching` does, to rounding.

As some fifty operators of torch they are mostly overhead: each starts cold, since the matrix products in between sweep
the processor's caches. The C code is built when the package is installed; where there was no compiler, `matching` is
what runs.
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


def serves(*tensors: Tensor) -> bool:
    """Return whether such tokens and keys can be matched and merged here: on the CPU and without gradients."""
    return BUILT and all(
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in tensors
    )


def match(keys: Tensor, r: int, prefix: int) -> Matching:
    """As matching.match."""
    batch, heads, tokens, dim = keys.shape
    r = min(r, mergeable(tokens, prefix))
    if r == 0:
        return by_torch.match(keys, r, prefix)
    if keys.stride(3) != 1:
        keys = keys.contiguous()
    by_image, by_head, by_token, _ = keys.stride()
    # Here and below type and device are said: torch's defaults for new tensors may be others.
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
    """As matching.combine."""
    x, size = x.contiguous(), size.contiguous()
    batch, _, channels = x.shape
    left, r = matching.order.shape[1], matching.merged.shape[1]
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
