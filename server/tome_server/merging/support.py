"""The models that can be merged: an allow-list, so that an unknown model is refused instead of giving wrong results.

Classes must match exactly, because a subclass may compute something else in its own forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import timm.layers
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    HybridEmbed,
    PatchEmbed,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from tome_server.merging.encoder import Embedded, Layers
from tome_server.merging.families import eva, naflex, parallel, vit

VisionModel: TypeAlias = VisionTransformer | Eva | NaFlexVit
EMBED: Mapping[type[nn.Module], Callable[[Any, Any], Embedded]] = {
    VisionTransformer: vit.embed,
    VisionTransformerDistilled: vit.embed,
    Eva: eva.embed,
    NaFlexVit: naflex.embed,
}
LAYERS: Mapping[type[nn.Module], Callable[[Any], Layers]] = {
    Block: vit.BlockLayers,
    ResPostBlock: vit.ResPostLayers,
    ParallelScalingBlock: parallel.ParallelScalingLayers,
    ParallelThingsBlock: parallel.ParallelThingsLayers,
    EvaBlock: eva.EvaLayers,
    EvaBlockPostNorm: eva.EvaPostNormLayers,
}
_VIT_BLOCKS = (Block, ResPostBlock, ParallelScalingBlock, ParallelThingsBlock)
_EVA_BLOCKS = (EvaBlock, EvaBlockPostNorm)
_ROPES: list[type[nn.Module]] = [RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed]
if hasattr(timm.layers, "RotaryEmbeddingMRope"):  # not in all versions of timm
    _ROPES.append(timm.layers.RotaryEmbeddingMRope)
POOLS = ("token", "avg", "max", "avgmax", "map")


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is of a class whose forward pass isn't known here."""


def check_supported(model: VisionModel) -> None:
    """Check that `model` can be merged.

    Raises:
        UnsupportedModelError: it can't. The message names the part, its class and the supported classes.
    """
    _require("model", model, *EMBED)
    if type(model) is NaFlexVit:
        _require("embeds", model.embeds, NaFlexEmbeds)
        blocks: tuple[type[nn.Module], ...] = (*_VIT_BLOCKS, *_EVA_BLOCKS)
    elif type(model) is Eva:
        _require("patch_embed", model.patch_embed, PatchEmbed)
        blocks = _EVA_BLOCKS
    else:
        _require("patch_embed", model.patch_embed, PatchEmbed, HybridEmbed)
        blocks = _VIT_BLOCKS
    rope = getattr(model, "rope", None)
    if rope is not None and type(rope) is not eva.FixedPositions:
        _require("rope", rope, *_ROPES)
    for i, block in enumerate(model.blocks):
        _require(f"blocks.{i}", block, *blocks)
        for name, attention, allowed in _attentions(block):
            _require(f"blocks.{i}.{name}", attention, *allowed)
        if type(block) is ParallelThingsBlock and any(
            getattr(branch.attn, "gate", None) is not None for branch in block.attns
        ):
            raise UnsupportedModelError(f"blocks.{i} has gated attention, which a ParallelThingsBlock has never here")
    if model.attn_pool is not None:
        _require("attn_pool", model.attn_pool, AttentionPoolLatent)
        if model.attn_pool.pos_embed is not None:
            raise UnsupportedModelError("attn_pool has an embedding for each position; merged tokens have several")
    if model.global_pool not in POOLS:
        raise UnsupportedModelError(
            f"global_pool={model.global_pool!r} gives no single answer for an image; supported: {', '.join(POOLS)}"
        )


def layers_of(model: VisionModel) -> list[Layers]:
    """Return the blocks of a supported model as Layers."""
    return [LAYERS[type(block)](block) for block in model.blocks]


def embedding_of(model: VisionModel) -> PatchEmbed | HybridEmbed | NaFlexEmbeds:
    """Return the module of a supported model that turns images into tokens."""
    return model.embeds if type(model) is NaFlexVit else model.patch_embed


def _attentions(block: Any) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    if type(block) in (Block, ResPostBlock):
        yield "attn", block.attn, (Attention,)
    elif type(block) is ParallelThingsBlock:
        for i, branch in enumerate(block.attns):
            yield f"attns.{i}.attn", branch.attn, (Attention,)
    elif type(block) in _EVA_BLOCKS:
        yield "attn", block.attn, (EvaAttention, AttentionRope)


def _require(part: str, module: nn.Module, *allowed: type[nn.Module]) -> None:
    if type(module) not in allowed:
        *others, last = (cls.__name__ for cls in allowed)
        names = f"{', '.join(others)} or {last}" if others else last
        raise UnsupportedModelError(
            f"{part} is a {type(module).__name__}, which isn't supported; only timm's {names} is"
        )
