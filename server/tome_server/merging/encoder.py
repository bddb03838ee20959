"""The way of tokens through the blocks, merging on the way: what all model families share.

In each block: attention, merging, and then what is left of the block. Images of one batch may merge differently. What
sees each token by itself (norms, linear layers) runs on the tokens of all images together, end to end and without
padding; attention and merging run on each group of images that merge alike.

Everything a call needs is in its arguments: modules are read, never written, so calls may run side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tome_server.merging.attention import BiasOf
from tome_server.merging.dispatch import matcher_for
from tome_server.merging.matching import moves
from tome_server.merging.schedule import mergeable


class Layers(Protocol):
    """One block, taken apart where attention and merging come between."""

    @property
    def heads(self) -> int:
        """Heads that attend."""
        ...

    @property
    def key_heads(self) -> int:
        """Heads of keys and values: fewer where several attending heads share one."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        ...

    @property
    def before(self) -> Sequence[nn.Module]:
        """Parts whose linear layers see the tokens that enter the block."""
        ...

    @property
    def after(self) -> Sequence[nn.Module]:
        """Parts whose linear layers see the tokens that merging leaves."""
        ...

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values of tokens `x` [..., channels], and what else the block needs of them."""
        ...

    def attend(
        self, qkv: Tensor, rope: Tensor | None, bias: Tensor | None, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        """Attend among tokens of `qkv` [B, N, channels].

        `rope` [B or 1, N, heads or 1, dim / 2] has each token's position, as the complex numbers that pairs of channels
        are turned by; `bias` is added to the logits of each key, as `attention` takes it. Only the first `queries`
        tokens ask, if given. Returns what they found [B, queries or N, heads * dim], and the keys
        [B, key_heads, N, dim] that tokens are compared by, without their positions.
        """
        ...

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` [..., channels] with what attention found, [..., heads * dim], added to it."""
        ...

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` [..., channels] with what comes after merging added to it."""
        ...


@dataclass(frozen=True)
class Embedded:
    """Images as tokens, before the first block."""

    tokens: Tensor
    """[B, N, D], prefix tokens first"""
    ropes: Sequence[Tensor] | None = None
    """for each block the tokens' positions: [B or 1, N, heads or 1, dim / 2] complex numbers, 1 for prefix tokens"""
    lengths: Sequence[int] | None = None
    """tokens of each image, prefix included, where the rest is padding; None where there is none"""


@dataclass(frozen=True)
class MergeGroup:
    """Images of a batch that have as many tokens and merge alike."""

    per_block: tuple[int, ...]
    """tokens to merge in each block"""
    images: Sequence[int]
    """their positions in the batch"""
    tokens: int
    """of each, before the first block"""


def group_images(embedded: Embedded, schedules: Mapping[tuple[int, ...], Sequence[int]]) -> list[MergeGroup]:
    """Return the groups to encode; `schedules` gives the tokens to merge in each block, and the images for which."""
    tokens = embedded.tokens.shape[1]
    if embedded.lengths is None:
        return [MergeGroup(per_block, images, tokens) for per_block, images in schedules.items()]
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for per_block, images in schedules.items():
        for image in images:
            groups.setdefault((per_block, embedded.lengths[image]), []).append(image)
    return [MergeGroup(per_block, images, length) for (per_block, length), images in groups.items()]


@dataclass(frozen=True)
class Encoded:
    """Tokens of images that merge group_images, after the last block and final norm."""

    tokens: Tensor
    """[B, T, D]; where only the prefix was asked for, [B, prefix, D]."""
    sizes: Tensor
    """[B, T] patches that each token stands for; 1 for prefix tokens."""
    token_map: Tensor | None
    """[B, patches] index of the token that each patch went into, if asked for."""


def encode(
    embedded: Embedded,
    blocks: Sequence[Layers],
    norm: Callable[[Tensor], Tensor],
    batches: Sequence[MergeGroup],
    *,
    prefix: int,
    bias_of: BiasOf | None,
    prefix_only: bool,
    track: bool,
) -> list[Encoded]:
    """Run tokens through blocks and final `norm`, in groups that come back one by one.

    The first `prefix` tokens are never merged. `bias_of` gives what sizes add to attention logits.
    `prefix_only` leaves all but the prefix tokens of the last block uncomputed. `track` records the token map.
    """
    x, ropes = embedded.tokens, embedded.ropes
    groups = [_start(batch, x, prefix, ropes is not None, track) for batch in batches]
    if len(groups) > 1:
        x = _join([select(x, group.images)[:, : group.shape[1]] for group in groups])
    elif groups[0].shape[1] < x.shape[1]:
        x = x[:, : groups[0].shape[1]]

    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        rope = None if ropes is None else ropes[i]
        if i == last and prefix_only:
            x = _attend(block, x, groups, rope, queries=prefix)[0]
        else:
            rs = [group.per_block[i] for group in groups]
            x = _attend_and_merge(block, x, groups, rs, rope, prefix, bias_of)
        x = block.add_mlp(x)
    x = norm(x)
    shapes = [(group.shape[0], prefix) if prefix_only else group.shape for group in groups]
    return [Encoded(part, group.sizes, group.token_map) for group, part in zip(groups, _split(x, shapes), strict=True)]


@dataclass
class _Group:
    """What is known of images that merge group_images, on their way through the blocks."""

    images: Sequence[int]
    per_block: tuple[int, ...]
    sizes: Tensor
    token_map: Tensor | None
    bias: Tensor | None = None
    """what sizes add to attention logits, once they differ, as `attention` takes it"""
    origin: Tensor | None = None
    """[B, N] the token, before any merge, whose rotary position each token has; None where there are none"""

    @property
    def shape(self) -> tuple[int, int]:
        """Images, and tokens of each."""
        batch, tokens = self.sizes.shape
        return batch, tokens

    def rope(self, table: Tensor | None) -> Tensor | None:
        """Return of `table` [B or 1, N, heads or 1, dim / 2] the positions of the tokens that are left."""
        if table is None or self.origin is None:
            return None
        if table.shape[0] > 1:  # images have positions of their own
            return torch.take_along_dim(select(table, self.images), self.origin[:, :, None, None], dim=1)
        if self.origin.shape[1] == table.shape[1]:
            return table
        return table[0].index_select(0, self.origin.flatten()).view(*self.origin.shape, *table.shape[2:])


def _start(batch: MergeGroup, x: Tensor, prefix: int, has_positions: bool, track: bool) -> _Group:
    count, tokens = len(batch.images), batch.tokens
    # float32 whatever the tokens' type: bfloat16 cannot count past 256.
    sizes = x.new_ones(count, tokens, dtype=torch.promote_types(x.dtype, torch.float32))
    own = torch.arange(tokens, device=x.device).expand(count, -1) if has_positions or track else None
    token_map = own[:, prefix:] if track and own is not None else None
    return _Group(batch.images, batch.per_block, sizes, token_map, origin=own if has_positions else None)


def _attend_and_merge(
    block: Layers,
    x: Tensor,
    groups: Sequence[_Group],
    rs: Sequence[int],
    rope: Tensor | None,
    prefix: int,
    bias_of: BiasOf | None,
) -> Tensor:
    """Return the tokens of all groups as they enter the MLP."""
    # Apart from `encode`, so that keys, which hold all that was projected, are gone where the MLP needs most memory.
    x, keys = _attend(block, x, groups, rope)
    return _merge(x, keys, groups, rs, prefix, bias_of)


def _attend(
    block: Layers, x: Tensor, groups: Sequence[_Group], rope: Tensor | None, queries: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the tokens `x` of all groups after attention, the first `queries` of each image, and each group's keys."""
    shapes = [group.shape for group in groups]
    qkv, side = block.project(x)
    parts = [
        block.attend(part, group.rope(rope), group.bias, queries)
        for part, group in zip(_split(qkv, shapes), groups, strict=True)
    ]
    if queries is not None:
        x = _first(x, shapes, queries)
        side = None if side is None else _first(side, shapes, queries)
    return block.add_attended(x, _join([attended for attended, _ in parts]), side), [keys for _, keys in parts]


def _merge(
    x: Tensor, keys: Sequence[Tensor], groups: Sequence[_Group], rs: Sequence[int], prefix: int, bias_of: BiasOf | None
) -> Tensor:
    """Merge `rs[i]` tokens of each image of group i and return the tokens of all groups that are left."""
    if not any(rs):
        return x
    parts = list(_split(x, [group.shape for group in groups]))
    matcher = matcher_for(x, *keys)
    for i, (group, wanted) in enumerate(zip(groups, rs, strict=True)):
        r = min(wanted, mergeable(group.shape[1], prefix))
        if r == 0:
            continue
        matching = matcher.match(keys[i], r, prefix)
        if group.origin is not None:
            # A source that is merged leaves no trace: its destination stays where it is.
            group.origin = group.origin.flatten()[matching.order]
        parts[i], group.sizes = matcher.combine(parts[i], group.sizes, matching)
        group.bias = None if bias_of is None else bias_of(group.sizes, x.dtype)
        if group.token_map is not None:
            group.token_map = moves(matching).gather(1, group.token_map)
    return _join(parts)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Put the tokens [B, N, C] of each group end to end, [total, C]; a single group stays as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


def _split(x: Tensor, shapes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Undo `_join` for groups of `shapes` (B, N), without copying."""
    if len(shapes) == 1:
        return [x]
    rows = torch.split(x, [batch * tokens for batch, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(rows, shapes, strict=True)]


def select(x: Tensor, images: Sequence[int]) -> Tensor:
    """Return the chosen ones of `x` [B, ...], in that order.

    By views: an index made of a list would be copied to the device first, and the host would wait for it.
    """
    return torch.stack([x[image] for image in images])


def _first(x: Tensor, shapes: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    return _join([part[:, :tokens] for part in _split(x, shapes)])
