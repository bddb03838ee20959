"""Weights laid out as the CPU's matrix kernels want them.

torch hands float32 matrices to the kernels as they are, and the kernels copy the weights into their own layout on every
call. That copy costs the same however few tokens are left, so the more is merged the more it weighs. Packing does it
once; GELU and LayerScale move into the layers before them, and blocks without further parts call the kernels directly.

Two libraries that come with torch have such layouts: oneDNN, and MKL, whose kernels are the faster ones on one thread
of an Intel processor. The one that is faster here is measured once.
"""

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from timm.layers import LayerNorm, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from tome_server.merging.model import MergedModel
from tome_server.merging.vit import BlockLayers

_Function = Callable[[Tensor], Tensor]


class PackedLinear(nn.Module):
    """A Linear layer with packed `weight` [out, in], optionally followed by GELU. For inference only.

    Laid out for one thread if torch uses one when it is made.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        bias = None if bias is None else bias.detach()
        product = _faster() if torch.get_num_threads() == 1 else _OneDnn
        self._run: _Function = product(weight.detach(), bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], as nn.Linear."""
        return self._run(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """Return itself: nothing in it changes, and packed weights stay where they were laid out."""
        return self


class _OneDnn:
    """A product with weights packed by oneDNN, GELU in its kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias, self._activation = bias, activation
        # Found once: the look-up of an operator by its name is slow.
        self._kernel = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self._weight, self._bias, self._activation, [], "none")
        return y


class _Mkl:
    """A product with weights packed by MKL, on one thread."""

    # A layout is made for a number of rows, and gives the same results for any other. Those made for a few hundred or
    # more are as fast for any, those made for fewer slower for more.
    ROWS = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), self.ROWS)
        self._bias, self._gelu = bias, activation == "gelu"
        # The operator reads nothing but its shape where it is told the number of rows that there are.
        self._shape = weight.new_zeros(1, 1).expand(weight.shape)
        self._features = weight.shape[1]
        self._kernel = torch.ops.mkl._mkl_linear.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self._packed, self._shape, self._bias, x.numel() // self._features)
        return torch.ops.aten.gelu_.default(y) if self._gelu else y

    @staticmethod
    def is_available() -> bool:
        available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        return available and hasattr(torch.ops.mkl, "_mkl_linear")


@cache
def _faster() -> type[_OneDnn] | type[_Mkl]:
    """Return whose products are faster here on one thread, measured on a few of a small model's MLP.

    Together their weights are more than a core's own cache holds, as those of a model are.
    """
    if not _Mkl.is_available():
        return _OneDnn
    weight, x = torch.ones(384, 1536), torch.ones(64, 1536)
    products = [kind(weight, None, "none") for _ in range(8) for kind in (_OneDnn, _Mkl)]
    # Of each product its shortest time: whatever else the processor does lengthens some.
    best = [float("inf")] * len(products)
    for _ in range(6):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return _Mkl if sum(best[1::2]) < sum(best[::2]) else _OneDnn


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


class PackedLayers(BlockLayers):
    """Calls the kernels of a packed block without the modules around them.

    Those are a dozen a block, most of them an Identity, and cost a single image 3 % of its time at DeiT-S's r = 16.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._norm1, self._norm2 = _norm(block.norm1), _norm(block.norm2)
        self._qkv: _Function = block.attn.qkv.forward
        self._proj: _Function = block.attn.proj.forward
        self._fc1: _Function = block.mlp.fc1.forward
        self._fc2: _Function = block.mlp.fc2.forward

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As BlockLayers does."""
        return self._qkv(self._norm1(x)), None

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """As BlockLayers does."""
        return q, k

    def add_attended(self, x: Tensor, attended: Tensor, beside: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """As BlockLayers does."""
        return x + self._proj(attended)

    def add_mlp(self, x: Tensor) -> Tensor:
        """As BlockLayers does."""
        return x + self._fc2(self._fc1(self._norm2(x)))

    @staticmethod
    def fits(block: Block) -> bool:
        """Return whether nothing else is in the block, whose layers are packed where that is possible."""
        attn, mlp = block.attn, block.mlp
        return (
            type(mlp) is Mlp
            and getattr(attn, "gate", None) is None
            and all(type(norm) in (nn.LayerNorm, LayerNorm) for norm in (block.norm1, block.norm2))
            and all(type(layer) is PackedLinear for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
            and all(type(part) is nn.Identity for part in (attn.q_norm, attn.k_norm, attn.norm, mlp.act, mlp.norm))
            and all(type(scale) is nn.Identity for scale in (block.ls1, block.ls2))
        )


def packable(merged: MergedModel) -> bool:
    """Return whether packing applies: plain blocks for inference, in float32 on a CPU that torch has kernels for."""
    parameters = list(merged.parameters())
    return (
        type(merged.model) in (VisionTransformer, VisionTransformerDistilled)
        and all(type(block) is Block for block in merged.model.blocks)
        and all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in parameters)
        and not any(module.training for module in merged.modules())
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(merged: MergedModel) -> MergedModel:
    """Return a copy of `merged` whose blocks hold packed weights; all other parameters are shared.

    Results differ by rounding alone. Raises ValueError unless `packable`.
    """
    if not packable(merged):
        raise ValueError("only plain blocks in float32 on the CPU, in eval mode and without gradients, can be packed")
    model = copy.deepcopy(merged.model, {id(p): p for p in merged.model.parameters()})
    if _is_plain(model.patch_embed.proj):
        model.patch_embed.proj = PackedPatches(model.patch_embed.proj)
    for block in model.blocks:
        block.attn.qkv = _packed(block.attn.qkv)
        block.attn.proj, block.ls1 = _packed_and_scaled(block.attn.proj, block.ls1)
        if type(block.mlp) is Mlp:
            block.mlp.fc1, block.mlp.act = _packed_with_gelu(block.mlp.fc1, block.mlp.act)
            block.mlp.fc2, block.ls2 = _packed_and_scaled(block.mlp.fc2, block.ls2)
    layers = [PackedLayers(block) if PackedLayers.fits(block) else BlockLayers(block) for block in model.blocks]
    return MergedModel(model, merged.proportional_attention, layers)


def _packed(layer: nn.Module) -> nn.Module:
    return PackedLinear(layer.weight, layer.bias) if type(layer) is nn.Linear else layer


def _packed_with_gelu(layer: nn.Module, act: nn.Module) -> tuple[nn.Module, nn.Module]:
    if type(layer) is nn.Linear and type(act) is nn.GELU and act.approximate == "none":
        return PackedLinear(layer.weight, layer.bias, "gelu"), nn.Identity()
    return _packed(layer), act


def _packed_and_scaled(layer: nn.Module, scale: nn.Module) -> tuple[nn.Module, nn.Module]:
    if type(layer) is nn.Linear and type(scale) is LayerScale:
        gamma = scale.get_parameter("gamma")
        bias = None if layer.bias is None else layer.bias * gamma
        return PackedLinear(layer.weight * gamma[:, None], bias), nn.Identity()
    return _packed(layer), scale


def _norm(norm: nn.LayerNorm) -> _Function:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _is_plain(convolution: nn.Module) -> bool:
    """Return whether the convolution's patches neither overlap nor reach over the edge."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
