"""timm's NaFlexVit with token merging. Its blocks are those of timm's VisionTransformer or Eva.

One more thing differs from timm's forward pass than in those: padding is cut off instead of masked, and images with
different numbers of patches go through the blocks end to end. So no padding can be merged with a patch.
"""

from collections.abc import Mapping

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from tome_server.merging.encoder import Embedded
from tome_server.merging.families.eva import rope_tables

INPUTS = ("patches", "patch_coord", "patch_valid")


def embed(model: NaFlexVit, images: Tensor | Mapping[str, Tensor]) -> Embedded:
    """Return the tokens of images, and their rotary positions if the model has any.

    Args:
        model: the model.
        images: [B, C, H, W], or a mapping as timm's NaFlex loaders make it: `patches` [B, patches, P * P * C],
            `patch_coord` [B, patches, 2] (row and column) and `patch_valid` [B, patches], false for padding.

    Raises:
        ValueError: padding isn't last, or the model is in training mode with patch dropout, after which images would
            differ in positions.
    """
    if model.training and model.patch_drop is not None:
        raise ValueError("patches can't be dropped (patch_drop_rate) in training mode where tokens are merged")
    if isinstance(images, Tensor):
        embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return Embedded(embedded["patches"], rope_tables(model, embedded["rope_embeds"], model.rope_is_mixed))
    lengths = [model.num_prefix_tokens + patches for patches in patch_counts(images)]
    # patch_valid is left out: timm would only make a mask of it, and padding is cut off instead.
    embedded = model._forward_embeds(images["patches"], images["patch_coord"], patch_valid=None, attn_mask=None)
    ropes = rope_tables(model, embedded["rope_embeds"], model.rope_is_mixed)
    return Embedded(embedded["patches"], ropes, lengths)


def patch_counts(images: Mapping[str, Tensor]) -> list[int]:
    """Return the number of patches of each image.

    Raises:
        ValueError: an input is missing, shapes don't fit each other, padding isn't last, or an image has no patches.
    """
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
