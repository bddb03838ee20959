"""Packs the weights of blocks.

A linear layer is packed if it belongs to one of timm's attentions or MLPs, whose forward pass is known. Separate biases
and LayerScale that follow a layer move into its weights, and GELU into its kernel. Layers that read the same tokens
become one layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, GELUTanh, GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models.eva import Eva
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from tome_server.merging.cpu.kernels import Function, PackedLinear, gamma_of, layer_norm, scaled
from tome_server.merging.encoder import Layers
from tome_server.merging.families.eva import EvaLayers, fix_positions
from tome_server.merging.families.parallel import ParallelScalingLayers, ParallelThingsLayers
from tome_server.merging.families.vit import BlockLayers
from tome_server.merging.geometry import default_size, patch_grid
from tome_server.merging.support import VisionModel, layers_of

# Modules that are the identity in eval mode.
_IDENTITIES = (nn.Identity, nn.Dropout, DropPath)
# Activations that return a new tensor, so that Gate may multiply it in place.
_OUT_OF_PLACE = (nn.SiLU, nn.GELU, nn.Sigmoid)


class PackedLayers:
    """A packed block of attention followed by an MLP, which calls the kernels without the modules around them.

    A block has a dozen modules, most of them an Identity. They take 3 % of the time of a single image of DeiT-S at
    r = 16.
    """

    def __init__(self, layers: BlockLayers | EvaLayers) -> None:
        block, attn = layers.block, layers.attn
        self.heads, self.key_heads, self.head_dim = layers.heads, layers.key_heads, layers.head_dim
        self.before, self.after = (attn,), (block.mlp,)
        self.attend = layers.attend
        first, last = [nn.Identity(), nn.Identity()], [nn.Identity(), nn.Identity()]
        norms = first if layers.norms_first else last
        norms[:] = block.norm1, block.norm2
        scales = [getattr(block, name, nn.Identity()) for name in ("ls1", "ls2")]
        self._enter = compose(first[0])
        self._qkv: Function = compose(attn.qkv) if type(attn.qkv) is PackedLinear else layers.qkv
        self._gate = None if attn.gate is None else compose(attn.gate, nn.Sigmoid())
        self._attended = compose(attn.norm)
        self._proj = compose(attn.proj, scales[0], last[0])
        self._mlp = compose(first[1], block.mlp, scales[1], last[1])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., (heads + 2 * key_heads) * dim], and the gate if attention has one."""
        x = self._enter(x)
        return self._qkv(x), None if self._gate is None else self._gate(x)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` plus attention's output; `side` is the gate."""
        attended = self._attended(attended)
        if side is not None:
            attended = attended * side
        return x + self._proj(attended)

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the MLP's output."""
        return x + self._mlp(x)


class Gate(nn.Module):
    """The gate between the layers of a gated MLP: half of the channels, activated, times the other half."""

    def __init__(self, act: nn.Module, last: bool = False) -> None:
        """Make a gate with the activation `act`. `last` says that the second half is the activated one."""
        super().__init__()
        self.act = act
        self._last = last
        self._in_place = type(act) in _OUT_OF_PLACE and not getattr(act, "inplace", False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., channels] for `x` [..., 2 * channels]."""
        gate, value = x.chunk(2, dim=-1)
        if self._last:
            gate, value = value, gate
        activated: Tensor = self.act(gate)
        return activated.mul_(value) if self._in_place else activated * value


def pack_blocks(model: VisionModel) -> list[Layers]:
    """Pack the weights of a model's blocks in place, and return the blocks as Layers."""
    blocks = layers_of(model)
    if type(model) is not Eva or model.rope is None:
        return [pack_block(layers) for layers in blocks]
    orders = [_interleaved_order(layers) for layers in blocks if isinstance(layers, EvaLayers)]
    interleaved = all(order is not None for order in orders)
    packed = [pack_block(layers, order if interleaved else None) for layers, order in zip(blocks, orders, strict=True)]
    fix_positions(model, patch_grid(model, *default_size(model)), interleaved=interleaved)
    return packed


def pack_block(layers: Layers, order: Tensor | None = None) -> Layers:
    """Pack the weights of a block in place, and return Layers that use them.

    Args:
        layers: the block.
        order: new order of the channels of queries, keys and values, from `_interleaved_order`.
    """
    if isinstance(layers, ParallelScalingLayers):
        _pack_parallel_scaling(layers.block)
        return layers
    if isinstance(layers, ParallelThingsLayers):
        for branch in layers.block.attns:
            _pack_attention(branch.attn, branch, "ls")
        for branch in layers.block.ffns:
            branch.mlp = _packed_mlp(branch.mlp, branch, "ls")
        return layers
    assert isinstance(layers, BlockLayers | EvaLayers)
    block: Any = layers.block
    first, second = ("gamma_1", "gamma_2") if isinstance(layers, EvaLayers) else ("ls1", "ls2")
    _pack_attention(layers.attn, block, first, order)
    if isinstance(layers, EvaLayers) and order is not None:
        layers.rotate_half = block.attn.rotate_half = False
    block.mlp = _packed_mlp(block.mlp, block, second)
    # An Eva's scale that couldn't move into a layer is a parameter, which PackedLayers can't call as it does modules.
    has_scale = any(getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2"))
    return layers if has_scale else PackedLayers(layers)


def compose(*modules: nn.Module) -> Function:
    """Return a function that applies the modules in order, in eval mode, if possible without calling the modules."""
    functions = [_bare(module) for module in _flat(modules)]
    if not functions:
        return lambda x: x
    if len(functions) == 1:
        return functions[0]

    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


def _flat(modules: Sequence[nn.Module]) -> list[nn.Module]:
    parts = [part for module in modules for part in (module if type(module) is nn.Sequential else [module])]
    return [part for part in parts if type(part) not in _IDENTITIES]


def _bare(module: Any) -> Function:
    if type(module) in (nn.LayerNorm, LayerNorm):
        return layer_norm(module)
    function: Function = module.forward if type(module) in (PackedLinear, Gate) else module
    return function


def _interleaved_order(layers: EvaLayers) -> Tensor | None:
    """Return an order of the channels of queries, keys and values in which rotated pairs are neighbours.

    Pairs lie half a head apart before. Products of queries and keys stay the same, since both are reordered; rotating
    neighbours needs no copy. None if the block's layers can't be reordered.
    """
    attn, dim = layers.attn, layers.head_dim
    normed = any(type(norm) is not nn.Identity for norm in (attn.q_norm, attn.k_norm))
    if not layers.rotate_half or normed or _joined_projections(attn) is None:
        return None
    rotated = (layers.heads + layers.key_heads) * dim
    order = torch.arange(rotated + layers.key_heads * dim, device="cpu")
    return torch.cat([order[:rotated].view(-1, 2, dim // 2).mT.flatten(), order[rotated:]])


def _pack_attention(attn: Any, owner: Any, scale: str, order: Tensor | None = None) -> None:
    if (joined := _joined_projections(attn)) is not None:
        weight, bias = joined
        if order is not None:
            weight, bias = weight[order], None if bias is None else bias[order]
        attn.qkv = PackedLinear(weight, bias)
        for name in ("q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias"):
            if getattr(attn, name, None) is not None:
                setattr(attn, name, None)
    if getattr(attn, "gate", None) is not None:
        attn.gate = _packed(attn.gate)
    attn.proj = _packed_and_scaled(attn.proj, owner, scale)


def _joined_projections(attn: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of one layer for queries, keys and values; None if they aren't plain linear layers."""
    if attn.qkv is None:
        return _joined(attn.q_proj, attn.k_proj, attn.v_proj)
    if type(attn.qkv) is not nn.Linear:
        return None
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.weight, attn.qkv.bias
    if _bias(attn.qkv) is not None:
        return None
    return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _joined(*layers: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of one layer whose output is that of all layers, concatenated; None if one isn't plain."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return None
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    return weight, torch.cat([layer.weight[:, 0] * 0 if layer.bias is None else layer.bias for layer in layers])


def _packed_mlp(mlp: Any, owner: Any, scale: str) -> nn.Module:
    """Return an MLP as a sequence of packed layers, or the MLP itself if its class isn't known."""
    if type(mlp) is Mlp and type(mlp.fc1) is nn.Linear:
        activation = _activation(mlp.act)
        fc1 = PackedLinear(mlp.fc1.weight, mlp.fc1.bias, activation)
        act = mlp.act if activation == "none" else nn.Identity()
        return nn.Sequential(fc1, act, mlp.norm, _packed_and_scaled(mlp.fc2, owner, scale))
    if type(mlp) is GluMlp and mlp.chunk_dim == -1:
        gate = Gate(mlp.act, last=mlp.gate_last)
        return nn.Sequential(_packed(mlp.fc1), gate, mlp.norm, _packed_and_scaled(mlp.fc2, owner, scale))
    if type(mlp) is SwiGLU and (joined := _joined(mlp.fc1_g, mlp.fc1_x)) is not None:
        fc2 = _packed_and_scaled(mlp.fc2, owner, scale)
        return nn.Sequential(PackedLinear(*joined), Gate(mlp.act), mlp.norm, fc2)
    if type(mlp) is GeGluMlp and (joined := _joined(mlp.w0, mlp.w1)) is not None:
        fc2 = _packed_and_scaled(mlp.w2, owner, scale)
        return nn.Sequential(mlp.norm, PackedLinear(*joined), Gate(mlp.act), fc2)
    unknown: nn.Module = mlp
    return unknown


def _pack_parallel_scaling(block: Any) -> None:
    if type(block.in_proj) is nn.Linear:
        weight, bias = block.in_proj.weight, _bias(block.in_proj)
        if bias is None and block.mlp_bias is not None:
            bias = torch.cat([block.mlp_bias, block.mlp_bias.new_zeros(len(weight) - len(block.mlp_bias))])
            block.mlp_bias = None
        block.in_proj = PackedLinear(weight, bias)
    names = ["attn_out_proj", "mlp_out_proj"] if block.out_proj is None else ["out_proj"]
    gamma = gamma_of(block.ls)
    if gamma is not None and all(type(getattr(block, name)) is nn.Linear for name in names):
        for name in names:
            setattr(block, name, PackedLinear(*scaled(getattr(block, name), gamma)))
        block.ls = nn.Identity()
    for name in names:
        setattr(block, name, _packed(getattr(block, name)))


def _packed(layer: Any) -> nn.Module:
    packed: nn.Module = PackedLinear(layer.weight, layer.bias) if type(layer) is nn.Linear else layer
    return packed


def _packed_and_scaled(layer: Any, owner: Any, name: str) -> nn.Module:
    """Return `layer` packed, with the scale that follows it (its owner's attribute `name`) moved into its weights."""
    scale = getattr(owner, name, None)
    gamma = scale if isinstance(scale, Tensor) else gamma_of(scale)
    if gamma is None or type(layer) is not nn.Linear:
        return _packed(layer)
    setattr(owner, name, None if isinstance(scale, Tensor) else nn.Identity())
    return PackedLinear(*scaled(layer, gamma))


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias  # torch's annotation leaves out None


def _activation(act: Any) -> str:
    """Return PackedLinear's name of an activation, or `none` if it has none."""
    if type(act) is GELUTanh:
        return "gelu_tanh"
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate, "none") if type(act) is nn.GELU else "none"
