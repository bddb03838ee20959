"""Linear layers with packed weights, and other layers without the overhead of their modules.

Two libraries that come with torch have kernels for weights in layouts of their own: oneDNN and MKL. MKL's are faster on
one thread of an Intel processor. Which are faster on this processor is measured once.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

Function: TypeAlias = Callable[[Tensor], Tensor]

# Our names of activations, and torch's names of the ways to compute GELU.
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


class PackedLinear(nn.Module):
    """A Linear layer with packed weights, optionally followed by an activation. For inference only.

    If torch is set to one thread when the layer is made, its layout is for one thread.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """Pack a layer's weights.

        Args:
            weight: [out, in].
            bias: [out].
            activation: `none`, `gelu`, or `gelu_tanh`, its approximation by tanh.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.macs_per_token = weight.numel()
        self._like = weight.detach().new_empty(0)
        bias = None if bias is None else bias.detach()
        # MKL has packed weights in float32 only.
        can_choose = torch.get_num_threads() == 1 and weight.dtype == torch.float32
        product = _faster() if can_choose else _OneDnn
        self._run: Function = product(weight.detach(), bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., out_features] for `x` [..., in_features]."""
        return self._run(x)

    def _apply(self, fn: Function, recurse: bool = True) -> "PackedLinear":
        """Raise RuntimeError if the model is converted to another dtype or moved to another device."""
        converted = fn(self._like)
        if (converted.dtype, converted.device) != (self._like.dtype, self._like.device):
            raise RuntimeError("packed weights stay in their dtype and on the CPU: convert the model, then pack it")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """Return itself: it never changes, so copies of a model can share it."""
        return self


class _OneDnn:
    """A product with weights packed by oneDNN, whose kernel also computes GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias, self._activation = bias, "none" if activation == "none" else "gelu"
        self._approximate = _APPROXIMATE.get(activation, "none")
        # Kept, because looking up an operator by name is slow.
        self._kernel = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self._weight, self._bias, self._activation, [], self._approximate)
        return y


class _Mkl:
    """A product with weights packed by MKL, on one thread."""

    # The number of rows that a layout is made for; results are the same for any other number. A layout for at least a
    # few hundred rows is fast for all numbers of rows, a layout for fewer is slower for more.
    ROWS = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), self.ROWS)
        self._bias, self._gelu = bias, _APPROXIMATE.get(activation)
        # Given the number of rows, the operator reads only this tensor's shape, so a tensor of strides 0 will do.
        self._shape = weight.new_zeros(1, 1).expand(weight.shape)
        self._features = weight.shape[1]
        self._kernel = torch.ops.mkl._mkl_linear.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self._packed, self._shape, self._bias, x.numel() // self._features)
        return y if self._gelu is None else torch.ops.aten.gelu_.default(y, approximate=self._gelu)

    @staticmethod
    def is_available() -> bool:
        available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        return available and hasattr(torch.ops.mkl, "_mkl_linear")


@cache
def _faster() -> type[_OneDnn] | type[_Mkl]:
    """Return the library whose products are faster on one thread of this processor.

    It times a few layers of a small model's MLP. Together, as in a model, their weights exceed a core's own cache.
    """
    if not _Mkl.is_available():
        return _OneDnn
    weight = torch.ones(384, 1536, dtype=torch.float32, device="cpu")
    x = weight[:64].clone()
    products = [kind(weight, None, "none") for _ in range(8) for kind in (_OneDnn, _Mkl)]
    # The shortest time of each product counts, since other work on the processor makes some longer.
    best = [float("inf")] * len(products)
    for _ in range(6):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return _Mkl if sum(best[1::2]) < sum(best[::2]) else _OneDnn


def layer_norm(norm: nn.LayerNorm) -> Function:
    """Return a LayerNorm as a function, without the overhead of the module."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def gamma_of(scale: nn.Module | None) -> Tensor | None:
    """Return the factors [channels] of a LayerScale; None for any other module."""
    return scale.get_parameter("gamma") if isinstance(scale, nn.Module) and type(scale) is LayerScale else None


def scaled(layer: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of `layer` with its output multiplied by `gamma` [out], if there is one."""
    if gamma is None:
        return layer.weight, layer.bias
    return layer.weight * gamma[:, None], None if layer.bias is None else layer.bias * gamma
