"""Bipartite soft matching and the merge itself (ToMe, section 3 "Bipartite Soft Matching").

Tokens at even positions may be merged (sources, the paper's set A) into tokens at odd positions (destinations, set B);
prefix tokens (class, distillation, registers) are neither.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tome_server.merging.schedule import mergeable


@dataclass(frozen=True)
class Matching:
    """Which of N tokens stay, and which r tokens are merged into which of them.

    The tokens that stay are ordered: prefix, remaining sources, destinations. Indices are rows of the whole batch,
    [B, N, C] seen as [B * N, C]. On the CPU, selecting and adding whole rows is several times faster than gather and
    scatter, which need an index for every channel.
    """

    order: Tensor
    """[B, N - r] row, before the merge, of each token that stays"""
    merged: Tensor
    """[B, r] row, before the merge, of each token that is merged into another"""
    into: Tensor
    """[B, r] row, after the merge, of the token that each of these is merged into"""


def match(keys: Tensor, r: int, prefix: int) -> Matching:
    """Choose the `r` tokens that are most similar to another token.

    The similarity of two tokens is the cosine similarity of their keys' means over the heads. Each source proposes its
    most similar destination, and the r proposals of the highest similarity are taken; ties go to the lowest position.
    Similarities are computed in float32 at least: in bfloat16 many different ones would become equal.

    Args:
        keys: [B, heads, N, D] the attention keys of the tokens.
        r: how many tokens to merge in each image; clamped to half of the tokens that aren't prefix tokens.
        prefix: number of tokens at the front that are never merged.
    """
    batch, _, tokens, _ = keys.shape
    r = min(r, mergeable(tokens, prefix))
    rows = torch.arange(batch * tokens, device=keys.device).view(batch, tokens)
    if r == 0:
        return Matching(rows, rows[:, :0], rows[:, :0])

    # Cosine similarity depends on directions only, and the sum has the direction of the mean. Choices have no gradient.
    total = keys.detach().sum(dim=1, dtype=torch.promote_types(keys.dtype, torch.float32))
    direction = total / torch.linalg.vector_norm(total, dim=-1, keepdim=True).clamp_min(1e-12)
    best, choice = similarities(direction, prefix).max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    gone, stay = ranked[:, :r], ranked[:, r:].sort(dim=-1).values

    sources, destinations = _alternating(rows, prefix)
    order = torch.cat([rows[:, :prefix], sources.gather(1, stay), destinations], dim=1)
    first_row = torch.arange(0, batch * (tokens - r), tokens - r, device=keys.device).unsqueeze(1)
    return Matching(order, sources.gather(1, gone), choice.gather(1, gone) + (first_row + prefix + stay.shape[1]))


def similarities(direction: Tensor, prefix: int) -> Tensor:
    """Return the cosine similarity of every source to every destination, [B, sources, destinations].

    `direction` [B, N, D] holds vectors of length 1. The result has its dtype, under autocast too.
    """
    sources, destinations = _alternating(direction, prefix)
    # Autocast doesn't touch calls that name their output.
    products = direction.new_empty(len(direction), sources.shape[1], destinations.shape[1])
    return torch.bmm(sources, destinations.mT, out=products)


def _alternating(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the sources and the destinations among the tokens `x` [B, N, ...]."""
    return x[:, prefix + prefix % 2 :: 2], x[:, prefix + 1 - prefix % 2 :: 2]


def combine(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merge tokens into the size-weighted mean of each destination and its sources. Differentiable in `x`.

    Args:
        x: [B, N, C] tokens.
        size: [B, N] number of patches that each token stands for.
        matching: which tokens to merge.

    Returns:
        The tokens [B, N - r, C] that are left, and their sizes [B, N - r].
    """
    if matching.merged.shape[1] == 0:
        return x, size
    batch, left = matching.order.shape
    order, merged, into = matching.order.flatten(), matching.merged.flatten(), matching.into.flatten()

    sizes = size.flatten()
    added = sizes.index_select(0, merged)
    after = sizes.index_select(0, order).index_add_(0, into, added)
    share = (added / after.index_select(0, into)).unsqueeze(1).to(x.dtype)

    rows = x.flatten(0, 1)
    out = rows.index_select(0, order)
    # The weighted mean is written as a step from the destination towards each source, so that only rows that change are
    # computed.
    step = (rows.index_select(0, merged) - out.index_select(0, into)) * share
    if x.is_cuda:
        added_up = add_by_product(out.view(batch, left, -1), step.view(batch, -1, step.shape[-1]), matching.into)
        return added_up, after.view(batch, left)
    return out.index_add_(0, into, step).view(batch, left, -1), after.view(batch, left)


def add_by_product(x: Tensor, step: Tensor, into: Tensor) -> Tensor:
    """Add `step` [B, r, C] to the rows `into` [B, r] of `x` [B, T, C], in place; `into` counts rows of the whole batch.

    A product with a matrix of ones and zeros takes the place of index_add_, which on CUDA adds in the order in which
    its threads happen to run: equal batches would give unequal results.
    """
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[0], -1, 1)
    return x.baddbmm_((rows == into.unsqueeze(1)).to(x.dtype), step)


def moves(matching: Matching) -> Tensor:
    """Return the position after the merge of each of the N tokens before it, [B, N]."""
    batch, left = matching.order.shape
    tokens = left + matching.merged.shape[1]
    place = matching.order.new_empty(batch * tokens)
    place[matching.order.flatten()] = torch.arange(batch * left, device=place.device)
    place[matching.merged.flatten()] = matching.into.flatten()
    return place.view(batch, tokens) % left
