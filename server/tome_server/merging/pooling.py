"""Pooling and classifier: from the last block's tokens to features and logits.

Two things differ from timm's forward pass: average pooling weighs each token by the number of patches it stands for,
and attention pooling adds the logarithm of that number to its logits.
"""

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from tome_server.merging.attention import size_bias
from tome_server.merging.encoder import Encoded
from tome_server.merging.support import VisionModel


def reads_prefix_only(model: VisionModel) -> bool:
    """Return whether the classifier reads prefix tokens only."""
    only: bool = model.attn_pool is None and model.global_pool == "token"
    return only


def pooled_from(model: VisionModel) -> int:
    """Return the index of the first token that pooling reads, for a head that pools."""
    # timm's Eva lacks this setting: its attention pooling reads all tokens, its other pooling only patches.
    everything = getattr(model, "pool_include_prefix", model.attn_pool is not None)
    return 0 if everything else int(model.num_prefix_tokens)


def classify(model: VisionModel, groups: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Return logits [B, classes] and pooled features [B, D] of all images, in the order of `groups`."""
    if type(model) is VisionTransformerDistilled:
        tokens = torch.cat([group.tokens[:, : model.num_prefix_tokens] for group in groups])
        return model.forward_head(tokens), model.forward_head(tokens, pre_logits=True)
    pooled = [_pool(model, group) for group in groups]
    features = model.head_drop(model.fc_norm(pooled[0] if len(pooled) == 1 else torch.cat(pooled)))
    return model.head(features), features


def _pool(model: VisionModel, encoded: Encoded) -> Tensor:
    if reads_prefix_only(model):
        return encoded.tokens[:, 0]
    first = pooled_from(model)
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
