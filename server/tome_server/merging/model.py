"""`merge(model)`: a timm Vision Transformer that merges tokens as far as each call asks."""

from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tome_server.merging.schedule import Schedule, as_schedule, tokens_per_block
from tome_server.merging.support import check_supported
from tome_server.merging.vit import classify, encode, reads_prefix_only


@dataclass(frozen=True)
class MergedOutput:
    """The result of one forward pass."""

    logits: Tensor
    """[B, classes]"""
    features: Tensor
    """[B, D] pooled, as they enter the classifier"""
    tokens_per_block: tuple[int, ...]
    """Tokens that leave each block, prefix tokens included."""
    tokens: Tensor | None = None
    """[B, T, D] output tokens after the final norm, if asked for"""
    sizes: Tensor | None = None
    """[B, T] patches in each output token, 1 for a prefix token; with `tokens` or `token_map`"""
    token_map: Tensor | None = None
    """[B, patches] index among the output tokens of the one each patch went into, if asked for"""


class MergedModel(nn.Module):
    """A timm Vision Transformer run with token merging. Made by `merge`.

    Shares the model's parameters and changes nothing in it. Holds no state of a call: threads may share one.
    """

    def __init__(self, model: VisionTransformer, proportional_attention: bool) -> None:
        super().__init__()
        self.model: VisionTransformer = model
        self.proportional_attention = proportional_attention
        # Not train(): that would set the mode of the model's parts, which aren't ours to change.
        self.training = model.training

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def prefix(self) -> int:
        """Number of prefix tokens, which are never merged."""
        return int(self.model.num_prefix_tokens)

    def forward(
        self, images: Tensor, r: int | Schedule = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """Classify `images` [B, C, H, W], merging `r` tokens in every block, or as a schedule says.

        r is clamped in each block to half of the tokens that aren't prefix tokens. Raises ValueError if an r is
        negative, the schedule doesn't fit the model's depth, or the images don't fit the model.
        """
        per_block = as_schedule(r).per_block(self.depth)
        self._check(images)
        whole = return_tokens or return_token_map
        encoded = encode(
            self.model,
            images,
            per_block,
            proportional=self.proportional_attention,
            prefix_only=reads_prefix_only(self.model) and not whole,
            track=return_token_map,
        )
        logits, features = classify(self.model, encoded)
        patches = self.patches(images.shape[-2], images.shape[-1])
        return MergedOutput(
            logits=logits,
            features=features,
            tokens_per_block=tokens_per_block(patches, self.prefix, per_block),
            tokens=encoded.tokens if return_tokens else None,
            sizes=encoded.sizes if whole else None,
            token_map=encoded.token_map,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patches from top to bottom and from left to right of an image of this size in pixels."""
        rows, columns = self.model.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)

    def patches(self, height: int, width: int) -> int:
        """Return the number of patches of an image of this size in pixels."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def _check(self, images: Tensor) -> None:
        embed = self.model.patch_embed
        if images.ndim != 4 or images.shape[1] != self.model.in_chans:
            raise ValueError(f"images must be [batch, {self.model.in_chans}, height, width], not {list(images.shape)}")
        size = tuple(images.shape[-2:])
        if embed.strict_img_size and embed.img_size is not None and size != tuple(embed.img_size):
            raise ValueError(f"images must be {embed.img_size[0]}×{embed.img_size[1]} pixels, not {size[0]}×{size[1]}")
        if not embed.dynamic_img_pad and (size[0] % embed.patch_size[0] or size[1] % embed.patch_size[1]):
            raise ValueError(f"images of {size[0]}×{size[1]} pixels don't divide into patches of {embed.patch_size}")


def merge(model: VisionTransformer, *, proportional_attention: bool | None = None) -> MergedModel:
    """Return `model`, a timm VisionTransformer or VisionTransformerDistilled, with token merging (arXiv 2210.09461).

    `proportional_attention` weighs each token by the patches it stands for, as supervised weights need it; None
    leaves it off for MAE weights alone, which lose by it (ToMe, table 1e and appendix). Raises UnsupportedModelError
    for a model, block or attention of another class.
    """
    check_supported(model)
    if proportional_attention is None:
        proportional_attention = "mae" not in str(
            (getattr(model, "pretrained_cfg", None) or {}).get("tag") or ""
        ).split("_")
    return MergedModel(model, proportional_attention)


def unmerge(tokens: Tensor, token_map: Tensor) -> Tensor:
    """Give each patch the features of the token it went into: [B, T, D] and [B, patches] to [B, patches, D]."""
    return tokens.gather(1, token_map.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
