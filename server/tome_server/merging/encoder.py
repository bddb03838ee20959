"""The forward pass through the blocks, with merging after attention; shared by all model families.

Images of one batch may merge differently. Layers that treat each token by itself (norms, linear layers) run on the
tokens of all images at once, laid end to end without padding. Attention and merging run on each group of images that
merge the same.

Modules are read, never written, and a call's state is in its local variables, so calls may run at the same time.
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
    """One block, taken apart into the steps between which attention and merging happen."""

    @property
    def heads(self) -> int:
        """Number of heads of queries."""
        ...

    @property
    def key_heads(self) -> int:
        """Number of heads of keys and values; fewer than `heads` in grouped-query attention."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        ...

    @property
    def before(self) -> Sequence[nn.Module]:
        """Modules whose linear layers run on the tokens that enter the block; for counting operations."""
        ...

    @property
    def after(self) -> Sequence[nn.Module]:
        """Modules whose linear layers run on the tokens left after merging; for counting operations."""
        ...

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values of tokens `x` [..., channels], and an optional `side` for `add_attended`."""
        ...

    def attend(
        self, qkv: Tensor, rope: Tensor | None, bias: Tensor | None, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        """Run attention among the tokens of each image.

        Args:
            qkv: [B, N, channels] from `project`.
            rope: [B or 1, N, heads or 1, dim / 2] the complex numbers by which to multiply each token's pairs of
                channels, for its rotary position. None in a model without them.
            bias: what to add to the logits of each key, as `attention` takes it.
            queries: number of tokens at the front whose output is needed; None for all.

        Returns:
            The output [B, queries or N, heads * dim] before its projection, and the keys [B, key_heads, N, dim] to
            compare tokens by, without their positions. A block may return the projected output instead, and the sum of
            the keys over their heads, [B, 1, N, dim].
        """
        ...

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` [..., channels] plus the projection of `attended`; `side` is from `project`."""
        ...

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` [..., channels] plus the output of what follows merging."""
        ...


@dataclass(frozen=True)
class Embedded:
    """The tokens of a batch of images before the first block."""

    tokens: Tensor
    """[B, N, D], prefix tokens first"""
    ropes: Sequence[Tensor] | None = None
    """rotary positions for each block: [B or 1, N, heads or 1, dim / 2] complex numbers, 1 for prefix tokens"""
    lengths: Sequence[int] | None = None
    """number of tokens of each image, prefix included, after which there is padding; None without padding"""


@dataclass(frozen=True)
class MergeGroup:
    """Images of a batch that have the same number of tokens and merge the same."""

    per_block: tuple[int, ...]
    """tokens to merge in each block"""
    images: Sequence[int]
    """their indices in the batch"""
    tokens: int
    """number of tokens of each image before the first block, prefix included"""


def group_images(embedded: Embedded, schedules: Mapping[tuple[int, ...], Sequence[int]]) -> list[MergeGroup]:
    """Return the images of a batch in groups that merge the same.

    Args:
        embedded: the batch.
        schedules: the indices of images, by the number of tokens that they merge in each block.
    """
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
    """The tokens of one group after the last block and the final norm."""

    tokens: Tensor
    """[B, T, D], or [B, prefix, D] if only prefix tokens were computed"""
    sizes: Tensor
    """[B, T] number of patches that each token stands for; 1 for prefix tokens"""
    token_map: Tensor | None
    """[B, patches] index of the token that each patch was merged into, if tracked"""


def encode(
    embedded: Embedded,
    blocks: Sequence[Layers],
    norm: Callable[[Tensor], Tensor],
    groups: Sequence[MergeGroup],
    *,
    prefix: int,
    bias_of: BiasOf | None,
    prefix_only: bool,
    track: bool,
) -> list[Encoded]:
    """Run a batch through the blocks and the final norm.

    Args:
        embedded: the batch.
        blocks: the model's blocks.
        norm: the final norm.
        groups: the batch's images, from `group_images`.
        prefix: number of tokens at the front of each image that are never merged.
        bias_of: turns sizes into what they add to attention logits; None for attention that ignores sizes.
        prefix_only: compute prefix tokens alone in the last block, for a head that reads no others.
        track: record which token each patch was merged into.

    Returns:
        The tokens of each group.
    """
    x, ropes = embedded.tokens, embedded.ropes
    states = [_start(group, x, prefix, ropes is not None, track) for group in groups]
    if len(groups) > 1:
        x = _join([select(x, group.images)[:, : group.tokens] for group in groups])
    elif groups[0].tokens < x.shape[1]:
        x = x[:, : groups[0].tokens]

    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        rope = None if ropes is None else ropes[i]
        if i == last and prefix_only:
            x = _attend(block, x, states, rope, queries=prefix)[0]
        else:
            rs = [group.per_block[i] for group in groups]
            x = _attend_and_merge(block, x, states, rs, rope, prefix, bias_of)
        x = block.add_mlp(x)
    x = norm(x)
    shapes = [(state.shape[0], prefix) if prefix_only else state.shape for state in states]
    return [Encoded(part, state.sizes, state.token_map) for state, part in zip(states, _split(x, shapes), strict=True)]


@dataclass
class _GroupState:
    """What merging has done so far to the tokens of one group."""

    images: Sequence[int]
    """indices in the batch"""
    sizes: Tensor
    """[B, N] number of patches that each token stands for"""
    token_map: Tensor | None
    """[B, patches] index of the token that each patch was merged into, if tracked"""
    bias: Tensor | None = None
    """what sizes add to attention logits, as `attention` takes it; None before the first merge"""
    origin: Tensor | None = None
    """[B, N] index, before any merge, of the token whose rotary position each token has; None without positions"""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of images, and of tokens of each."""
        batch, tokens = self.sizes.shape
        return batch, tokens

    def rope(self, table: Tensor | None) -> Tensor | None:
        """Return the positions of the tokens that are left, from those of all [B or 1, N, heads or 1, dim / 2]."""
        if table is None or self.origin is None:
            return None
        if table.shape[0] > 1:  # each image has its own positions
            return torch.take_along_dim(select(table, self.images), self.origin[:, :, None, None], dim=1)
        if self.origin.shape[1] == table.shape[1]:
            return table
        return table[0].index_select(0, self.origin.flatten()).view(*self.origin.shape, *table.shape[2:])


def _start(group: MergeGroup, x: Tensor, prefix: int, has_positions: bool, track: bool) -> _GroupState:
    count, tokens = len(group.images), group.tokens
    # At least float32: bfloat16 can't count past 256.
    sizes = x.new_ones(count, tokens, dtype=torch.promote_types(x.dtype, torch.float32))
    indices = torch.arange(tokens, device=x.device).expand(count, -1) if has_positions or track else None
    token_map = indices[:, prefix:] if track and indices is not None else None
    return _GroupState(group.images, sizes, token_map, origin=indices if has_positions else None)


def _attend_and_merge(
    block: Layers,
    x: Tensor,
    states: Sequence[_GroupState],
    rs: Sequence[int],
    rope: Tensor | None,
    prefix: int,
    bias_of: BiasOf | None,
) -> Tensor:
    """Return the tokens of all groups as they enter the MLP."""
    # A function of its own, so that the keys, and with them the whole projection, are freed before the MLP runs, which
    # needs the most memory.
    x, keys = _attend(block, x, states, rope)
    return _merge(x, keys, states, rs, prefix, bias_of)


def _attend(
    block: Layers, x: Tensor, states: Sequence[_GroupState], rope: Tensor | None, queries: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the tokens of all groups after attention (the first `queries` of each image), and each group's keys."""
    shapes = [state.shape for state in states]
    qkv, side = block.project(x)
    parts = [
        block.attend(part, state.rope(rope), state.bias, queries)
        for part, state in zip(_split(qkv, shapes), states, strict=True)
    ]
    if queries is not None:
        x = _first(x, shapes, queries)
        side = None if side is None else _first(side, shapes, queries)
    return block.add_attended(x, _join([attended for attended, _ in parts]), side), [keys for _, keys in parts]


def _merge(
    x: Tensor,
    keys: Sequence[Tensor],
    states: Sequence[_GroupState],
    rs: Sequence[int],
    prefix: int,
    bias_of: BiasOf | None,
) -> Tensor:
    """Merge `rs[i]` tokens in each image of group i, and return the tokens of all groups that are left."""
    if not any(rs):
        return x
    parts = list(_split(x, [state.shape for state in states]))
    matcher = matcher_for(x, *keys)
    for i, (state, wanted) in enumerate(zip(states, rs, strict=True)):
        r = min(wanted, mergeable(state.shape[1], prefix))
        if r == 0:
            continue
        matching = matcher.match(keys[i], r, prefix)
        if state.origin is not None:
            # A merged token keeps its destination's position.
            state.origin = state.origin.flatten()[matching.order]
        parts[i], state.sizes = matcher.combine(parts[i], state.sizes, matching)
        state.bias = None if bias_of is None else bias_of(state.sizes, x.dtype)
        if state.token_map is not None:
            state.token_map = moves(matching).gather(1, state.token_map)
    return _join(parts)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Lay the tokens [B, N, C] of all groups end to end, [total, C]. A single group stays as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


def _split(x: Tensor, shapes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Undo `_join` for groups of `shapes` (B, N), without copying."""
    if len(shapes) == 1:
        return [x]
    rows = torch.split(x, [batch * tokens for batch, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(rows, shapes, strict=True)]


def select(x: Tensor, images: Sequence[int]) -> Tensor:
    """Return the given images of `x` [B, ...], in the given order.

    It stacks views: indexing by a list would copy the list to the device, and the host would wait for that.
    """
    return torch.stack([x[image] for image in images])


def _first(x: Tensor, shapes: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    return _join([part[:, :tokens] for part in _split(x, shapes)])
