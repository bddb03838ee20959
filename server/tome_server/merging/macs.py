"""What a forward pass costs, in multiply-accumulates, from shapes alone. Papers print these and say GFLOPs."""

from dataclasses import dataclass

from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tome_server.merging.packing import PackedLinear
from tome_server.merging.schedule import Schedule, as_schedule, mergeable
from tome_server.merging.support import check_supported


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates for one image, by the convention that papers on ToMe use."""

    dense: int
    """of the unmerged model"""
    merged: int
    """of the merged model, matching and merging apart"""
    overhead: int
    """of matching and merging"""
    tokens_in: int
    """tokens that enter the first block, prefix tokens included"""
    tokens: tuple[int, ...]
    """tokens that leave each block"""

    @property
    def total(self) -> int:
        """Of the merged model, matching and merging included."""
        return self.merged + self.overhead

    @property
    def ratio(self) -> float:
        """How many times the merged model's work the unmerged model does, the overhead apart."""
        return self.dense / self.merged


def macs(model: VisionTransformer, r: int | Schedule, image_size: tuple[int, int] | None = None) -> MacCount:
    """Count for one image of `image_size` (height, width) pixels, by default the model's own.

    Softmax, norms, activations and biases are left out, as papers do. That the last block may compute prefix tokens
    alone is not counted as saved. Raises UnsupportedModelError like `merge`, ValueError for a negative r or a
    schedule of another depth.
    """
    check_supported(model)
    per_block = as_schedule(r).per_block(len(model.blocks))
    height, width = image_size or model.patch_embed.img_size
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    patches, prefix = rows * columns, model.num_prefix_tokens

    proj = model.patch_embed.proj
    embed = (proj.weight.numel() if isinstance(proj, nn.Conv2d) else _linear(proj)) * patches
    dense = embed + _head(model, patches + prefix)
    merged, overhead, tokens, counts = embed, 0, patches + prefix, []
    for block, wanted in zip(model.blocks, per_block, strict=True):
        left = tokens - min(wanted, mergeable(tokens, prefix))
        dense += _block(block, patches + prefix, patches + prefix)
        merged += _block(block, tokens, left)
        overhead += _merge(block, tokens, prefix) if left < tokens else 0
        tokens = left
        counts.append(left)
    merged += _head(model, tokens)
    return MacCount(dense, merged, overhead, patches + prefix, tuple(counts))


def _block(block: Block, tokens_in: int, tokens_out: int) -> int:
    scores: int = 2 * tokens_in**2 * block.attn.num_heads * block.attn.head_dim
    return _linear(block.attn) * tokens_in + scores + _linear(block.mlp) * tokens_out


def _merge(block: Block, tokens: int, prefix: int) -> int:
    heads: int = block.attn.num_heads
    dim: int = block.attn.head_dim
    pairs = ((tokens - prefix) // 2) * ((tokens - prefix + 1) // 2)
    # Similarity of every pair; the keys' mean over heads and its norm; the weighted sum of tokens.
    return pairs * dim + tokens * (heads + 1) * dim + tokens * int(block.norm2.weight.numel())


def _head(model: VisionTransformer, tokens: int) -> int:
    count = _linear(model.head)
    if hasattr(model, "head_dist"):
        count += _linear(model.head_dist)
    pool = model.attn_pool
    if pool is not None:
        read = tokens if model.pool_include_prefix else tokens - model.num_prefix_tokens
        kv = _linear(pool.kv)
        count += kv * read + (_linear(pool) - kv) * pool.latent_len
        count += 2 * pool.latent_len * read * pool.num_heads * pool.head_dim
    return count


def _linear(module: nn.Module) -> int:
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | PackedLinear))
    return sum(layer.in_features * layer.out_features for layer in layers)
