"""timm's Eva (EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others) with token merging.

Compared with timm's own: the keys also serve as the similarity metric, before their rotation, so that tokens are
compared by what they show and not by where; rotary positions follow the tokens, a merged token keeping that of its
destination; tokens are merged between attention and MLP; and attention weighs each token by the patches it stands for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.nn import functional as F

from tome_server.merging.attention import attention
from tome_server.merging.encoder import Embedded


def embed(model: Eva, images: Tensor) -> Embedded:
    """Return `images` [B, C, H, W] as tokens with their rotary positions.

    Raises ValueError in training mode with patch dropout, after which positions would differ between images.
    """
    if model.training and model.patch_drop is not None:
        raise ValueError("patches can't be dropped (patch_drop_rate) in training mode where tokens are merged")
    x, rope = model._pos_embed(model.patch_embed(images))
    return Embedded(model.norm_pre(x), rope_tables(model, rope, model.rope_mixed))


def rope_tables(model: Eva | NaFlexVit, rope: Tensor | Sequence[Tensor] | None, mixed: bool) -> list[Tensor] | None:
    """Return each block's rotary positions, as complex numbers [B or 1, N, heads or 1, dim / 2].

    `rope` is what timm makes: sines and then cosines, [patches, 2 * dim], [heads, patches, 2 * dim] or [B, heads or 1,
    patches, 2 * dim]; where they are `mixed`, one for each block.
    """
    if rope is None:
        return None
    fixed = getattr(model, "rope", None)
    if type(fixed) is FixedPositions and rope is fixed.table and fixed.tables:
        return fixed.tables
    prefix, halves = int(model.num_prefix_tokens), [_rotates_half(block.attn) for block in model.blocks]
    if mixed:
        return [_turns(own, half, prefix) for own, half in zip(rope, halves, strict=True)]
    assert isinstance(rope, Tensor)
    tables = {half: _turns(rope, half, prefix) for half in set(halves)}
    return [tables[half] for half in halves]


def _turns(rope: Tensor, half: bool, prefix: int) -> Tensor:
    """Return a table of timm's as complex numbers of length 1, with 1 for prefix tokens, which have no position."""
    rope = rope[(None,) * (4 - rope.ndim)].transpose(1, 2)
    sin, cos = rope.to(torch.promote_types(rope.dtype, torch.float32)).chunk(2, dim=-1)
    # timm has every number twice, for either channel of a pair.
    once = slice(cos.shape[-1] // 2) if half else slice(None, None, 2)
    return F.pad(torch.complex(cos[..., once], sin[..., once]), (0, 0, 0, 0, prefix, 0), value=1.0)


def _rotates_half(attn: EvaAttention | AttentionRope) -> bool:
    """Return whether a channel's pair is half of the channels away, and not beside it."""
    return getattr(attn, "rotate_half", False)  # not in all versions of timm


class FixedPositions(nn.Module):
    """One of timm's rotary embeddings with its table for one grid of patches at hand.

    timm makes most of them in every call, that of DINOv3 on the host, from where it is copied to the device.
    `interleaved` puts a channel's pair next to it, from half of the channels away.
    """

    def __init__(self, rope: nn.Module, grid: tuple[int, int], interleaved: bool = False) -> None:
        super().__init__()
        self.rope: Any = rope
        self._grid, self._interleaved = grid, interleaved
        self.table = self._made(grid)
        self.tables: list[Tensor] = []
        """what `rope_tables` makes of it"""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedPositions":
        # It goes where the model goes, but keeps its type: timm makes it float32 whatever the weights are.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(self.table).device
        self.table, self.tables = self.table.to(device), [table.to(device) for table in self.tables]
        return self

    def get_embed(self, shape: Sequence[int]) -> Tensor:
        """Return the table for a grid of `shape`: [patches, 2 * dim], or where positions are mixed timm's for those."""
        return self.table if tuple(shape) == self._grid else self._made(shape)

    def _made(self, shape: Sequence[int]) -> Tensor:
        table: Tensor = self.rope.get_embed(shape=shape)
        if not self._interleaved:
            return table
        sin, cos = (part[..., : part.shape[-1] // 2].repeat_interleave(2, dim=-1) for part in table.chunk(2, dim=-1))
        return torch.cat([sin, cos], dim=-1)


def fix_positions(model: Any, grid: tuple[int, int], interleaved: bool = False) -> None:
    """Have an Eva's table of rotary positions for images of `grid` patches made once.

    For inference only: it changes `model`, though not what that computes, unless `interleaved`, see FixedPositions.
    """
    if type(model) is Eva and model.rope is not None and type(model.rope) is not FixedPositions:
        model.rope = FixedPositions(model.rope, grid, interleaved)
        model.rope.tables = rope_tables(model, model.rope.table, model.rope_mixed)


class EvaLayers:
    """timm's EvaBlock: norms come first."""

    norms_first = True

    def __init__(self, block: EvaBlock) -> None:
        self.block = block
        self.attn: EvaAttention | AttentionRope = block.attn
        self.heads: int = block.attn.num_heads
        self.key_heads: int = getattr(block.attn, "num_kv_heads", self.heads)
        self.head_dim: int = block.attn.proj.in_features // self.heads
        self.gate: nn.Linear | None = getattr(block.attn, "gate", None)  # not in all versions of timm
        self.rotate_half = _rotates_half(block.attn)
        self.before, self.after = (block.attn,), (block.mlp,)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., (heads + 2 * key_heads) * dim], and where it is gated the gate."""
        return self.project_normed(self.block.norm1(x))

    def project_normed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As project, of tokens that are normed already or never are."""
        return self.qkv(x), None if self.gate is None else self.gate(x).sigmoid()

    def qkv(self, x: Tensor) -> Tensor:
        """Return queries, keys and values alone."""
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
        """As encoder.Layers says."""
        attn = self.attn
        batch, tokens, _ = qkv.shape
        per_head = qkv.view(batch, tokens, -1, self.head_dim)
        q, k, v = torch.split(per_head, [self.heads, self.key_heads, self.key_heads], dim=2)
        q, k = attn.q_norm(q[:, :queries]), attn.k_norm(k)

        content = k
        if rope is not None:
            q, k = self._rotated(q, rope[:, :queries]).type_as(v), self._rotated(k, rope).type_as(v)
        if self.key_heads < self.heads:
            shared = self.heads // self.key_heads
            k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
        dropout = attn.attn_drop.p if attn.training else 0.0
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, bias, dropout=dropout, scale=attn.scale)
        return out.transpose(1, 2).flatten(2), content.transpose(1, 2)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Return `x` [B, N, heads, dim] with each pair of its channels, as a complex number, times that of `rope`.

        Pairs come side by side: what order channels have matters to no one, if it is that of queries and of keys.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        own = x.shape[:-1]
        pairs = x.view(*own, 2, -1).mT.contiguous() if self.rotate_half else x.view(*own, -1, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * rope).flatten(-2)

    def attention_output(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Return what attention itself gives, [..., channels]."""
        attended = self.attn.norm(attended)
        if gate is not None:
            attended = attended * gate
        output: Tensor = self.attn.proj_drop(self.attn.proj(attended))
        return output

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """As encoder.Layers says; `side` is the gate."""
        found = self.attention_output(attended, side)
        if self.block.gamma_1 is not None:
            found = self.block.gamma_1 * found
        added: Tensor = x + self.block.drop_path1(found)
        return added

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with what the MLP makes of it added to it."""
        made: Tensor = self.block.mlp(self.block.norm2(x))
        if self.block.gamma_2 is not None:
            made = self.block.gamma_2 * made
        made = self.block.drop_path2(made)
        return x + made


class EvaPostNormLayers(EvaLayers):
    """timm's EvaBlockPostNorm: norms come last, before the sum."""

    norms_first = False
    block: EvaBlockPostNorm

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As EvaLayers does, without a norm."""
        return self.project_normed(x)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """As encoder.Layers says; `side` is the gate."""
        found: Tensor = self.block.drop_path1(self.block.norm1(self.attention_output(attended, side)))
        return x + found

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with what the MLP makes of it added to it."""
        made: Tensor = self.block.drop_path2(self.block.norm2(self.block.mlp(x)))
        return x + made
