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

from tome_server.merging.cpu.data_parallel import DataParallelModel
from tome_server.merging.cpu.kernels import PackedLinear
from tome_server.merging.cpu.packed_blocks import pack_block, pack_blocks
from tome_server.merging.cpu.tensor_parallel import TensorParallelLayers, TensorParallelModel, divide
from tome_server.merging.cpu.workers import Workers, shared_workers
from tome_server.merging.encoder import Embedded, Layers, encode, group_images
from tome_server.merging.geometry import default_size
from tome_server.merging.model import MergedModel
from tome_server.merging.support import EMBED, LAYERS, VisionModel

Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")

# Measured with two; every further one waits the longer for Python's interpreter, which calls one kernel at a time.
MOST_WORKERS = 4
# How many times as fast a single image must be on all threads. Batches, whose images are shared out, pay for it: parts
# of a layer one after the other take longer than the whole, as do weights that were packed for torch's threads on one.
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
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        embedded: Tensor = self.linear(patches)
        return embedded.transpose(1, 2).view(batch, self.linear.out_features, rows, columns)


def packed_dtypes() -> tuple[torch.dtype, ...]:
    """Return in which dtypes this CPU has kernels for packed weights: float32, and bfloat16 where it computes in it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return ()
    return (torch.float32, torch.bfloat16) if _has_bfloat16() else (torch.float32,)


def packable(merged: MergedModel) -> bool:
    """Return whether packing applies: for inference, on a CPU that torch has kernels for in the model's dtype."""
    parameters = list(merged.parameters())
    dtypes = {p.dtype for p in parameters}
    return (
        all(p.device.type == "cpu" and not p.requires_grad for p in parameters)
        and not any(module.training for module in merged.modules())
        and any(dtypes == {dtype} for dtype in packed_dtypes())
    )


def pack(merged: MergedModel, *, divided: bool | None = None) -> MergedModel:
    """Return a copy of `merged` whose blocks hold packed weights; all other parameters are shared.

    Made for as many threads as torch is set to. A few of them share out the images of a batch; and where `divided`,
    all of them run what doesn't go round evenly, a single image above all: parts of each block where blocks are plain,
    else of each operation, as torch does. None measures whether that is worth it (`division_gain`). Results differ by
    rounding alone. What changes in a weight afterwards doesn't change the copy, which can't be converted or moved.
    Raises ValueError unless `packable`.
    """
    if not packable(merged):
        raise ValueError(
            "only models in float32 or bfloat16 on a CPU that computes in it, in eval mode and without gradients, "
            "can be packed"
        )
    if divided is None:
        divided = few_threads() and division_gain(merged) >= LEAST_GAIN
    model, proportional = _copy(merged.model), merged.proportional_attention
    threads = torch.get_num_threads()
    if not few_threads():
        return MergedModel(model, proportional, _pack(model))
    workers = shared_workers(threads)
    # A worker is torch's only thread, and weights that are packed in one are packed for that.
    if not divided:
        [layers] = workers.each([partial(_pack, model)])
        return DataParallelModel(model, proportional, layers, workers)
    if _divisible(model, threads):
        [packed] = workers.each([partial(_divide, model, proportional, workers)])
        return packed
    layers = _pack(model)
    together = MergedModel(model, proportional, layers).forward
    return DataParallelModel(model, proportional, layers, workers, division="images and operations", together=together)


def few_threads() -> bool:
    """Return whether torch is set to several threads, and so few that they divide a packed model's work."""
    return 1 < torch.get_num_threads() <= MOST_WORKERS


@torch.inference_mode()
def division_gain(merged: MergedModel) -> float:
    """Return how many times as fast a single image passes the first block on all of a few threads, as on one.

    Merged about as much as in the middle of an r grid.
    """
    model, workers = merged.model, shared_workers(torch.get_num_threads())

    def in_worker(call: Callable[[], T]) -> T:
        return workers.each([call])[0]

    def here(call: Callable[[], T]) -> T:
        return call()

    block, dtype = model.blocks[0], next(model.parameters()).dtype
    image = torch.randn(1, model.in_chans, *default_size(model), dtype=dtype, device="cpu")
    embedded = EMBED[type(model)](model, image)
    whole = in_worker(lambda: pack_block(LAYERS[type(block)](_copy(block))))
    ways: list[tuple[Callable[[Callable[[], float]], float], Layers]] = [(in_worker, whole)]
    if _divisible(model, workers.count):
        parts = _copy(block)
        in_worker(lambda: divide(parts, workers.count))
        ways.append((in_worker, TensorParallelLayers(parts, workers)))
    else:
        ways.append((here, pack_block(LAYERS[type(block)](_copy(block)))))
    best = [float("inf")] * len(ways)
    # In turn; and of each the shortest time, since whatever else the processor does lengthens some.
    for _ in range(_ROUNDS):
        for i, (run_in, layers) in enumerate(ways):
            best[i] = min(best[i], run_in(partial(_seconds, layers, embedded, model.num_prefix_tokens)))
    return best[0] / best[1]


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


def _divide(model: VisionModel, proportional_attention: bool, workers: Workers) -> MergedModel:
    _pack_patches(model)
    for block in model.blocks:
        divide(block, workers.count)
    return TensorParallelModel(model, proportional_attention, workers)


def _seconds(block: Layers, embedded: Embedded, prefix: int) -> float:
    """Return how long the tokens of one image take to pass a block."""
    batches = group_images(embedded, {(embedded.tokens.shape[1] // 24,): [0]})
    start = time.perf_counter()
    encode(embedded, [block], nn.Identity(), batches, prefix=prefix, bias_of=None, prefix_only=False, track=False)
    return time.perf_counter() - start


def _divisible(model: VisionModel, count: int) -> bool:
    """Return whether of each block there is a part for each of `count` threads, and nothing that has none."""
    return all(_has_parts(block, count) for block in model.blocks)


def _has_parts(block: Any, count: int) -> bool:
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
