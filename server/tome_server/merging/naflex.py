"""timm's NaFlexVit with token merging. Its blocks are those of timm's VisionTransformer or Eva."""

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from tome_server.merging.encoder import Embedded
from tome_server.merging.eva import rope_tables


def embed(model: NaFlexVit, images: Tensor) -> Embedded:
    """Return `images` [B, C, H, W] as tokens with their rotary positions, if they have any.

    Raises ValueError in training mode with patch dropout, after which positions would differ between images.
    """
    if model.training and model.patch_drop is not None:
        raise ValueError("patches can't be dropped (patch_drop_rate) in training mode where tokens are merged")
    embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
    ropes = rope_tables(embedded["rope_embeds"], len(model.blocks), model.rope_is_mixed)
    return Embedded(embedded["patches"], ropes)
