"""Small models of every kind that can be merged, with random parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, LayerNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
DEPTH = SMALL["depth"]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that matters, so that no path can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("weight") and parameter.ndim >= 2:
                value = 1.3 * noise / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):  # of a norm
                value = 1 + 0.3 * noise
            elif name.endswith(("gamma", "gamma_1", "gamma_2")):  # of LayerScale
                value = 0.7 + 0.3 * noise
            else:  # biases, class, register and position embeddings, latents
                value = 0.4 * noise
            parameter.copy_(value)
    return model


def replace_attention(**options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for block in model.blocks:
            block.attn = Attention(48, num_heads=3, qkv_bias=True, norm_layer=LayerNorm, **options)

    return change


@dataclass(frozen=True)
class Kind:
    entrypoint: str = "vit_tiny_patch16_224"
    options: dict[str, Any] | None = None
    change: Callable[[nn.Module], None] | None = None
    image: tuple[int, int] = (64, 64)
    any_size: bool = False
    """Has no image size of its own."""

    def build(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        options = {**SMALL, "num_classes": 7, **(self.options or {})}
        if self.any_size:
            del options["img_size"]
        model = timm.create_model(self.entrypoint, **options)
        if self.change is not None:
            self.change(model)
        return randomise(model.to(dtype), seed).eval()

    def images(self, batch: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        channels = (self.options or {}).get("in_chans", 3)
        shape = (batch, channels, *self.image)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def kind(
    entrypoint: str = "vit_tiny_patch16_224",
    *,
    image: tuple[int, int] = (64, 64),
    change: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> Kind:
    return Kind(entrypoint, options, change, image)


PLAIN_KINDS: dict[str, Kind] = {
    "class token": kind(),
    "layer scale": kind(init_values=0.1),
    "registers": kind(reg_tokens=4, init_values=0.1),
    "registers, no class token": kind(reg_tokens=3, class_token=False, global_pool="avg"),
    "even prefix": kind(reg_tokens=1, global_pool="avg"),
    "positions for patches only": kind(reg_tokens=2, no_embed_class=True),
    "no position embedding": kind(pos_embed="none"),
    "avg pool": kind(global_pool="avg"),
    "avg pool, no class token": kind(global_pool="avg", class_token=False),
    "avg pool, final norm before it": kind(global_pool="avg", fc_norm=False),
    "avg pool with prefix": kind(global_pool="avg", reg_tokens=2, pool_include_prefix=True),
    "class token, norm after pool": kind(fc_norm=True),
    "max pool": kind(global_pool="max"),
    "max pool with prefix": kind(global_pool="max", pool_include_prefix=True),
    "avgmax pool": kind(global_pool="avgmax", class_token=False),
    "avgmax pool with prefix": kind(global_pool="avgmax", pool_include_prefix=True),
    "map pool": kind(global_pool="map", class_token=False),
    "map pool beside prefix": kind(global_pool="map", reg_tokens=2),
    "map pool with prefix": kind(global_pool="map", reg_tokens=2, pool_include_prefix=True),
    "map pool, norm after it": kind(global_pool="map", class_token=False, fc_norm=True),
    "no final norm": kind(final_norm=False, global_pool="avg"),
    "qk_norm": kind(qk_norm=True),
    "scale norms": kind(scale_attn_norm=True, scale_mlp_norm=True),
    "gated attention": kind(change=replace_attention(gated=True)),
    "gate, all norms": kind(change=replace_attention(gated=True, qk_norm=True, scale_norm=True), init_values=0.1),
    "wide heads": kind(change=replace_attention(attn_head_dim=24, qk_norm=True)),
    "narrow heads, gate": kind(change=replace_attention(attn_head_dim=8, gated=True)),
    "one head": kind(num_heads=1),
    "no biases": kind(qkv_bias=False, proj_bias=False),
    "norm before the blocks": kind(pre_norm=True),
    "CLIP, quick GELU": kind("vit_base_patch16_clip_quickgelu_224"),
    "SwiGLU": kind(mlp_layer=SwiGLU),
    "SwiGLU packed": kind(mlp_layer=SwiGLUPacked, scale_mlp_norm=True),
    "RMS norm": kind(norm_layer="rmsnorm", qk_norm=True),
    "norm in the patch embedding": kind(embed_norm_layer="layernorm"),
    "distilled": kind("deit_tiny_distilled_patch16_224"),
    "distilled, features only": kind("deit_tiny_distilled_patch16_224", num_classes=0),
    "features only": kind(num_classes=0, global_pool="avg"),
    "one block": kind(depth=1),
    "one block, avg pool": kind(depth=1, global_pool="avg"),
    "one channel": kind(in_chans=1),
    "odd number of patches": kind(img_size=(40, 72), image=(40, 72)),
    "odd number of patches, even prefix": kind(img_size=(40, 72), image=(40, 72), class_token=False, global_pool="avg"),
    "other image size": kind(dynamic_img_size=True, image=(48, 80)),
    "other image size, positions for patches only": kind(
        dynamic_img_size=True, no_embed_class=True, reg_tokens=3, image=(72, 40)
    ),
    "other image size, distilled": kind("deit_tiny_distilled_patch16_224", dynamic_img_size=True, image=(32, 64)),
    "padded image": kind(dynamic_img_size=True, dynamic_img_pad=True, image=(60, 45)),
}


def biases_apart(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True


def gated(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn.gate = nn.Linear(48, 48)


def naflex(
    entrypoint: str = "naflexvit_base_patch16_gap", *, image: tuple[int, int] = (64, 64), **options: Any
) -> Kind:
    return Kind(entrypoint, {"pos_embed_grid_size": (7, 6), "reg_tokens": 1, **options}, None, image, any_size=True)


OTHER_KINDS: dict[str, Kind] = {
    "parallel scaling": kind(block_fn=ParallelScalingBlock),
    "parallel scaling, qk_norm, layer scale": kind(block_fn=ParallelScalingBlock, qk_norm=True, init_values=0.1),
    "parallel scaling, no bias, avg pool": kind(block_fn=ParallelScalingBlock, qkv_bias=False, global_pool="avg"),
    "parallel scaling, fused output": kind(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True)),
    "parallel things": kind(block_fn=ParallelThingsBlock, init_values=0.1),
    "parallel things, all norms, avg pool": kind(
        block_fn=ParallelThingsBlock, qk_norm=True, scale_attn_norm=True, global_pool="avg", reg_tokens=2
    ),
    "three parallel things": kind(block_fn=partial(ParallelThingsBlock, num_parallel=3)),
    "norms after": kind(block_fn=ResPostBlock, init_values=0.1),
    "norms after, qk_norm, avg pool": kind(block_fn=ResPostBlock, qk_norm=True, global_pool="avg"),
    "DINOv3": kind("vit_small_patch16_dinov3", init_values=0.1),
    "DINOv3, class token": kind("vit_small_patch16_dinov3", init_values=0.1, global_pool="token", use_fc_norm=False),
    "DINOv3, SwiGLU, biases": kind("vit_small_plus_patch16_dinov3_qkvb"),
    "EVA": kind("eva_giant_patch14_224", mlp_ratio=2.0),
    "EVA-02, packed SwiGLU": kind("eva02_tiny_patch14_224"),
    "EVA-02, norms inside": kind("eva02_base_patch14_224"),
    "EVA-02, norms after": kind("eva02_enormous_patch14_clip_224", mlp_ratio=2.0),
    "EVA-02, norms after and inside, rotated": kind(
        "eva02_enormous_patch14_clip_224", mlp_ratio=2.0, use_rot_pos_emb=True, scale_attn_inner=True, swiglu_mlp=True
    ),
    "EVA-02, biases added apart": kind("vit_small_patch16_dinov3_qkvb", change=biases_apart),
    "Perception Encoder, map pool": kind("vit_pe_core_tiny_patch16_384"),
    "Perception Encoder, avg pool": kind("vit_pe_spatial_tiny_patch16_512"),
    "RoPE, axial": kind("vit_small_patch16_rope_224"),
    "RoPE, mixed": kind("vit_small_patch16_rope_mixed_224"),
    "RoPE, mixed, positions added too": kind("vit_small_patch16_rope_mixed_ape_224"),
    "RoPE, mixed, avg pool, no class token": kind(
        "vit_small_patch16_rope_mixed_224", global_pool="avg", class_token=False
    ),
    "RoPE, registers, qk_norm, gate": kind(
        "vit_mediumd_patch16_rope_reg1_gap_256", qk_norm=True, num_reg_tokens=2, change=gated
    ),
    "RoPE of three sections": kind(
        "vit_small_patch16_rope_224", rope_type="mrope", rope_mrope_section=(2, 3, 3), rope_grid_indexing="ij"
    ),
    "RoPE, other image size": kind("vit_small_patch16_rope_224", dynamic_img_size=True, image=(48, 80)),
    "RoPE, mixed, padded image": kind(
        "vit_small_patch16_rope_mixed_224", dynamic_img_size=True, dynamic_img_pad=True, image=(60, 45)
    ),
    "Sapiens2, shared keys": kind(
        "vit_base_patch16_sapiens2",
        num_heads=6,
        embed_dim=96,
        num_kv_heads=(6, 3, 2),
        num_reg_tokens=1,
        rope_rescale_coords=1.0,  # else it draws one at random in training mode
    ),
    "lingbot": kind("vit_small_patch16_lingbot"),
    "NaFlex": naflex(),
    "NaFlex, map pool": naflex("naflexvit_base_patch16_map"),
    "NaFlex, aspect kept": naflex("naflexvit_base_patch16_par_gap", image=(48, 80)),
    "NaFlex, factorised positions": naflex("naflexvit_base_patch16_parfac_gap", image=(40, 72)),
    "NaFlex, class token": naflex("naflexvit_base_patch16_radio_v3", class_token=True),
    "NaFlex, axial": naflex(rope_type="axial", image=(48, 80)),
    "NaFlex, mixed, class token": naflex(
        rope_type="mixed", class_token=True, global_pool="token", rope_grid_indexing="xy"
    ),
    "NaFlex, SwiGLU, gate, max pool": naflex(swiglu_mlp=True, attn_gated=True, global_pool="max"),
}

KINDS = {**PLAIN_KINDS, **OTHER_KINDS}

# One of each family, pool and way to keep tokens apart: enough for what no option of a layer can change.
TYPICAL = {
    "class token", "registers", "avg pool, no class token", "max pool with prefix", "map pool beside prefix",
    "distilled", "gate, all norms", "SwiGLU packed", "one block", "odd number of patches, even prefix", "padded image",
    "parallel scaling, fused output", "parallel things", "norms after", "DINOv3", "EVA-02, norms inside",
    "RoPE, mixed", "Sapiens2, shared keys", "NaFlex, map pool",
}  # fmt: skip
assert KINDS.keys() >= TYPICAL

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
typical_kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=name, marks=() if name in TYPICAL else pytest.mark.nightly) for name, kind in KINDS.items()],
)
"""The typical kinds for every change, the others every night."""
