"""`merge(model)`: one of timm's Vision Transformers with token merging, whose r is chosen in each call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tome_server.merging.attention import size_bias, size_column
from tome_server.merging.encoder import Encoded, Layers, MergeGroup, encode, group_images, select
from tome_server.merging.families.naflex import patch_counts
from tome_server.merging.geometry import check_image_size, patch_grid
from tome_server.merging.pooling import classify, reads_prefix_only
from tome_server.merging.schedule import Schedule, as_schedule, tokens_per_block
from tome_server.merging.support import EMBED, VisionModel, check_supported, layers_of


@dataclass(frozen=True)
class MergedOutput:
    """The result of one forward pass."""

    logits: Tensor
    """[B, classes]"""
    features: Tensor
    """[B, D] pooled, as they enter the classifier"""
    tokens_per_block: tuple[tuple[int, ...], ...]
    """for each image, the number of tokens that leave each block, prefix tokens included"""
    tokens: Tensor | None = None
    """[B, T, D] output tokens after the final norm, with `return_tokens`; padded with zeros to the longest image"""
    sizes: Tensor | None = None
    """[B, T] number of patches in each output token, 1 for a prefix token, 0 for padding; with `return_tokens` or
    `return_token_map`"""
    token_map: Tensor | None = None
    """[B, patches] index of the output token that each patch was merged into, with `return_token_map`; padded with -1
    to the image of the most patches"""


class MergedModel(nn.Module):
    """One of timm's Vision Transformers with token merging (ToMe, arXiv 2210.09461). Made by `merge`.

    It shares the model's parameters and changes nothing in it. It keeps no state of a call, so threads may share one.
    It replaces the forward passes of the model, its blocks and their attention: hooks of these aren't called, hooks of
    the layers inside them are.
    """

    division = ""
    """What this package's threads divide among them. Empty if torch's threads divide single operations instead."""

    def __init__(
        self,
        model: VisionModel,
        proportional_attention: bool,
        layers: Sequence[Layers] | None = None,
        fold_sizes: bool = False,
    ) -> None:
        super().__init__()
        self.model: VisionModel = model
        self._embed = EMBED[type(model)]
        self._layers = layers_of(model) if layers is None else layers
        self.proportional_attention = proportional_attention
        self._bias_of = None if not proportional_attention else size_column if fold_sizes else size_bias
        # train() would also set the mode of the model, which merging must not change.
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
        self,
        images: Tensor | Mapping[str, Tensor],
        r: int | Schedule | Sequence[int | Schedule] = 0,
        *,
        return_tokens: bool = False,
        return_token_map: bool = False,
    ) -> MergedOutput:
        """Classify images. No image's result depends on the others in the batch.

        Args:
            images: [B, C, H, W]. For timm's NaFlexVit also a mapping of images as patches: `patches` [B, patches,
                P * P * C], `patch_coord` [B, patches, 2] and `patch_valid` [B, patches], with padding last.
            r: how many tokens to merge in every block, or a schedule; a sequence has one for each image. In each block
                it is clamped to half of the tokens that aren't prefix tokens.
            return_tokens: also return the output tokens.
            return_token_map: also return which output token each patch was merged into.

        Raises:
            ValueError: an r is negative, a schedule doesn't fit the model's depth, a sequence isn't as long as the
                batch, the images don't fit the model, or in training mode images differ in r or size.
            TypeError: an r is neither an int nor a Schedule.
        """
        schedules = self._schedules(r, self._checked(images))
        embedded = self._embed(self.model, images)
        groups = group_images(embedded, schedules)
        if len(groups) > 1 and self.model.training:
            raise ValueError(
                "images of a batch can differ in r or size in eval mode only: stochastic depth drops whole images"
            )
        encoded = encode(
            embedded,
            self._layers,
            self.model.norm,
            groups,
            prefix=self.prefix,
            bias_of=self._bias_of,
            prefix_only=reads_prefix_only(self.model) and not (return_tokens or return_token_map),
            track=return_token_map,
        )
        return self._collect(groups, encoded, return_tokens)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches in an image of this height and width in pixels."""
        return patch_grid(self.model, height, width)

    def patches(self, height: int, width: int) -> int:
        """Return the number of patches in an image of this height and width in pixels."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def _collect(self, groups: Sequence[MergeGroup], encoded: list[Encoded], return_tokens: bool) -> MergedOutput:
        """Classify the groups' tokens, and return the results in the order of the batch."""
        logits, features = classify(self.model, encoded)
        order = [image for group in groups for image in group.images]
        back = sorted(range(len(order)), key=order.__getitem__)
        if len(encoded) > 1:
            logits, features = select(logits, back), select(features, back)
        maps = [group.token_map for group in encoded if group.token_map is not None]
        return MergedOutput(
            logits=logits,
            features=features,
            tokens_per_block=self._tokens_per_block(groups, back),
            tokens=in_order([group.tokens for group in encoded], back) if return_tokens else None,
            sizes=in_order([group.sizes for group in encoded], back) if return_tokens or maps else None,
            token_map=in_order(maps, back, fill=-1) if maps else None,
        )

    def _schedules(
        self, r: int | Schedule | Sequence[int | Schedule], batch: int
    ) -> dict[tuple[int, ...], Sequence[int]]:
        """Return the indices of images, by the number of tokens that they merge in each block."""
        if not isinstance(r, Sequence):
            return {as_schedule(r).per_block(self.depth): range(batch)}
        if len(r) != batch:
            raise ValueError(f"r must be one for all images or one for each of the {batch}, not {len(r)}")
        schedules: dict[tuple[int, ...], Sequence[int]] = {} if batch else {(0,) * self.depth: ()}
        for image, image_r in enumerate(r):
            per_block = as_schedule(image_r).per_block(self.depth)
            schedules[per_block] = [*schedules.get(per_block, ()), image]
        return schedules

    def _tokens_per_block(self, groups: Sequence[MergeGroup], back: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        counts: list[tuple[int, ...]] = []
        for group in groups:
            left = tokens_per_block(group.tokens - self.prefix, self.prefix, group.per_block)
            counts += [left] * len(group.images)
        return tuple(counts[i] for i in back)

    def _checked(self, images: Tensor | Mapping[str, Tensor]) -> int:
        """Return the number of `images`. Raises ValueError unless the model accepts them."""
        if not isinstance(images, Tensor):
            if type(self.model) is not NaFlexVit:
                raise ValueError(f"only a NaFlexVit takes images as patches, not a {type(self.model).__name__}")
            return len(patch_counts(images))
        if images.ndim != 4 or images.shape[1] != self.model.in_chans:
            raise ValueError(f"images must be [batch, {self.model.in_chans}, height, width], not {list(images.shape)}")
        check_image_size(self.model, images.shape[-2], images.shape[-1])
        return len(images)


def merge(model: VisionModel, *, proportional_attention: bool | None = None, fold_sizes: bool = False) -> MergedModel:
    """Return `model` with token merging (ToMe, arXiv 2210.09461).

    Args:
        model: timm's VisionTransformer, Eva or NaFlexVit.
        proportional_attention: whether attention weighs each token by the number of patches it stands for. Supervised
            weights need it; MAE weights lose accuracy by it (ToMe, table 1e and appendix). None turns it off for MAE
            weights only.
        fold_sizes: weigh by one more channel of queries and keys instead of a mask, which FlashAttention doesn't take.

    Raises:
        UnsupportedModelError: the model, one of its blocks or an attention is of a class that isn't supported.
    """
    check_supported(model)
    if proportional_attention is None:
        proportional_attention = "mae" not in str(
            (getattr(model, "pretrained_cfg", None) or {}).get("tag") or ""
        ).split("_")
    return MergedModel(model, proportional_attention, fold_sizes=fold_sizes)


def unmerge(tokens: Tensor, token_map: Tensor) -> Tensor:
    """Return for each patch the features of the token that it was merged into, [B, patches, D].

    Args:
        tokens: [B, T, D] output tokens.
        token_map: [B, patches] index of each patch's token; -1 gives zeros.
    """
    index, missing = token_map.clamp(min=0).unsqueeze(-1), token_map.lt(0).unsqueeze(-1)
    return tokens.gather(1, index.expand(-1, -1, tokens.shape[-1])).masked_fill(missing, 0)


def in_order(parts: Sequence[Tensor], back: Sequence[int], fill: int = 0) -> Tensor:
    """Return the images [T, ...] of all `parts` [B, T, ...] in the order `back`, padded with `fill` to one length."""
    if len(parts) == 1:
        return parts[0]
    images = [image for part in parts for image in part]
    return pad_sequence([images[i] for i in back], batch_first=True, padding_value=fill)
