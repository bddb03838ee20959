"""`merge(model)`: one of timm's Vision Transformers that merges tokens as far as each call asks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tome_server.merging.attention import size_bias, size_column
from tome_server.merging.encoder import Layers, MergeGroup, encode, group_images, select
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
    """For each image, the tokens that leave each block, prefix tokens included."""
    tokens: Tensor | None = None
    """[B, T, D] output tokens after the final norm, if asked for; zero past an image's own where another has more"""
    sizes: Tensor | None = None
    """[B, T] patches in each output token, 1 for a prefix token, 0 past an image's own; with `tokens` or `token_map`"""
    token_map: Tensor | None = None
    """[B, patches] index among the output tokens of the one each patch went into, if asked for; -1 past an image's own
    patches where another has more"""


class MergedModel(nn.Module):
    """One of timm's Vision Transformers run with token merging. Made by `merge`.

    Shares the model's parameters and changes nothing in it. Holds no state of a call: threads may share one.
    Takes the place of the model's own forward pass, of its blocks' and of their attention's: hooks of these aren't
    called, those of the layers within are.
    """

    division = ""
    """What a few threads divide among them; torch's threads divide single operations."""

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
        self,
        images: Tensor | Mapping[str, Tensor],
        r: int | Schedule | Sequence[int | Schedule] = 0,
        *,
        return_tokens: bool = False,
        return_token_map: bool = False,
    ) -> MergedOutput:
        """Classify `images` [B, C, H, W], merging `r` tokens in every block, or as a schedule says.

        A sequence gives each image its own; no image's result depends on the others.
        timm's NaFlexVit also takes images as patches, padded to one number: a mapping of `patches` [B, patches,
        P * P * C], `patch_coord` [B, patches, 2] and `patch_valid` [B, patches], with all padding last.
        r is clamped in each block to half of the tokens that aren't prefix tokens. Raises ValueError if an r is
        negative, a schedule doesn't fit the model's depth, a sequence isn't as long as the batch or differs within it
        while the model is in training mode, or the images don't fit the model.
        """
        schedules = self._schedules(r, self._checked(images))
        embedded = self._embed(self.model, images)
        batches = group_images(embedded, schedules)
        if len(batches) > 1 and self.model.training:
            raise ValueError(
                "images of a batch can differ in r or size in eval mode only: stochastic depth drops whole images"
            )
        whole = return_tokens or return_token_map
        groups = encode(
            embedded,
            self._layers,
            self.model.norm,
            batches,
            prefix=self.prefix,
            bias_of=self._bias_of,
            prefix_only=reads_prefix_only(self.model) and not whole,
            track=return_token_map,
        )
        logits, features = classify(self.model, groups)
        order = [image for batch in batches for image in batch.images]
        back = sorted(range(len(order)), key=order.__getitem__)
        if len(groups) > 1:
            logits, features = select(logits, back), select(features, back)
        maps = [group.token_map for group in groups if group.token_map is not None]
        return MergedOutput(
            logits=logits,
            features=features,
            tokens_per_block=self._tokens_per_block(batches, back),
            tokens=in_order([group.tokens for group in groups], back) if return_tokens else None,
            sizes=in_order([group.sizes for group in groups], back) if whole else None,
            token_map=in_order(maps, back, fill=-1) if return_token_map else None,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patches from top to bottom and from left to right of an image of this size in pixels."""
        return patch_grid(self.model, height, width)

    def patches(self, height: int, width: int) -> int:
        """Return the number of patches of an image of this size in pixels."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def _schedules(
        self, r: int | Schedule | Sequence[int | Schedule], batch: int
    ) -> dict[tuple[int, ...], Sequence[int]]:
        """Return what to merge in each block, and the images for which."""
        if not isinstance(r, Sequence):
            return {as_schedule(r).per_block(self.depth): range(batch)}
        if len(r) != batch:
            raise ValueError(f"r must be one for all images or one for each of the {batch}, not {len(r)}")
        schedules: dict[tuple[int, ...], Sequence[int]] = {} if batch else {(0,) * self.depth: ()}
        for image, own in enumerate(r):
            per_block = as_schedule(own).per_block(self.depth)
            schedules[per_block] = [*schedules.get(per_block, ()), image]
        return schedules

    def _tokens_per_block(self, batches: Sequence[MergeGroup], back: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        counts: list[tuple[int, ...]] = []
        for batch in batches:
            left = tokens_per_block(batch.tokens - self.prefix, self.prefix, batch.per_block)
            counts += [left] * len(batch.images)
        return tuple(counts[i] for i in back)

    def _checked(self, images: Tensor | Mapping[str, Tensor]) -> int:
        """Return how many `images` there are. Raises ValueError unless the model takes them."""
        if not isinstance(images, Tensor):
            if type(self.model) is not NaFlexVit:
                raise ValueError(f"only a NaFlexVit takes images as patches, not a {type(self.model).__name__}")
            return len(patch_counts(images))
        if images.ndim != 4 or images.shape[1] != self.model.in_chans:
            raise ValueError(f"images must be [batch, {self.model.in_chans}, height, width], not {list(images.shape)}")
        check_image_size(self.model, images.shape[-2], images.shape[-1])
        return len(images)


def merge(model: VisionModel, *, proportional_attention: bool | None = None, fold_sizes: bool = False) -> MergedModel:
    """Return `model`, timm's VisionTransformer, Eva or NaFlexVit, with token merging (arXiv 2210.09461).

    `proportional_attention` weighs each token by the patches it stands for, as supervised weights need it; None
    leaves it off for MAE weights alone, which lose by it (ToMe, table 1e and appendix). `fold_sizes` has it done by one
    more channel of queries and keys in place of a mask, which FlashAttention doesn't take. Raises
    UnsupportedModelError for a model, block or attention of another class.
    """
    check_supported(model)
    if proportional_attention is None:
        proportional_attention = "mae" not in str(
            (getattr(model, "pretrained_cfg", None) or {}).get("tag") or ""
        ).split("_")
    return MergedModel(model, proportional_attention, fold_sizes=fold_sizes)


def unmerge(tokens: Tensor, token_map: Tensor) -> Tensor:
    """Give each patch the features of the token it went into: [B, T, D] and [B, patches] to [B, patches, D].

    Where there is no patch (-1), zeros.
    """
    index, missing = token_map.clamp(min=0).unsqueeze(-1), token_map.lt(0).unsqueeze(-1)
    return tokens.gather(1, index.expand(-1, -1, tokens.shape[-1])).masked_fill(missing, 0)


def in_order(parts: Sequence[Tensor], back: Sequence[int], fill: int = 0) -> Tensor:
    """Return the images [T, ...] of all `parts` [B, T, ...] in the order `back`, short ones filled up."""
    if len(parts) == 1:
        return parts[0]
    images = [image for part in parts for image in part]
    return pad_sequence([images[i] for i in back], batch_first=True, padding_value=fill)
