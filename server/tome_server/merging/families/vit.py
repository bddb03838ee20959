"""timm's VisionTransformer with token merging: blocks in which attention comes before the MLP.

Compared with timm's own: the keys also serve as the similarity metric; tokens are merged between attention and MLP;
and attention weighs each token by the patches it stands for.
"""

from timm.layers import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tome_server.merging.attention import attention
from tome_server.merging.encoder import Embedded


def embed(model: VisionTransformer, images: Tensor) -> Embedded:
    """Return `images` [B, C, H, W] as tokens."""
    x = model._pos_embed(model.patch_embed(images))
    return Embedded(model.norm_pre(model.patch_drop(x)))


def self_attention(
    part: Attention | ParallelScalingBlock, qkv: Tensor, bias: Tensor | None, queries: int | None
) -> tuple[Tensor, Tensor]:
    """Attend among tokens of `qkv` [B, N, 3 * heads * dim] with the heads, norms and dropout of a `part` of a block.

    `bias` and `queries` are as encoder.Layers says. Returns [B, queries or N, heads * dim], and the keys
    [B, heads, N, dim].
    """
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, part.num_heads, part.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = part.q_norm(q[:, :, :queries]), part.k_norm(k)
    dropout = part.attn_drop.p if part.training else 0.0
    out = attention(q, k, v, bias, dropout=dropout, scale=part.scale)
    return out.transpose(1, 2).flatten(2), k


class BlockLayers:
    """timm's Block, the plain one of ViT: norms come first."""

    norms_first = True

    def __init__(self, block: Block) -> None:
        self.block = block
        self.attn: Attention = block.attn
        self.heads: int = block.attn.num_heads
        self.key_heads = self.heads
        self.head_dim: int = block.attn.head_dim
        self.gate: nn.Linear | None = getattr(block.attn, "gate", None)  # not in all versions of timm
        self.before, self.after = (block.attn,), (block.mlp,)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., 3 * heads * dim], and where attention is gated its gate."""
        return self.project_normed(self.block.norm1(x))

    def project_normed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As project, of tokens that are normed already or never are."""
        return self.qkv(x), None if self.gate is None else self.gate(x).sigmoid()

    def qkv(self, x: Tensor) -> Tensor:
        """Return queries, keys and values alone."""
        projected: Tensor = self.attn.qkv(x)
        return projected

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says."""
        return self_attention(self.attn, qkv, bias, queries)

    def attention_output(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Return what attention itself gives, [..., channels]."""
        attended = self.attn.norm(attended)
        if gate is not None:
            attended = attended * gate
        output: Tensor = self.attn.proj_drop(self.attn.proj(attended))
        return output

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """As encoder.Layers says; `side` is the gate."""
        found: Tensor = self.block.drop_path1(self.block.ls1(self.attention_output(attended, side)))
        return x + found

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with what the MLP makes of it added to it."""
        made: Tensor = self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))
        return x + made


class ResPostLayers(BlockLayers):
    """timm's ResPostBlock: norms come last, before the sum."""

    norms_first = False
    block: ResPostBlock

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As BlockLayers does, without a norm."""
        return self.project_normed(x)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """As encoder.Layers says; `side` is the gate."""
        found: Tensor = self.block.drop_path1(self.block.norm1(self.attention_output(attended, side)))
        return x + found

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with what the MLP makes of it added to it."""
        made: Tensor = self.block.drop_path2(self.block.norm2(self.block.mlp(x)))
        return x + made
