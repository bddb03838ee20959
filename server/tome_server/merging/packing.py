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
    """A Linear layer with packed weights, optionally followed by GELU. For inference only."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._activation = activation
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], as nn.Linear."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._activation, [], "none")
        return y


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
    for block in model.blocks:
        block.attn.qkv = _packed(block.attn.qkv)
        block.attn.proj = _packed(block.attn.proj)
        if type(block.mlp) is Mlp:
            _pack_mlp(block.mlp)
    return MergedModel(model, merged.proportional_attention)


def _pack_mlp(mlp: Mlp) -> None:
    fused = type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and type(mlp.fc1) is nn.Linear
    if fused:
        mlp.fc1, mlp.act = PackedLinear(mlp.fc1, "gelu"), nn.Identity()
    else:
        mlp.fc1 = _packed(mlp.fc1)
    mlp.fc2 = _packed(mlp.fc2)


def _packed(layer: nn.Module) -> nn.Module:
    return PackedLinear(layer) if type(layer) is nn.Linear else layer
