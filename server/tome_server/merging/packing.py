"""Weights laid out as the CPU's matrix kernels want them.

torch hands float32 matrices to the kernels as they are, and the kernels copy the weights into their own layout on every
call. That copy costs the same however few tokens are left, so the more is merged the more it weighs. Packing does it
once; GELU moves into the kernel of the layer before it.
"""

import copy

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from tome_server.merging.model import MergedModel


class PackedLinear(nn.Module):
    """A Linear layer with packed `weight` [out, in], optionally followed by GELU. For inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._activation = activation
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], as nn.Linear."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._activation, [], "none")
        return y


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
    """Return whether packing applies: float32 on a CPU for which torch has the kernels, without gradients."""
    parameters = list(merged.parameters())
    return (
        all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in parameters)
        and not merged.training
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(merged: MergedModel) -> MergedModel:
    """Return a copy of `merged` whose blocks hold packed weights; all other parameters are shared.

    Results differ by rounding alone. Raises ValueError unless `packable`.
    """
    if not packable(merged):
        raise ValueError("only a float32 model on the CPU, in eval mode and without gradients, can be packed")
    model = copy.deepcopy(merged.model, {id(p): p for p in merged.model.parameters()})
    if _is_plain(model.patch_embed.proj):
        model.patch_embed.proj = PackedPatches(model.patch_embed.proj)
    for block in model.blocks:
        block.attn.qkv = _packed(block.attn.qkv)
        block.attn.proj = _packed(block.attn.proj)
        if type(block.mlp) is Mlp:
            _pack_mlp(block.mlp)
    return MergedModel(model, merged.proportional_attention)


def _pack_mlp(mlp: Mlp) -> None:
    fused = type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and type(mlp.fc1) is nn.Linear
    if fused:
        mlp.fc1, mlp.act = PackedLinear(mlp.fc1.weight, mlp.fc1.bias, "gelu"), nn.Identity()
    else:
        mlp.fc1 = _packed(mlp.fc1)
    mlp.fc2 = _packed(mlp.fc2)


def _packed(layer: nn.Module) -> nn.Module:
    return PackedLinear(layer.weight, layer.bias) if type(layer) is nn.Linear else layer


def _is_plain(convolution: nn.Module) -> bool:
    """Return whether the convolution's patches neither overlap nor reach over the edge."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
