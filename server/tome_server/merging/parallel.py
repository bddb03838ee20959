"""Blocks of timm's VisionTransformer whose parts work side by side, with token merging.

Compared with timm's own: the keys, of all attentions where there are several, also serve as the similarity metric, and
attention weighs each token by the patches it stands for. Where attention and MLP read the same tokens there is nothing
between them to merge, so tokens are merged after the block; where several attentions come before several MLPs, tokens
are merged between, as ever.
"""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor
from torch.nn import functional as F


class ParallelScalingLayers:
    """timm's ParallelScalingBlock (ViT-22B, arXiv 2302.05442): attention beside MLP."""

    def __init__(self, block: ParallelScalingBlock) -> None:
        self.block = block
        self.heads: int = block.num_heads
        self.key_heads = self.heads
        self.head_dim: int = block.head_dim
        self.before, self.after = (block,), ()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., 3 * heads * dim], and the MLP's hidden channels."""
        block = self.block
        projected: Tensor = block.in_proj(block.in_norm(x))
        qkv_width = 3 * self.heads * self.head_dim
        hidden, qkv = torch.split(projected, [projected.shape[-1] - qkv_width, qkv_width], dim=-1)
        return qkv, hidden if block.mlp_bias is None else hidden + block.mlp_bias

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says."""
        block = self.block
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = block.q_norm(q[:, :, :queries]), block.k_norm(k)
        dropout = block.attn_drop.p if block.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=block.scale)
        return out.transpose(1, 2).reshape(batch, -1, self.heads * self.head_dim), k

    def add_attended(self, x: Tensor, attended: Tensor, beside: Tensor | None) -> Tensor:
        """Return `x` with all that the block found added to it; `beside` is the MLP's hidden channels."""
        block = self.block
        hidden = block.mlp_drop(block.mlp_act(beside))
        if block.out_proj is not None:
            found = block.out_proj(torch.cat([attended, hidden], dim=-1))
        else:
            found = block.attn_out_proj(attended) + block.mlp_out_proj(hidden)
        added: Tensor = block.drop_path(block.ls(found))
        return x + added

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x`: the MLP was beside attention."""
        return x


class ParallelThingsLayers:
    """timm's ParallelThingsBlock (arXiv 2203.09795): several attentions, then several MLPs, each kind summed.

    The attentions are computed as one that has the heads of all.
    """

    def __init__(self, block: ParallelThingsBlock) -> None:
        self.block = block
        self.attns = [branch.attn for branch in block.attns]
        self.each: int = self.attns[0].num_heads
        self.heads = self.each * len(self.attns)
        self.key_heads = self.heads
        self.head_dim: int = self.attns[0].head_dim
        self.before, self.after = tuple(block.attns), tuple(block.ffns)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries of all attentions, then keys, then values: [..., 3 * heads * dim]."""
        each = [branch.attn.qkv(branch.norm(x)).unflatten(-1, (3, -1)) for branch in self.block.attns]
        return torch.cat(each, dim=-1).flatten(-2), None

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says."""
        first = self.attns[0]
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q = torch.cat([attn.q_norm(part) for attn, part in self._by_attention(q[:, :, :queries], 1)], dim=1)
        k = torch.cat([attn.k_norm(part) for attn, part in self._by_attention(k, 1)], dim=1)
        dropout = first.attn_drop.p if first.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=first.scale)
        return out.transpose(1, 2).reshape(batch, -1, self.heads * self.head_dim), k

    def add_attended(self, x: Tensor, attended: Tensor, beside: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """Return `x` with the sum of what the attentions found added to it."""
        found = [
            branch.drop_path(branch.ls(branch.attn.proj_drop(branch.attn.proj(branch.attn.norm(part)))))
            for branch, (_, part) in zip(self.block.attns, self._by_attention(attended, -1), strict=True)
        ]
        return x + torch.stack(found).sum(dim=0)

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with the sum of what the MLPs make of it added to it."""
        return x + torch.stack([branch(x) for branch in self.block.ffns]).sum(dim=0)

    def _by_attention(self, x: Tensor, dim: int) -> list[tuple[Attention, Tensor]]:
        return list(zip(self.attns, x.chunk(len(self.attns), dim=dim), strict=True))
