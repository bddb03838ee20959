"""timm's NaFlexVit with token merging. Its blocks are those of timm's VisionTransformer or Eva.

Compared with timm's own, beside what is different there: padding is cut off where timm masks it, and images with
different numbers of patches go through the blocks end to end. No padding can then be merged with a patch.
"""

from collections.abc import Mapping

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from tome_server.merging.encoder import Embedded
from tome_server.merging.families.eva import rope_tables

INPUTS = ("patches", "patch_coord", "patch_valid")


def embed(model: NaFlexVit, images: Tensor | Mapping[str, Tensor]) -> Embedded:
    """Return images as tokens with their rotary positions, if they have any.

    `images` is [B, C, H, W] or, as timm's NaFlex loaders give them, a mapping of `patches` [B, patches, P * P * C],
    `patch_coord` [B, patches, 2] (row and column of each) and `patch_valid` [B, patches], false where there is padding.
    Raises ValueError unless padding comes last, and in training mode with patch dropout, after which positions would
    differ between images.
    """
    if model.training and model.patch_drop is not None:
        raise ValueError("patches can't be dropped (patch_drop_rate) in training mode where tokens are merged")
    if isinstance(images, Tensor):
        embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return Embedded(embedded["patches"], rope_tables(model, embedded["rope_embeds"], model.rope_is_mixed))
    lengths = [model.num_prefix_tokens + patches for patches in patch_counts(images)]
    # Without patch_valid, which would only make a mask that isn't needed.
    embedded = model._forward_embeds(images["patches"], images["patch_coord"], patch_valid=None, attn_mask=None)
    ropes = rope_tables(model, embedded["rope_embeds"], model.rope_is_mixed)
    return Embedded(embedded["patches"], ropes, lengths)


def patch_counts(images: Mapping[str, Tensor]) -> list[int]:
    """Return how many patches each image has. Raises ValueError if it has none, or padding isn't last or misfits."""
    if sorted(images) != sorted(INPUTS):
        raise ValueError(f"images as patches are a mapping of {', '.join(INPUTS)}, not of {', '.join(images)}")
    patches, coord, valid = (images[name] for name in INPUTS)
    if valid.ndim != 2 or patches.shape[:2] != valid.shape or coord.shape != (*valid.shape, 2):
        shapes = ", ".join(f"{name} {list(images[name].shape)}" for name in INPUTS)
        raise ValueError(f"patches, their coordinates and validity don't fit each other: {shapes}")
    is_patch = valid.bool()
    if bool((is_patch[:, 1:] & ~is_patch[:, :-1]).any()):
        raise ValueError("padding must come after all patches of an image")
    counts: list[int] = is_patch.sum(dim=1).tolist()
    if not all(counts):
        raise ValueError("an image has no patches")
    return counts
