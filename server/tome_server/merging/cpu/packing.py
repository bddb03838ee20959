"""`pack(merged)`: a merged model with its weights in the layout of the CPU's matrix kernels.

From plain weights, the kernels make a copy in their own layout in every call. That takes the same time however few
tokens are left, so the more tokens are merged, the larger its share. Packing makes the copy once.
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

MAX_WORKERS = 4
"""Measured with two threads. More contend for Python's interpreter lock, which is needed to launch each kernel."""
LEAST_GAIN = 1.2
"""The least speedup of a single image on all threads for which weights are divided.

Divided weights make batches slower whose images run on one thread each: the parts of a layer one after the other take
longer than the whole layer, and so do weights packed for torch's threads."""
_ROUNDS = 10


class PackedPatches(nn.Module):
    """A convolution of patches that don't overlap, computed as a matrix product. For inference only.

    torch's convolution first changes the layout of the image, which takes several times longer than the product.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._height, self._width = convolution.kernel_size
        weight = convolution.weight.detach().flatten(1)
        self.linear = PackedLinear(weight, convolution.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, D, rows, columns] for `images` [B, C, H, W]. Pixels that don't fill a patch are left out."""
        batch, channels, height, width = images.shape
        rows, columns = height // self._height, width // self._width
        images = images[:, :, : rows * self._height, : columns * self._width]
        patches = images.reshape(batch, channels, rows, self._height, columns, self._width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        embedded: Tensor = self.linear(patches)
        return embedded.transpose(1, 2).view(batch, self.linear.out_features, rows, columns)


def packed_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes for which this CPU has kernels for packed weights: none, float32, or float32 and bfloat16."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return ()
    return (torch.float32, torch.bfloat16) if _has_bfloat16() else (torch.float32,)


def packable(merged: MergedModel) -> bool:
    """Return whether `pack` accepts a model: on the CPU, in one of `packed_dtypes`, in eval mode, without gradients."""
    parameters = list(merged.parameters())
    dtypes = {p.dtype for p in parameters}
    return (
        all(p.device.type == "cpu" and not p.requires_grad for p in parameters)
        and not any(module.training for module in merged.modules())
        and any(dtypes == {dtype} for dtype in packed_dtypes())
    )


def pack(merged: MergedModel, *, divided: bool | None = None) -> MergedModel:
    """Return a copy of a model with packed weights. Results are the same, to rounding.

    The copy shares all parameters that aren't packed. It can't be converted to another dtype or moved to another
    device, and later changes of the original's weights don't reach it. It is made for the number of threads that torch
    is set to now. If these are two to four, the images of a batch are divided among them.

    Args:
        merged: the model.
        divided: for two to four threads, whether all of them run a batch together that doesn't divide evenly, such as a
            single image. Plain blocks are then divided into parts; of other blocks torch divides each operation. None
            measures whether this makes a single image at least LEAST_GAIN times as fast.

    Raises:
        ValueError: the model isn't `packable`.
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
    # Packed in a worker, where torch is set to one thread, so that the layout is for one thread.
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
    """Return whether torch is set to a number of threads among which `pack` divides the work: two to MAX_WORKERS."""
    return 1 < torch.get_num_threads() <= MAX_WORKERS


@torch.inference_mode()
def division_gain(merged: MergedModel) -> float:
    """Return the speedup of a single image on all threads over one thread, measured on the first block.

    It merges about as many tokens as in the middle of an r grid.
    """
    model, workers = merged.model, shared_workers(torch.get_num_threads())

    def in_worker(call: Callable[[], T]) -> T:
        return workers.each([call])[0]

    def in_caller(call: Callable[[], T]) -> T:
        return call()

    block, dtype = model.blocks[0], next(model.parameters()).dtype
    image = torch.randn(1, model.in_chans, *default_size(model), dtype=dtype, device="cpu")
    embedded = EMBED[type(model)](model, image)
    on_one_thread = in_worker(lambda: pack_block(LAYERS[type(block)](_copy(block))))
    candidates: list[tuple[Callable[[Callable[[], float]], float], Layers]] = [(in_worker, on_one_thread)]
    if _divisible(model, workers.count):
        parts = _copy(block)
        in_worker(lambda: divide(parts, workers.count))
        candidates.append((in_worker, TensorParallelLayers(parts, workers)))
    else:
        candidates.append((in_caller, pack_block(LAYERS[type(block)](_copy(block)))))
    best = [float("inf")] * len(candidates)
    # Both in turn, and the shortest time of each, since other work on the processor makes some longer.
    for _ in range(_ROUNDS):
        for i, (run_in, layers) in enumerate(candidates):
            best[i] = min(best[i], run_in(partial(_seconds, layers, embedded, model.num_prefix_tokens)))
    return best[0] / best[1]


def _copy(module: Network) -> Network:
    """Return a copy that shares the parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _pack(model: VisionModel) -> list[Layers]:
    """Pack a model's weights in place, and return its blocks as Layers."""
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
    """Return the seconds that a block takes for one image."""
    groups = group_images(embedded, {(embedded.tokens.shape[1] // 24,): [0]})
    start = time.perf_counter()
    encode(embedded, [block], nn.Identity(), groups, prefix=prefix, bias_of=None, prefix_only=False, track=False)
    return time.perf_counter() - start


def _divisible(model: VisionModel, count: int) -> bool:
    """Return whether `divide` can divide every block into `count` parts."""
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
    # NaFlexVit reads the weights of its layer where patches have another size.
    if type(model) is not NaFlexVit and _is_plain(model.patch_embed.proj):
        model.patch_embed.proj = PackedPatches(model.patch_embed.proj)


def _is_bare(block: Any) -> bool:
    """Return whether a block has only norms, linear layers, an activation and scales."""
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
    """Return whether a convolution's patches neither overlap nor reach over the image's edge."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
