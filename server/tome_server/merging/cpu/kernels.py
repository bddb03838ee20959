"""The kernels of the CPU that packed models call.

Two libraries that come with torch have layouts of their own for weights: oneDNN, and MKL, whose kernels are the faster
ones on one thread of an Intel processor. The one that is faster here is measured once.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

Function: TypeAlias = Callable[[Tensor], Tensor]

# By the name of an activation what torch calls the way in which its GELU is computed.
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


class PackedLinear(nn.Module):
    """A Linear layer with packed `weight` [out, in], optionally followed by an activation. For inference only.

    `activation` is none, gelu or gelu_tanh, its approximation by tanh.

    Laid out for one thread if torch uses one when it is made. MKL has such a product in float32 alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.macs_per_token = weight.numel()
        self._kind = weight.detach().new_empty(0)
        bias = None if bias is None else bias.detach()
        alone = torch.get_num_threads() == 1 and weight.dtype == torch.float32
        product = _faster() if alone else _OneDnn
        self._run: Function = product(weight.detach(), bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], as nn.Linear."""
        return self._run(x)

    def _apply(self, fn: Function, recurse: bool = True) -> "PackedLinear":
        """Refuse what would have other weights in another dtype or on another device than these."""
        wanted = fn(self._kind)
        if (wanted.dtype, wanted.device) != (self._kind.dtype, self._kind.device):
            raise RuntimeError("packed weights stay in their dtype and on the CPU: convert the model, then pack it")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """Return itself: nothing in it changes, and packed weights stay where they were laid out."""
        return self


class _OneDnn:
    """A product with weights packed by oneDNN, GELU in its kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias, self._activation = bias, "none" if activation == "none" else "gelu"
        self._kind = _APPROXIMATE.get(activation, "none")
        # Found once: the look-up of an operator by its name is slow.
        self._kernel = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self._weight, self._bias, self._activation, [], self._kind)
        return y


class _Mkl:
    """A product with weights packed by MKL, on one thread."""

    # A layout is made for a number of rows, and gives the same results for any other. Those made for a few hundred or
    # more are as fast for any, those made for fewer slower for more.
    ROWS = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self._packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), self.ROWS)
        self._bias, self._gelu = bias, _APPROXIMATE.get(activation)
        # The operator reads nothing but its shape where it is told the number of rows that there are.
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
    """Return whose products are faster here on one thread, measured on a few of a small model's MLP.

    Together their weights are more than a core's own cache holds, as those of a model are.
    """
    if not _Mkl.is_available():
        return _OneDnn
    weight = torch.ones(384, 1536, dtype=torch.float32, device="cpu")
    x = weight[:64].clone()
    products = [kind(weight, None, "none") for _ in range(8) for kind in (_OneDnn, _Mkl)]
    # Of each product its shortest time: whatever else the processor does lengthens some.
    best = [float("inf")] * len(products)
    for _ in range(6):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return _Mkl if sum(best[1::2]) < sum(best[::2]) else _OneDnn


def layer_norm(norm: nn.LayerNorm) -> Function:
    """Return what a LayerNorm does, without the module."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def gamma_of(scale: nn.Module | None) -> Tensor | None:
    """Return what a LayerScale multiplies by, None for any other module."""
    return scale.get_parameter("gamma") if isinstance(scale, nn.Module) and type(scale) is LayerScale else None


def scaled(layer: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer that does what `layer` does, times `gamma` [out] if there is one."""
    if gamma is None:
        return layer.weight, layer.bias
    return layer.weight * gamma[:, None], None if layer.bias is None else layer.bias * gamma
