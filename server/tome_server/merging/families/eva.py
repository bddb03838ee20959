"""timm's Eva (EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others) with token merging.

Four things differ from timm's forward pass:

- The keys also serve as the similarity metric, taken before their rotation: tokens are compared by what they show, not
  by where they are.
- Rotary positions follow the tokens: a merged token keeps the position of its destination.
- Tokens are merged between attention and MLP.
- Attention weighs each token by the number of patches it stands for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.nn import functional as F

from tome_server.merging.attention import attention
from tome_server.merging.encoder import Embedded
from tome_server.merging.families.sequential import PostNorm, SequentialLayers


def embed(model: Eva, images: Tensor) -> Embedded:
    """Return the tokens of `images` [B, C, H, W] and their rotary positions.

    Raises:
        ValueError: the model is in training mode with patch dropout, after which images would differ in positions.
    """
    if model.training and model.patch_drop is not None:
        raise ValueError("patches can't be dropped (patch_drop_rate) in training mode where tokens are merged")
    x, rope = model._pos_embed(model.patch_embed(images))
    return Embedded(model.norm_pre(x), rope_tables(model, rope, model.rope_mixed))


def rope_tables(model: Eva | NaFlexVit, rope: Tensor | Sequence[Tensor] | None, mixed: bool) -> list[Tensor] | None:
    """Return the rotary positions for each block, as complex numbers [B or 1, N, heads or 1, dim / 2].

    Args:
        model: the model whose blocks they are for.
        rope: timm's table, sines followed by cosines: [patches, 2 * dim], [heads, patches, 2 * dim] or
            [B, heads or 1, patches, 2 * dim]. None for a model without rotary positions.
        mixed: whether `rope` holds a table for each block instead of one for all.
    """
    if rope is None:
        return None
    fixed = getattr(model, "rope", None)
    if type(fixed) is FixedPositions and rope is fixed.table and fixed.tables:
        return fixed.tables
    prefix, halves = int(model.num_prefix_tokens), [_rotates_half(block.attn) for block in model.blocks]
    if mixed:
        return [_rotations(table, half, prefix) for table, half in zip(rope, halves, strict=True)]
    assert isinstance(rope, Tensor)
    tables = {half: _rotations(rope, half, prefix) for half in set(halves)}
    return [tables[half] for half in halves]


def _rotations(rope: Tensor, half: bool, prefix: int) -> Tensor:
    """Return one of timm's tables as complex numbers of length 1. Prefix tokens, which have no position, get 1."""
    rope = rope[(None,) * (4 - rope.ndim)].transpose(1, 2)
    sin, cos = rope.to(torch.promote_types(rope.dtype, torch.float32)).chunk(2, dim=-1)
    # timm repeats every number, for both channels of a pair.
    once = slice(cos.shape[-1] // 2) if half else slice(None, None, 2)
    return F.pad(torch.complex(cos[..., once], sin[..., once]), (0, 0, 0, 0, prefix, 0), value=1.0)


def _rotates_half(attn: EvaAttention | AttentionRope) -> bool:
    """Return whether the two channels of a pair lie half a head apart, instead of next to each other."""
    return getattr(attn, "rotate_half", False)  # not in all versions of timm


class FixedPositions(nn.Module):
    """One of timm's rotary embeddings, with its table for one grid of patches computed in advance.

    timm computes most tables in every call; DINOv3's on the host, from where it is then copied to the device.
    """

    def __init__(self, rope: nn.Module, grid: tuple[int, int], interleaved: bool = False) -> None:
        """Compute the table.

        Args:
            rope: timm's rotary embedding.
            grid: rows and columns of patches.
            interleaved: change the order of channels, from pairs that lie half a head apart to pairs of neighbours.
        """
        super().__init__()
        self.rope: Any = rope
        self._grid, self._interleaved = grid, interleaved
        self.table = self._compute(grid)
        self.tables: list[Tensor] = []
        """`rope_tables` of `table`"""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPositions":
        # The tables move with the model but keep their dtype: timm's are float32 whatever the weights are.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self.table).device
        self.table, self.tables = self.table.to(device), [table.to(device) for table in self.tables]
        return self

    def get_embed(self, shape: Sequence[int]) -> Tensor:
        """Return timm's table for `shape`, rows and columns of patches: [patches, 2 * dim], or timm's mixed form."""
        return self.table if tuple(shape) == self._grid else self._compute(shape)

    def _compute(self, shape: Sequence[int]) -> Tensor:
        table: Tensor = self.rope.get_embed(shape=shape)
        if not self._interleaved:
            return table
        sin, cos = (part[..., : part.shape[-1] // 2].repeat_interleave(2, dim=-1) for part in table.chunk(2, dim=-1))
        return torch.cat([sin, cos], dim=-1)


def fix_positions(model: Any, grid: tuple[int, int], interleaved: bool = False) -> None:
    """Compute an Eva's rotary positions once, for images of `grid` (rows, columns) patches. For inference only.

    It changes `model`, but not its results unless `interleaved` (see FixedPositions). Other models stay as they are.
    """
    if type(model) is Eva and model.rope is not None and type(model.rope) is not FixedPositions:
        model.rope = FixedPositions(model.rope, grid, interleaved)
        model.rope.tables = rope_tables(model, model.rope.table, model.rope_mixed)


class EvaLayers(SequentialLayers):
    """timm's EvaBlock, with the norms first."""

    def __init__(self, block: EvaBlock) -> None:
        super().__init__(block)
        self.key_heads: int = getattr(block.attn, "num_kv_heads", self.heads)
        self.head_dim: int = block.attn.proj.in_features // self.heads
        self.rotate_half = _rotates_half(block.attn)

    def qkv(self, x: Tensor) -> Tensor:
        """Return queries, keys and values [..., (heads + 2 * key_heads) * dim] of tokens after their norm."""
        attn = self.attn
        if attn.qkv is None:
            return torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], dim=-1)
        projected: Tensor
        if getattr(attn, "q_bias", None) is None:
            projected = attn.qkv(x)
            return projected
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        projected = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
        return projected

    def attend(
        self, qkv: Tensor, rope: Tensor | None, bias: Tensor | None, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return attention's output [B, queries or N, heads * dim] and the keys [B, key_heads, N, dim] unrotated."""
        attn = self.attn
        batch, tokens, _ = qkv.shape
        per_head = qkv.view(batch, tokens, -1, self.head_dim)
        q, k, v = torch.split(per_head, [self.heads, self.key_heads, self.key_heads], dim=2)
        q, k = attn.q_norm(q[:, :queries]), attn.k_norm(k)

        content = k
        if rope is not None:
            q, k = self._rotated(q, rope[:, :queries]).type_as(v), self._rotated(k, rope).type_as(v)
        if self.key_heads < self.heads:
            repeats = self.heads // self.key_heads
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        dropout = attn.attn_drop.p if attn.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, bias, dropout=dropout, scale=attn.scale)
        return out.transpose(1, 2).flatten(2), content.transpose(1, 2)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Multiply each pair of channels of `x` [B, N, heads, dim], as a complex number, by its position in `rope`.

        The result has pairs as neighbours. Any order of channels will do, as long as queries and keys share it.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        leading = x.shape[:-1]
        pairs = x.view(*leading, 2, -1).mT.contiguous() if self.rotate_half else x.view(*leading, -1, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` plus attention's output; `side` is the gate."""
        output = self.attention_output(attended, side)
        if self.block.gamma_1 is not None:
            output = self.block.gamma_1 * output
        added: Tensor = x + self.block.drop_path1(output)
        return added

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the MLP's output."""
        output: Tensor = self.block.mlp(self.block.norm2(x))
        if self.block.gamma_2 is not None:
            output = self.block.gamma_2 * output
        output = self.block.drop_path2(output)
        return x + output


class EvaPostNormLayers(PostNorm, EvaLayers):
    """timm's EvaBlockPostNorm, with the norms last."""
