"""Bipartite soft matching and the merge itself (ToMe, section 3 "Bipartite Soft Matching").

Tokens at even positions may be merged (sources, the paper's set A) into tokens at odd positions (destinations, set B);
prefix tokens (class, distillation, registers) are neither.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.schedule import mergeable


@dataclass(frozen=True)
class Matching:
    """Which tokens stay and which go where, for N tokens becoming N - r: the prefix, sources left, destinations."""

    order: Tensor
    """[B, N - r] position, before the merge, of each token that stays."""
    merged: Tensor
    """[B, r] position, before the merge, of each token that goes."""
    into: Tensor
    """[B, r] position, after the merge, of the token that each of them goes into."""


def match(metric: Tensor, r: int, prefix: int) -> Matching:
    """Choose the `r` tokens most like another token.

    `metric` is [B, N, D], compared by cosine similarity. Every source proposes its most similar destination; the r
    strongest proposals are taken, the lowest position first where they tie. r is clamped to half of the tokens that
    aren't among the first `prefix`.
    """
    batch, tokens, _ = metric.shape
    r = min(r, mergeable(tokens, prefix))
    positions = torch.arange(tokens, device=metric.device)
    if r == 0:
        none = positions.new_empty(batch, 0)
        return Matching(positions.expand(batch, tokens), none, none)

    first_source, first_destination = prefix + prefix % 2, prefix + 1 - prefix % 2
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, first_source::2] @ metric[:, first_destination::2].mT
    best, destination = similarity.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    gone, stay = ranked[:, :r], ranked[:, r:].sort(dim=-1).values

    order = torch.cat(
        [
            positions[:prefix].expand(batch, prefix),
            stay * 2 + first_source,
            positions[first_destination::2].expand(batch, -1),
        ],
        dim=1,
    )
    return Matching(order, gone * 2 + first_source, destination.gather(1, gone) + prefix + stay.shape[1])


def combine(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge tokens `x` [B, N, C], each standing for `size` [B, N] patches, by their size-weighted mean.

    Returns the tokens [B, N - r, C] and sizes [B, N - r] that are left. Differentiable in `x`.
    """
    if matching.merged.shape[1] == 0:
        return x, size
    batch, tokens, channels = x.shape
    left = matching.order.shape[1]
    # One row a token over the whole batch: index_select and index_add_ on rows beat gather and scatter on elements,
    # which need an index for every channel.
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    order = (matching.order + image * tokens).flatten()
    merged = (matching.merged + image * tokens).flatten()
    into = (matching.into + image * left).flatten()

    rows, sizes = x.reshape(-1, channels), size.reshape(-1)
    added = sizes[merged]
    after = sizes[order].index_add_(0, into, added)
    out = rows.index_select(0, order)
    # A weighted mean as a step from the destination towards each source: only rows that change are computed.
    step = rows.index_select(0, merged) - out.index_select(0, into)
    out.index_add_(0, into, step * (added / after[into]).unsqueeze(1).to(x.dtype))
    return out.view(batch, left, channels), after.view(batch, left)


def moves(matching: Matching) -> Tensor:
    """Return, for each of the N tokens before the merge, its position after it: [B, N]."""
    batch, left = matching.order.shape
    places = torch.arange(left, device=matching.order.device).expand(batch, left)
    position = matching.order.new_empty(batch, left + matching.merged.shape[1])
    position.scatter_(1, matching.order, places)
    position.scatter_(1, matching.merged, matching.into)
    return position
