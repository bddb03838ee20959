"""Weights laid out as the CPU's matrix kernels want them.

torch hands matrices to the kernels as they are, and the kernels copy the weights into their own layout on every
call. That copy costs the same however few tokens are left, so the more is merged the more it weighs. Packing does it
once. `packed_blocks.py` says which layers of a block they are.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import LayerNorm, Mlp
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from tome_server.merging.divided import DividedLayers, DividedModel, divide
from tome_server.merging.encoder import Embedded, Layers, alike, encode
from tome_server.merging.geometry import default_size, patch_grid
from tome_server.merging.kernels import PackedLinear
from tome_server.merging.model import MergedModel
from tome_server.merging.packed_blocks import pack_block, pack_blocks
from tome_server.merging.shared import SharedModel
from tome_server.merging.support import VisionModel
from tome_server.merging.vit import BlockLayers
from tome_server.merging.workers import Workers, workers

Network = TypeVar("Network", bound=nn.Module)

# Measured with two; every further one waits the longer for Python's interpreter, which calls one kernel at a time.
MOST_WORKERS = 4
# How many times as fast a single image must be for its blocks to be divided: one part of a layer after the other takes
# longer than the whole, and batches, whose images are shared out, pay for that.
LEAST_GAIN = 1.2
_ROUNDS = 10


class PackedPatches(nn.Module):
    """A convolution of patches that don't overlap, as the matrix product it is. For inference only.

    The convolution's kernel would first lay out the image anew, which takes several times longer than the product.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._height, self._width = convolution.kernel_size
        weight = convolution.weight.detach().flatten(1)
        self.linear = PackedLinear(weight, convolution.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, H / height, W / width], as nn.Conv2d: what doesn't fill a patch is left out."""
        batch, channels, height, width = images.shape
        rows, columns = height // self._height, width // self._width
        images = images[:, :, : rows * self._height, : columns * self._width]
        patches = images.reshape(batch, channels, rows, self._height, columns, self._width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        embedded: Tensor = self.linear(patches)
        return embedded.transpose(1, 2).view(batch, -1, rows, columns)


def packable(merged: MergedModel) -> bool:
    """Return whether packing applies: for inference, on a CPU that torch has kernels for.

    In float32, or in bfloat16 where the CPU computes in it.
    """
    parameters = list(merged.parameters())
    dtypes = {p.dtype for p in parameters}
    return (
        all(p.device.type == "cpu" and not p.requires_grad for p in parameters)
        and not any(module.training for module in merged.modules())
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and _has_bfloat16()))
    )


def pack(merged: MergedModel, *, divided: bool | None = None) -> MergedModel:
    """Return a copy of `merged` whose blocks hold packed weights; all other parameters are shared.

    Made for as many threads as torch is set to. Where all blocks are plain a few of them share out the images of a
    batch; and where `divided`, each block of a single one. None measures on the first block whether that is worth it.
    Results differ by rounding alone. Raises ValueError unless `packable`.
    """
    if not packable(merged):
        raise ValueError(
            "only models in float32 or bfloat16 on a CPU that computes in it, in eval mode and without gradients, "
            "can be packed"
        )
    model = _copy(merged.model)
    threads, proportional = torch.get_num_threads(), merged.proportional_attention
    if 1 < threads <= MOST_WORKERS and all(_divisible(block, threads) for block in model.blocks):
        # There each thread is torch's only one, and weights are packed for that.
        several = workers(threads)
        [packed] = several.each([partial(_for_workers, model, proportional, several, divided)])
        return packed
    return MergedModel(model, proportional, _pack(model))


def _copy(module: Network) -> Network:
    """Return a copy that shares the parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _pack(model: VisionModel) -> list[Layers]:
    """Put packed layers in the place of a model's own, and return its blocks taken apart."""
    _pack_patches(model)
    return pack_blocks(model)


def _has_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _for_workers(
    model: VisionModel, proportional_attention: bool, several: Workers, divided: bool | None
) -> MergedModel:
    if divided is None:
        divided = _gain(model, several) >= LEAST_GAIN
    if not divided:
        return SharedModel(model, proportional_attention, _pack(model), several)
    _pack_patches(model)
    for block in model.blocks:
        divide(block, several.count)
    return DividedModel(model, proportional_attention, several)


@torch.inference_mode()
def _gain(model: VisionModel, several: Workers) -> float:
    """Return how many times as fast a single image passes the first block, divided among workers, as it does whole.

    Merged about as much as in the middle of an r grid. To be called in the first of the workers.
    """
    whole, parts = _copy(model.blocks[0]), _copy(model.blocks[0])
    divide(parts, several.count)
    height, width = default_size(model)
    rows, columns = patch_grid(model, height, width)
    weight = model.blocks[0].attn.qkv.weight
    tokens = torch.randn(1, rows * columns + model.num_prefix_tokens, weight.shape[1], dtype=weight.dtype)
    ways = [_one_block(layers, tokens) for layers in (pack_block(BlockLayers(whole)), DividedLayers(parts, several))]
    best = [float("inf")] * len(ways)
    # In turn; and of each the shortest time, since whatever else the processor does lengthens some.
    for _ in range(_ROUNDS):
        for i, run in enumerate(ways):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def _one_block(block: Layers, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a call that runs the tokens of an image [1, N, D] through a block."""
    embedded = Embedded(tokens)
    batches = alike(embedded, {(tokens.shape[1] // 24,): [0]})
    return lambda: encode(
        embedded, [block], nn.Identity(), batches, prefix=0, bias_of=None, prefix_only=False, track=False
    )


def _divisible(block: Any, count: int) -> bool:
    """Return whether there is a part for each of `count` threads, and nothing but what PackedLayers knows."""
    if type(block) is not Block:
        return False
    attn, mlp = block.attn, block.mlp
    return (
        _is_bare(block)
        and attn.num_heads >= count
        and _is_gelu(mlp.act)
        and all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        and all(type(scale) in (nn.Identity, LayerScale) for scale in (block.ls1, block.ls2))
    )


def _pack_patches(model: VisionModel) -> None:
    # NaFlexVit's layer is read by itself where patches are of another size.
    if type(model) is not NaFlexVit and _is_plain(model.patch_embed.proj):
        model.patch_embed.proj = PackedPatches(model.patch_embed.proj)


def _is_bare(block: Any) -> bool:
    """Return whether there is nothing in a block beside its norms, linear layers, activation and scales."""
    attn, mlp = block.attn, block.mlp
    return (
        type(mlp) is Mlp
        and getattr(attn, "gate", None) is None
        and all(type(norm) in (nn.LayerNorm, LayerNorm) for norm in (block.norm1, block.norm2))
        and all(type(part) is nn.Identity for part in (attn.q_norm, attn.k_norm, attn.norm, mlp.norm))
    )


def _is_gelu(act: nn.Module) -> bool:
    return type(act) is nn.GELU and act.approximate == "none"


def _is_plain(convolution: nn.Module) -> bool:
    """Return whether the convolution's patches neither overlap nor reach over the edge."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
