"""Tensor parallelism on the CPU: a few threads divide the work of each block, which makes single images faster.

Each thread computes some heads of a block's attention and some hidden channels of its MLP, with that part of the
weights. The threads' outputs are summed.
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
    """A merged model whose blocks are divided (`divide`) into as many parts as there are workers.

    A batch whose images divide evenly among the workers runs as in DataParallelModel. For any other, such as a single
    image, all workers run each block together.
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
    """A divided block, whose parts run on workers, or without workers one after the other."""

    def __init__(self, block: Block, workers: Workers | None = None) -> None:
        super().__init__(block)
        self._norm1, self._norm2 = layer_norm(block.norm1), layer_norm(block.norm2)
        attn, mlp = block.attn, block.mlp
        self._attentions = [partial(self._attend, qkv, proj) for qkv, proj in zip(attn.qkv, attn.proj, strict=True)]
        self._mlps = [partial(self._run_mlp, fc1, fc2) for fc1, fc2 in zip(mlp.fc1, mlp.fc2, strict=True)]
        self._each: Run = _one_by_one if workers is None else workers.each_with_caller

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `x` after its norm: each part has its own projection."""
        return self._norm1(x), None

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  positions are added to the tokens
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return attention's projected output [B, queries or N, channels] for tokens `qkv` [B, N, channels].

        The keys [B, 1, N, dim] that come with it are the sum over all heads.
        """
        parts = self._each([partial(attention, qkv, bias, queries) for attention in self._attentions])
        (output, keys), *others = parts
        for part_output, part_keys in others:
            output, keys = output.add_(part_output), keys.add_(part_keys)
        return output, keys

    def _attend(
        self, qkv: PackedLinear, proj: PackedLinear, x: Tensor, bias: Tensor | None, queries: int | None
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = qkv(x).view(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(q[:, :, :queries], k, v, bias, dropout=0.0, scale=self.attn.scale)
        return proj(out.transpose(1, 2).flatten(2)), k.sum(dim=1, keepdim=True)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """Return `x` plus attention's output."""
        return x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the MLP's output."""
        normed = self._norm2(x)
        output, *others = self._each([partial(mlp, normed) for mlp in self._mlps])
        x = x + output
        for part_output in others:
            x += part_output
        return x

    @staticmethod
    def _run_mlp(fc1: PackedLinear, fc2: PackedLinear, x: Tensor) -> Tensor:
        output: Tensor = fc2(fc1(x))
        return output


def divide(block: Block, count: int) -> None:
    """Replace each linear layer of a plain block by `count` packed parts of it.

    The bias of a layer whose parts are summed goes to its first part. LayerScale moves into the weights.
    """
    attn, mlp = block.attn, block.mlp
    heads, dim = attn.num_heads, attn.head_dim
    by_kind = attn.qkv.weight.unflatten(0, (3, heads, dim))
    kind_bias = None if attn.qkv.bias is None else attn.qkv.bias.view(3, heads, dim)
    proj, proj_bias = scaled(attn.proj, gamma_of(block.ls1))
    fc2, fc2_bias = scaled(mlp.fc2, gamma_of(block.ls2))

    parts: tuple[list[PackedLinear], ...] = ([], [], [], [])
    divided = zip(_slices(heads, count), _slices(mlp.fc1.out_features, count), strict=True)
    for i, (part_heads, hidden) in enumerate(divided):
        bias = None if kind_bias is None else kind_bias[:, part_heads].flatten()
        parts[0].append(PackedLinear(by_kind[:, part_heads].flatten(0, 2), bias))
        channels = slice(part_heads.start * dim, part_heads.stop * dim)
        parts[1].append(PackedLinear(proj[:, channels], proj_bias if i == 0 else None))
        bias = None if mlp.fc1.bias is None else mlp.fc1.bias[hidden]
        parts[2].append(PackedLinear(mlp.fc1.weight[hidden], bias, "gelu"))
        parts[3].append(PackedLinear(fc2[:, hidden], fc2_bias if i == 0 else None))
    attn.qkv, attn.proj, mlp.fc1, mlp.fc2 = map(nn.ModuleList, parts)
    block.ls1 = block.ls2 = nn.Identity()


def _slices(total: int, count: int) -> list[slice]:
    """Divide `total` items into `count` slices, as evenly as possible."""
    bounds = [total * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _one_by_one(calls: Sequence[Callable[[], T]]) -> list[T]:
    return [call() for call in calls]
