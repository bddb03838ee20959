"""Blocks whose work is divided among a few threads, so that a single image has something for each of them.

Every thread has some heads of a block's attention and some of its MLP's hidden channels, and so their weights; what
they find is added up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tome_server.merging.attention import attention
from tome_server.merging.cpu.data_parallel import DataParallelModel
from tome_server.merging.cpu.kernels import PackedLinear, gamma_of, layer_norm, scaled
from tome_server.merging.cpu.workers import Workers
from tome_server.merging.families.vit import BlockLayers
from tome_server.merging.model import MergedModel, MergedOutput
from tome_server.merging.support import VisionModel

T = TypeVar("T")
Run: TypeAlias = Callable[[Sequence[Callable[[], Any]]], list[Any]]


class TensorParallelModel(DataParallelModel):
    """A model whose blocks are divided (`divide`) into as many parts as there are workers.

    Images that don't go round evenly, a single one above all, take all workers for each block.
    """

    def __init__(self, model: VisionModel, proportional_attention: bool, workers: Workers) -> None:
        layers = [TensorParallelLayers(block, workers) for block in model.blocks]
        all_workers = MergedModel(model, proportional_attention, layers).forward

        def together(*args: Any, **kwargs: Any) -> MergedOutput:
            return workers.each([partial(all_workers, *args, **kwargs)])[0]

        super().__init__(
            model,
            proportional_attention,
            [TensorParallelLayers(block) for block in model.blocks],
            workers,
            division="images and blocks",
            together=together,
        )


class TensorParallelLayers(BlockLayers):
    """A divided block, on `workers`, or where there are none one part after the other."""

    def __init__(self, block: Block, workers: Workers | None = None) -> None:
        super().__init__(block)
        self._norm1, self._norm2 = layer_norm(block.norm1), layer_norm(block.norm2)
        attn, mlp = block.attn, block.mlp
        self._attentions = [partial(self._attend, qkv, proj) for qkv, proj in zip(attn.qkv, attn.proj, strict=True)]
        self._mlps = [partial(self._run_mlp, fc1, fc2) for fc1, fc2 in zip(mlp.fc1, mlp.fc2, strict=True)]
        self._each: Run = _one_by_one if workers is None else workers.each_with_caller

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `x` after its norm: each part projects for itself."""
        return self._norm1(x), None

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says, but of tokens not projected yet; keys [B, 1, N, dim] come summed over all heads."""
        parts = self._each([partial(attention, qkv, bias, queries) for attention in self._attentions])
        (found, keys), *others = parts
        for more, more_keys in others:
            found, keys = found.add_(more), keys.add_(more_keys)
        return found, keys

    def _attend(
        self, qkv: PackedLinear, proj: PackedLinear, x: Tensor, bias: Tensor | None, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = qkv(x).view(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(q[:, :, :queries], k, v, bias, dropout=0.0, scale=self.attn.scale)
        return proj(out.transpose(1, 2).flatten(2)), k.sum(dim=1, keepdim=True)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """As BlockLayers does."""
        return x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """As BlockLayers does."""
        normed = self._norm2(x)
        made, *others = self._each([partial(mlp, normed) for mlp in self._mlps])
        x = x + made
        for more in others:
            x += more
        return x

    @staticmethod
    def _run_mlp(fc1: PackedLinear, fc2: PackedLinear, x: Tensor) -> Tensor:
        found: Tensor = fc2(fc1(x))
        return found


def divide(block: Block, count: int) -> None:
    """Put packed parts in the place of a plain block's linear layers, `count` of each."""
    attn, mlp = block.attn, block.mlp
    heads, dim = attn.num_heads, attn.head_dim
    by_kind = attn.qkv.weight.unflatten(0, (3, heads, dim))
    kind_bias = None if attn.qkv.bias is None else attn.qkv.bias.view(3, heads, dim)
    proj, proj_bias = scaled(attn.proj, gamma_of(block.ls1))
    fc2, fc2_bias = scaled(mlp.fc2, gamma_of(block.ls2))

    parts: tuple[list[PackedLinear], ...] = ([], [], [], [])
    for i, (own, hidden) in enumerate(zip(_shares(heads, count), _shares(mlp.fc1.out_features, count), strict=True)):
        bias = None if kind_bias is None else kind_bias[:, own].flatten()
        parts[0].append(PackedLinear(by_kind[:, own].flatten(0, 2), bias))
        channels = slice(own.start * dim, own.stop * dim)
        parts[1].append(PackedLinear(proj[:, channels], proj_bias if i == 0 else None))
        bias = None if mlp.fc1.bias is None else mlp.fc1.bias[hidden]
        parts[2].append(PackedLinear(mlp.fc1.weight[hidden], bias, "gelu"))
        parts[3].append(PackedLinear(fc2[:, hidden], fc2_bias if i == 0 else None))
    attn.qkv, attn.proj, mlp.fc1, mlp.fc2 = map(nn.ModuleList, parts)
    block.ls1 = block.ls2 = nn.Identity()


def _shares(whole: int, count: int) -> list[slice]:
    bounds = [whole * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _one_by_one(calls: Sequence[Callable[[], T]]) -> list[T]:
    return [call() for call in calls]
