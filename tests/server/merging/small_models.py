"""Small models of every kind that timm's plain Vision Transformer takes, with random parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Attention, LayerNorm, SwiGLU, SwiGLUPacked
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
            elif name.endswith("gamma"):  # of LayerScale
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

    def build(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        model = timm.create_model(self.entrypoint, **{**SMALL, "num_classes": 7, **(self.options or {})})
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


KINDS: dict[str, Kind] = {
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
