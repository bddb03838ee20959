"""The multiply-accumulates of a forward pass, computed from shapes alone. Papers call them FLOPs."""

import copy
from weakref import WeakKeyDictionary

import torch
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.naflexvit import NaFlexEmbeds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tome_server.mac_count import MacCount
from tome_server.merging.encoder import Layers
from tome_server.merging.geometry import default_size, patch_grid
from tome_server.merging.pooling import pooled_from, reads_prefix_only
from tome_server.merging.schedule import Schedule, as_schedule, mergeable
from tome_server.merging.support import VisionModel, check_supported, embedding_of, layers_of


def macs(
    model: VisionModel, r: int | Schedule, image_size: tuple[int, int] | None = None, *, checked: bool = False
) -> MacCount:
    """Count the multiply-accumulates for one image.

    Softmax, norms, activations, rotations and biases aren't counted, as in papers. The last block is counted in full,
    even where the head reads prefix tokens only.

    Args:
        model: a model that `merge` supports; its layers may be packed.
        r: tokens to merge in each block, or a schedule.
        image_size: height and width in pixels; None for the size that the model was made for.
        checked: skip the check that the model is supported. For the model of a MergedModel, whatever was changed in it
            for inference since.

    Raises:
        UnsupportedModelError: the model isn't supported.
        ValueError: `r` is negative, or a schedule doesn't fit the model's depth.
    """
    if not checked:
        check_supported(model)
    per_block = as_schedule(r).per_block(len(model.blocks))
    size = image_size or default_size(model)
    rows, columns = patch_grid(model, *size)
    patches, prefix = rows * columns, int(model.num_prefix_tokens)

    embed = _embedding(embedding_of(model), patches, size)
    dense = embed + _head(model, patches + prefix)
    merged, overhead, tokens, counts = embed, 0, patches + prefix, []
    unread = 0
    for block, wanted in zip(layers_of(model), per_block, strict=True):
        left = tokens - min(wanted, mergeable(tokens, prefix))
        dense += _block(block, patches + prefix, patches + prefix)
        merged += _block(block, tokens, left)
        matching = _merge(block, tokens, prefix, int(model.embed_dim)) if left < tokens else 0
        overhead += matching
        # After the loop this is the last block's.
        unread = matching + sum(_linear(part) for part in block.after) * (left - prefix)
        tokens = left
        counts.append(left)
    merged += _head(model, tokens)
    if not reads_prefix_only(model):
        unread = 0
    return MacCount(dense, merged, overhead, patches + prefix, tuple(counts), unread)


def _block(block: Layers, tokens_in: int, tokens_out: int) -> int:
    scores = 2 * tokens_in**2 * block.heads * block.head_dim
    before = sum(_linear(part) for part in block.before)
    return before * tokens_in + scores + sum(_linear(part) for part in block.after) * tokens_out


def _merge(block: Layers, tokens: int, prefix: int, width: int) -> int:
    pairs = ((tokens - prefix) // 2) * ((tokens - prefix + 1) // 2)
    # The similarity of every pair, the mean of the keys over heads and its norm, the weighted sum of tokens.
    return pairs * block.head_dim + tokens * (block.key_heads + 1) * block.head_dim + tokens * width


def _embedding(embedding: PatchEmbed | HybridEmbed | NaFlexEmbeds, patches: int, size: tuple[int, int]) -> int:
    proj = embedding.proj
    projection = (proj.weight.numel() if isinstance(proj, nn.Conv2d) else _linear(proj)) * patches
    return projection + (_stem(embedding, size) if type(embedding) is HybridEmbed else 0)


# By stem and image size. Running a stem takes some 100 ms, and a server counts for dozens of r.
_stems: WeakKeyDictionary[nn.Module, dict[tuple[int, int], int]] = WeakKeyDictionary()


def _stem(embedding: HybridEmbed, size: tuple[int, int]) -> int:
    """Count a convolutional stem by running it on the meta device, without values."""
    known = _stems.setdefault(embedding.backbone, {})
    if size not in known:
        values = [*embedding.backbone.parameters(), *embedding.backbone.buffers()]
        without = {id(value): torch.empty_like(value, device="meta", requires_grad=False) for value in values}
        backbone = copy.deepcopy(embedding.backbone, without).eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            backbone(torch.empty(1, embedding.in_chans, *size, device="meta", dtype=values[0].dtype))
        known[size] = counter.get_total_flops() // 2
    return known[size]


def _head(model: VisionModel, tokens: int) -> int:
    count = _linear(model.head)
    if hasattr(model, "head_dist"):
        count += _linear(model.head_dist)
    pool = model.attn_pool
    if pool is not None:
        read = tokens - pooled_from(model)
        kv = _linear(pool.kv)
        count += kv * read + (_linear(pool) - kv) * pool.latent_len
        count += 2 * pool.latent_len * read * pool.num_heads * pool.head_dim
    return count


def _linear(module: nn.Module) -> int:
    """Count the linear layers in `module` for one token."""
    return sum(_per_token(layer) for layer in module.modules())


def _per_token(layer: nn.Module) -> int:
    # A class that stands in for nn.Linear has an attribute `macs_per_token`, so that this module need not import it.
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return int(getattr(layer, "macs_per_token", 0))
