"""Which models can be merged: an allow-list, so that a model which works differently is refused and never wrong."""

from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

MODELS = (VisionTransformer, VisionTransformerDistilled)
POOLS = ("token", "avg", "max", "avgmax", "map")


class UnsupportedModelError(ValueError):
    """The model, or a part of it, isn't one whose forward pass is known here."""


def check_supported(model: VisionTransformer) -> None:
    """Raise UnsupportedModelError, naming the class and what is supported, unless `model` can be merged.

    Classes are compared exactly: a subclass may compute something else in its own forward.
    """
    _require("model", model, *MODELS)
    _require("patch_embed", model.patch_embed, PatchEmbed)
    for i, block in enumerate(model.blocks):
        _require(f"blocks.{i}", block, Block)
        _require(f"blocks.{i}.attn", block.attn, Attention)
    if model.attn_pool is not None:
        _require("attn_pool", model.attn_pool, AttentionPoolLatent)
    if model.global_pool not in POOLS:
        raise UnsupportedModelError(
            f"global_pool={model.global_pool!r} gives no single answer for an image; supported: {', '.join(POOLS)}"
        )


def _require(part: str, module: nn.Module, *allowed: type[nn.Module]) -> None:
    if type(module) not in allowed:
        names = " or ".join(f"timm's {cls.__name__}" for cls in allowed)
        raise UnsupportedModelError(f"{part} is a {type(module).__name__}, which isn't supported; only {names} is")
