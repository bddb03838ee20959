"""The forward pass of timm's VisionTransformer with token merging.

Compared with timm's own: the keys also serve as the similarity metric; tokens are merged between attention and MLP;
attention and pooling weigh each token by the patches it stands for; and where the head reads prefix tokens alone, the
last block computes those alone, which changes nothing in the result.

Images of one batch may merge differently. What sees each token by itself (norms, linear layers) runs on the tokens of
all images together, end to end and without padding; attention and merging run on each group of images that merge alike.

Everything a call needs is in its arguments: modules are read, never written, so calls may run side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.matching import combine, match, moves
from tome_server.merging.schedule import mergeable


@dataclass(frozen=True)
class Encoded:
    """Tokens of images that merge alike, after the last block and final norm."""

    tokens: Tensor
    """[B, T, D]; where only the prefix was asked for, [B, prefix, D]."""
    sizes: Tensor
    """[B, T] patches that each token stands for; 1 for prefix tokens."""
    token_map: Tensor | None
    """[B, patches] index of the token that each patch went into, if asked for."""


class Layers:
    """What a block computes for each token by itself, as timm's modules do it. Tensors are [..., channels]."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.attn: Attention = block.attn

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., 3 * heads * dim], and where attention is gated its gate."""
        x = self.block.norm1(x)
        return self.attn.qkv(x), None if self.attn.gate is None else self.attn.gate(x).sigmoid()

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, heads, N, dim] after their norms, if they have any."""
        return self.attn.q_norm(q), self.attn.k_norm(k)

    def add_attended(self, x: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Return `x` with what attention found [..., heads * dim] added to it."""
        attended = self.attn.norm(attended)
        if gate is not None:
            attended = attended * gate
        found: Tensor = self.block.drop_path1(self.block.ls1(self.attn.proj_drop(self.attn.proj(attended))))
        return x + found

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with what the MLP makes of it added to it."""
        made: Tensor = self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))
        return x + made


def reads_prefix_only(model: VisionTransformer) -> bool:
    """Return whether the classifier reads nothing but prefix tokens."""
    return model.attn_pool is None and model.global_pool == "token"


def encode(
    model: VisionTransformer,
    blocks: Sequence[Layers],
    images: Tensor,
    schedules: Mapping[tuple[int, ...], Sequence[int]],
    *,
    proportional: bool,
    prefix_only: bool,
    track: bool,
) -> list[Encoded]:
    """Run `images` [B, C, H, W] through embedding, blocks and final norm, in groups that come back one by one.

    `schedules` gives each group's tokens to merge in each block, and its images' positions in the batch.
    `proportional` adds log(size) to the attention logits of each key. `prefix_only` leaves all but the prefix tokens
    of the last block uncomputed. `track` records the token map.
    """
    x = model.patch_embed(images)
    x = model._pos_embed(x)
    x = model.norm_pre(model.patch_drop(x))

    batch, tokens, _ = x.shape
    prefix: int = model.num_prefix_tokens
    # float32 whatever the tokens' type: bfloat16 cannot count past 256.
    sizes = x.new_ones(batch, tokens, dtype=torch.promote_types(x.dtype, torch.float32))
    token_map = torch.arange(prefix, tokens, device=x.device).expand(batch, -1) if track else None
    if len(schedules) > 1:
        x = _join([x[members] for members in schedules.values()])
    groups = []
    for per_block, members in schedules.items():
        count = len(members)
        groups.append(_Group(per_block, sizes[:count], None if token_map is None else token_map[:count]))

    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        if i == last and prefix_only:
            x = _attend(block, x, groups, prefix)[0]
        else:
            x, keys = _attend(block, x, groups)
            x = _merge(x, keys, groups, [group.per_block[i] for group in groups], prefix, proportional)
        x = block.add_mlp(x)
    x = model.norm(x)
    shapes = [(group.shape[0], prefix) if prefix_only else group.shape for group in groups]
    return [Encoded(part, group.sizes, group.token_map) for group, part in zip(groups, _split(x, shapes), strict=True)]


@dataclass
class _Group:
    """What is known of images that merge alike, on their way through the blocks."""

    per_block: tuple[int, ...]
    sizes: Tensor
    token_map: Tensor | None
    bias: Tensor | None = None
    """[B, 1, 1, N] what sizes add to attention logits, once they differ"""

    @property
    def shape(self) -> tuple[int, int]:
        """Images, and tokens of each."""
        batch, tokens = self.sizes.shape
        return batch, tokens


def _attend(
    block: Layers, x: Tensor, groups: Sequence[_Group], queries: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the tokens `x` of all groups after attention, the first `queries` of each image, and each group's keys."""
    shapes = [group.shape for group in groups]
    qkv, gate = block.project(x)
    parts = [attend(block, part, group.bias, queries) for part, group in zip(_split(qkv, shapes), groups, strict=True)]
    if queries is not None:
        x = _first(x, shapes, queries)
        gate = None if gate is None else _first(gate, shapes, queries)
    return block.add_attended(x, _join([attended for attended, _ in parts]), gate), [keys for _, keys in parts]


def _merge(
    x: Tensor, keys: Sequence[Tensor], groups: Sequence[_Group], rs: Sequence[int], prefix: int, proportional: bool
) -> Tensor:
    """Merge `rs[i]` tokens of each image of group i and return the tokens of all groups that are left."""
    if not any(rs):
        return x
    parts = list(_split(x, [group.shape for group in groups]))
    for i, (group, wanted) in enumerate(zip(groups, rs, strict=True)):
        r = min(wanted, mergeable(group.shape[1], prefix))
        if r == 0:
            continue
        # The sum over heads has the direction of their mean, which is all that cosine similarity sees.
        matching = match(keys[i].sum(dim=1), r, prefix)
        parts[i], group.sizes = combine(parts[i], group.sizes, matching)
        group.bias = size_bias(group.sizes, x.dtype) if proportional else None
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


def _first(x: Tensor, shapes: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    return _join([part[:, :tokens] for part in _split(x, shapes)])


def attend(block: Layers, qkv: Tensor, bias: Tensor | None, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """Attend among tokens of `qkv` [B, N, 3 * heads * dim], adding `bias` [B, 1, 1, N] to the logits of each key.

    Only the first `queries` tokens ask, if given. Returns what they found [B, queries or N, heads * dim] and the keys
    [B, heads, N, dim].
    """
    attn = block.attn
    batch, tokens, _ = qkv.shape
    heads, dim = attn.num_heads, attn.head_dim
    q, k, v = qkv.view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = block.normed(q[:, :, :queries], k)

    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    return out.transpose(1, 2).reshape(batch, -1, heads * dim), k


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(size) as an attention mask [B, 1, 1, N] (ToMe, equation 1, "proportional attention")."""
    bias = size.log().to(dtype)
    if size.is_cuda:
        # Memory-efficient attention there wants the rows of a mask to start at multiples of 8 elements.
        tokens = size.shape[1]
        bias = F.pad(bias, (0, -tokens % 8))[:, :tokens]
    return bias[:, None, None, :]


def classify(model: VisionTransformer, groups: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Return logits [B, classes] and the features [B, D] they are made from, pooling by size.

    Images are in the order of `groups`.
    """
    if type(model) is VisionTransformerDistilled:
        tokens = torch.cat([group.tokens[:, : model.num_prefix_tokens] for group in groups])
        return model.forward_head(tokens), model.forward_head(tokens, pre_logits=True)
    pooled = [_pool(model, group) for group in groups]
    features = model.head_drop(model.fc_norm(pooled[0] if len(pooled) == 1 else torch.cat(pooled)))
    return model.head(features), features


def _pool(model: VisionTransformer, encoded: Encoded) -> Tensor:
    if reads_prefix_only(model):
        return encoded.tokens[:, 0]
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    x, size = encoded.tokens[:, first:], encoded.sizes[:, first:]
    if model.attn_pool is not None:
        pooled: Tensor = model.attn_pool(x, attn_mask=size_bias(size, x.dtype))
        return pooled
    share = (size / size.sum(dim=1, keepdim=True)).to(x.dtype).unsqueeze(-1)
    if model.global_pool == "avg":
        return (x * share).sum(dim=1)
    if model.global_pool == "max":
        return x.amax(dim=1)
    return 0.5 * (x.amax(dim=1) + (x * share).sum(dim=1))
