"""The forward pass of timm's VisionTransformer with token merging.

Compared with timm's own: the keys also serve as the similarity metric; tokens are merged between attention and MLP;
attention and pooling weigh each token by the patches it stands for; and where the head reads prefix tokens alone, the
last block computes those alone, which changes nothing in the result.

Everything a call needs is in its arguments: modules are read, never written, so calls may run side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.matching import combine, match, moves
from tome_server.merging.schedule import mergeable


@dataclass(frozen=True)
class Encoded:
    """Tokens after the last block and final norm."""

    tokens: Tensor
    """[B, T, D]; where only the prefix was asked for, [B, prefix, D]."""
    sizes: Tensor
    """[B, T] patches that each token stands for; 1 for prefix tokens."""
    token_map: Tensor | None
    """[B, patches] index of the token that each patch went into, if asked for."""


def reads_prefix_only(model: VisionTransformer) -> bool:
    """Return whether the classifier reads nothing but prefix tokens."""
    return model.attn_pool is None and model.global_pool == "token"


def encode(
    model: VisionTransformer,
    images: Tensor,
    per_block: Sequence[int],
    *,
    proportional: bool,
    prefix_only: bool,
    track: bool,
) -> Encoded:
    """Run `images` [B, C, H, W] through embedding, blocks and final norm, merging `per_block[i]` tokens in block i.

    `proportional` adds log(size) to the attention logits of each key. `prefix_only` leaves all but the prefix tokens
    of the last block uncomputed. `track` records the token map.
    """
    x = model.patch_embed(images)
    x = model._pos_embed(x)
    x = model.norm_pre(model.patch_drop(x))

    batch, tokens, _ = x.shape
    prefix: int = model.num_prefix_tokens
    # float32 whatever the tokens' type: bfloat16 cannot count past 256.
    size = x.new_ones(batch, tokens, dtype=torch.promote_types(x.dtype, torch.float32))
    token_map = torch.arange(prefix, tokens, device=x.device).expand(batch, -1) if track else None

    last = len(model.blocks) - 1
    for i, (block, wanted) in enumerate(zip(model.blocks, per_block, strict=True)):
        bias = size_bias(size, x.dtype) if proportional and size.shape[1] < tokens else None
        if i == last and prefix_only:
            attended, _ = attend(block.attn, block.norm1(x), bias, queries=prefix)
            x = x[:, :prefix] + block.drop_path1(block.ls1(attended))
        else:
            attended, keys = attend(block.attn, block.norm1(x), bias)
            x = x + block.drop_path1(block.ls1(attended))
            r = min(wanted, mergeable(x.shape[1], prefix))
            if r > 0:
                # The sum over heads has the direction of their mean, which is all that cosine similarity sees.
                matching = match(keys.sum(dim=1), r, prefix)
                x, size = combine(x, size, matching)
                if token_map is not None:
                    token_map = moves(matching).gather(1, token_map)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return Encoded(model.norm(x), size, token_map)


def attend(attn: Attention, x: Tensor, bias: Tensor | None, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """Run timm's Attention on `x` [B, N, C], adding `bias` [B, 1, 1, N] to the logits of each key.

    Only the first `queries` tokens ask, if given. Returns their result [B, queries or N, C] and the keys
    [B, heads, N, D].
    """
    batch, tokens, _ = x.shape
    heads, dim = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q[:, :, :queries]), attn.k_norm(k)

    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).reshape(batch, -1, heads * dim))
    if attn.gate is not None:
        out = out * attn.gate(x[:, :queries]).sigmoid()
    return attn.proj_drop(attn.proj(out)), k


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log(size) as an attention mask [B, 1, 1, N] (ToMe, equation 1, "proportional attention")."""
    bias = size.log().to(dtype)
    if size.is_cuda:
        # Memory-efficient attention there wants the rows of a mask to start at multiples of 8 elements.
        tokens = size.shape[1]
        bias = F.pad(bias, (0, -tokens % 8))[:, :tokens]
    return bias[:, None, None, :]


def classify(model: VisionTransformer, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Return logits [B, classes] and the features [B, D] they are made from, pooling by size."""
    if type(model) is VisionTransformerDistilled:
        return model.forward_head(encoded.tokens), model.forward_head(encoded.tokens, pre_logits=True)
    features = model.head_drop(model.fc_norm(_pool(model, encoded)))
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
