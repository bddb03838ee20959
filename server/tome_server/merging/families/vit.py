"""timm's VisionTransformer with token merging: blocks in which attention comes before the MLP.

Three things differ from timm's forward pass: the keys also serve as the similarity metric, tokens are merged between
attention and MLP, and attention weighs each token by the number of patches it stands for.
"""

from timm.layers import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor

from tome_server.merging.attention import attention
from tome_server.merging.encoder import Embedded
from tome_server.merging.families.sequential import PostNorm, SequentialLayers


def embed(model: VisionTransformer, images: Tensor) -> Embedded:
    """Return the tokens of `images` [B, C, H, W]."""
    x = model._pos_embed(model.patch_embed(images))
    return Embedded(model.norm_pre(model.patch_drop(x)))


def self_attention(
    part: Attention | ParallelScalingBlock, qkv: Tensor, bias: Tensor | None, queries: int | None
) -> tuple[Tensor, Tensor]:
    """Run the attention of `part`, a module with heads, query and key norms, and dropout.

    Args:
        part: timm's Attention, or a block that holds the same parts.
        qkv: [B, N, 3 * heads * dim] queries, keys and values.
        bias: what to add to the logits of each key, as `attention` takes it.
        queries: number of tokens at the front whose output is needed; None for all.

    Returns:
        The output [B, queries or N, heads * dim] before its projection, and the keys [B, heads, N, dim].
    """
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, part.num_heads, part.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = part.q_norm(q[:, :, :queries]), part.k_norm(k)
    dropout = part.attn_drop.p if part.training else 0.0
    out = attention(q, k, v, bias, dropout=dropout, scale=part.scale)
    return out.transpose(1, 2).flatten(2), k


class BlockLayers(SequentialLayers):
    """timm's Block, the plain one of ViT, with the norms first."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.key_heads = self.heads
        self.head_dim: int = block.attn.head_dim

    def qkv(self, x: Tensor) -> Tensor:
        """Return queries, keys and values [..., 3 * heads * dim] of tokens after their norm."""
        projected: Tensor = self.attn.qkv(x)
        return projected

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  positions are added to the tokens
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return attention's output [B, queries or N, heads * dim] and the keys [B, heads, N, dim]."""
        return self_attention(self.attn, qkv, bias, queries)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` plus attention's output; `side` is the gate."""
        output: Tensor = self.block.drop_path1(self.block.ls1(self.attention_output(attended, side)))
        return x + output

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the MLP's output."""
        output: Tensor = self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))
        return x + output


class ResPostLayers(PostNorm, BlockLayers):
    """timm's ResPostBlock, with the norms last."""
