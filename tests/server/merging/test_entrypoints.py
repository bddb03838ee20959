"""timm's own entrypoints: as they are at r=0, sound at r>0; all others refused."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.server.merging.small_models import randomise
from tome_server.merging import Schedule, UnsupportedModelError, macs, merge, tokens_per_block

GRID = (5, 6)  # patches; other than any model's own
R = 4


@dataclass(frozen=True)
class Entrypoint:
    name: str
    pool: str
    """How it pools, ..."""
    prefix: int
    """... its prefix tokens, ..."""
    layer_scale: bool = False
    """... and whether it scales its layers: guards that what is tested is of the kind meant."""


ENTRYPOINTS = [
    Entrypoint("vit_tiny_patch16_224", "token", 1),
    Entrypoint("vit_tiny_patch16_384", "token", 1),
    Entrypoint("vit_small_patch32_224", "token", 1),
    Entrypoint("vit_small_patch16_224", "token", 1),
    Entrypoint("vit_small_patch8_224", "token", 1),
    Entrypoint("vit_base_patch16_224", "token", 1),
    Entrypoint("vit_base_patch16_224.mae", "token", 1),
    Entrypoint("vit_base_patch8_224", "token", 1),
    Entrypoint("vit_base_patch16_224_miil", "token", 1),
    Entrypoint("vit_large_patch14_224", "token", 1),
    Entrypoint("vit_small_patch16_36x1_224", "token", 1, layer_scale=True),
    Entrypoint("vit_base_patch16_plus_240", "token", 1, layer_scale=True),
    Entrypoint("flexivit_small", "token", 1),
    Entrypoint("eva_large_patch14_196", "avg", 1),
    Entrypoint("deit_tiny_patch16_224", "token", 1),
    Entrypoint("deit_tiny_distilled_patch16_224", "token", 2),
    Entrypoint("deit_small_distilled_patch16_224", "token", 2),
    Entrypoint("deit3_small_patch16_224", "token", 1, layer_scale=True),
    Entrypoint("deit3_medium_patch16_224", "token", 1, layer_scale=True),
    Entrypoint("vit_small_patch14_dinov2", "token", 1, layer_scale=True),
    Entrypoint("vit_base_patch14_dinov2", "token", 1, layer_scale=True),
    Entrypoint("vit_small_patch14_reg4_dinov2", "token", 5, layer_scale=True),
    Entrypoint("vit_giant_patch14_reg4_dinov2", "token", 5, layer_scale=True),
    Entrypoint("vit_base_patch14_reg1_tipsv2", "token", 2, layer_scale=True),
    Entrypoint("vit_base_patch16_radio_v3", "token", 8, layer_scale=True),
    Entrypoint("vit_base_patch16_siglip_224", "map", 0),
    Entrypoint("vit_base_patch32_siglip_256", "map", 0),
    Entrypoint("vit_base_patch16_siglip_gap_224", "avg", 0),
    Entrypoint("vit_so400m_patch14_siglip_224", "map", 0),
    Entrypoint("vit_base_patch16_clip_224", "token", 1),
    Entrypoint("vit_base_patch32_clip_quickgelu_224", "token", 1),
    Entrypoint("vit_xsmall_patch16_clip_224", "token", 1),
    Entrypoint("vit_medium_patch16_gap_240", "avg", 0, layer_scale=True),
    Entrypoint("vit_base_patch16_gap_224", "avg", 0),
    Entrypoint("vit_wee_patch16_reg1_gap_256", "avg", 1, layer_scale=True),
    Entrypoint("vit_little_patch16_reg4_gap_256", "avg", 4, layer_scale=True),
    Entrypoint("vit_mediumd_patch16_reg4_gap_256", "avg", 4, layer_scale=True),
    Entrypoint("vit_betwixt_patch16_reg1_gap_256", "avg", 1, layer_scale=True),
    Entrypoint("vit_base_patch16_reg4_gap_256", "avg", 4),
    Entrypoint("vit_so150m_patch16_reg4_gap_256", "avg", 4),
    Entrypoint("vit_so150m_patch16_reg4_map_256", "map", 4),
    Entrypoint("vit_so150m2_patch16_reg1_gap_256", "avg", 1, layer_scale=True),
    Entrypoint("vit_intern300m_patch14_448", "token", 1, layer_scale=True),
    Entrypoint("aimv2_large_patch14_224", "avg", 0),
    Entrypoint("beit3_base_patch16_224", "avg", 1),
    Entrypoint("vit_pwee_patch16_reg1_gap_256", "avg", 1),
    Entrypoint("vit_small_patch16_18x2_224", "token", 1),
    Entrypoint("eva02_tiny_patch14_224", "avg", 1),
    Entrypoint("vit_small_patch16_dinov3", "avg", 5, layer_scale=True),
    Entrypoint("vit_pe_core_tiny_patch16_384", "map", 1),
    Entrypoint("vit_small_patch16_rope_mixed_ape_224", "token", 1, layer_scale=True),
    Entrypoint("vit_medium_patch16_rope_reg1_gap_256", "avg", 1, layer_scale=True),
    Entrypoint("test_vit2", "avg", 1, layer_scale=True),
    Entrypoint("test_vit3", "map", 1, layer_scale=True),
    Entrypoint("test_vit4", "avg", 1, layer_scale=True),
]

REFUSED = {
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "beit_base_patch16_224": "Beit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "samvit_base_patch16": "VisionTransformerSAM",
}

each_entrypoint = pytest.mark.parametrize("entrypoint", ENTRYPOINTS, ids=lambda each: each.name)


@cache
def patch_size(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        return timm.create_model(name, depth=1, **one_block(name)).patch_embed.patch_size


def one_block(name: str) -> dict[str, int]:
    """What timm asks for beside the depth."""
    return {"num_kv_heads": 2} if "sapiens2" in name else {}


def build(name: str, **options: Any) -> tuple[nn.Module, tuple[int, int]]:
    """The entrypoint with two blocks and few patches, and its image size."""
    size = tuple(side * patch for side, patch in zip(GRID, patch_size(name), strict=True))
    with torch.device("meta"):  # random values come once, from randomise
        model = timm.create_model(name, depth=2, img_size=size, **options)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return randomise(model).eval(), size


def scales_layers(model: nn.Module) -> bool:
    block = model.blocks[0]
    return getattr(block, "gamma_1", None) is not None or isinstance(getattr(block, "ls1", None), LayerScale)


def images_of(size: tuple[int, int], batch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


@each_entrypoint
def test_entrypoint_is_unchanged_at_r_0_and_sound_at_r_above_0(entrypoint: Entrypoint) -> None:
    model, size = build(entrypoint.name, num_classes=20)
    prefix, patches = model.num_prefix_tokens, GRID[0] * GRID[1]
    assert (model.global_pool, prefix) == (entrypoint.pool, entrypoint.prefix)
    assert entrypoint.layer_scale == scales_layers(model)
    merged = merge(model)

    with torch.inference_mode():
        images = images_of(size, 2, torch.float32)
        expected, out = model(images), merged(images)
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(out.logits, expected, rtol=0, atol=atol)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        atol = 1e-4 * features.abs().max().item()
        torch.testing.assert_close(out.features, features, rtol=0, atol=atol)
        assert out.tokens_per_block == ((prefix + patches,) * 2,) * 2

        out = merged(images, R)
        assert out.logits.isfinite().all()
        assert out.tokens_per_block == ((prefix + patches - R, prefix + patches - 2 * R),) * 2
        assert out.tokens_per_block[0] == macs(model, R).tokens
        assert (out.logits - expected).abs().max() > atol  # it did merge


# One of each prefix, pool and family; what batches have to do with the rest is in test_model.py and test_mixed.py.
IN_BATCHES = {
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2",
    "vit_so150m_patch16_reg4_map_256", "vit_wee_patch16_reg1_gap_256", "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224", "vit_pe_core_tiny_patch16_384",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(each.name, marks=() if each.name in IN_BATCHES else pytest.mark.nightly) for each in ENTRYPOINTS],
)
def test_a_batch_of_an_entrypoint_gives_what_each_image_gives_alone(name: str) -> None:
    """In float64, where rounding cannot turn a matching."""
    model, size = build(name, num_classes=20)
    merged, images = merge(model.double()), images_of(size, 2, torch.float64)
    with torch.inference_mode():
        together = merged(images, R, return_token_map=True)
        for i, image in enumerate(images):
            alone = merged(image[None], R, return_token_map=True)
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-8, atol=1e-8)
            assert torch.equal(alone.token_map[0], together.token_map[i])


@pytest.mark.parametrize(("name", "offender"), REFUSED.items(), ids=REFUSED.keys())
def test_entrypoint_of_another_block_is_refused_by_its_name(name: str, offender: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)
    with pytest.raises(UnsupportedModelError, match=rf"\b{offender}\b"):
        merge(model)


# Model families, by timm's module. Stems take seconds to build, so the hybrid ones have their own tests.
FAMILIES = [
    name for module in ("vision_transformer", "deit", "eva", "naflexvit") for name in timm.list_models(module=module)
]
DIFFERENTIAL = {"vit_dlittle_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"}
ON_A_STEM = [name for module in ("vision_transformer_hybrid", "vitamin") for name in timm.list_models(module=module)]
SMALL_STEMS = ["vit_tiny_r_s16_p8_224", "vit_small_resnet26d_224", "vit_base_mci_224", "vitamin_small_224"]


def build_narrow(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """One narrow block, so that all of timm takes seconds."""
    options = {"depth": 1, "embed_dim": 96, "num_heads": 6, "num_classes": 5, **one_block(name)}
    if name.startswith("naflexvit"):
        model = timm.create_model(name, **options)
        size = tuple(2 * side for side in model.embeds.patch_size)
    else:
        size = tuple(2 * side for side in patch_size(name))
        model = timm.create_model(name, img_size=size, **options)
    return randomise(model).double().eval(), size


def torch_counts(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates that torch's own counter sees, with attention in separate matrix products."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images)
    return counter.get_total_flops() // 2


def assert_unchanged_at_r_0(model: nn.Module, images: Tensor) -> None:
    merged = merge(model)
    with torch.inference_mode():
        expected, out = model(images), merged(images, return_token_map=True)
        torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        patches, prefix = out.token_map.shape[1], model.num_prefix_tokens
        assert out.tokens_per_block == (tokens_per_block(patches, prefix, (0,) * len(model.blocks)),)
        once = (1,) + (0,) * (len(model.blocks) - 1)
        assert merged(images, Schedule.explicit(once)).tokens_per_block == (tokens_per_block(patches, prefix, once),)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - DIFFERENTIAL))
def test_every_vit_of_timm_is_unchanged_at_r_0_and_its_macs_are_those_that_torch_counts(name: str) -> None:
    model, size = build_narrow(name)
    images = images_of(size, 1, torch.float64)
    assert_unchanged_at_r_0(model, images)
    assert macs(model, 0, size).dense == torch_counts(model, images)


@pytest.mark.parametrize("name", sorted(DIFFERENTIAL))
def test_differential_attention_is_refused_and_not_counted(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    for refuse in (merge, lambda model: macs(model, 0)):
        with pytest.raises(UnsupportedModelError, match="Diff"):
            refuse(model)


@pytest.mark.parametrize(
    "name", [name if name in SMALL_STEMS else pytest.param(name, marks=pytest.mark.nightly) for name in ON_A_STEM]
)
def test_a_vit_on_a_convolutional_stem_is_unchanged_at_r_0_and_its_macs_count_the_stem(name: str) -> None:
    model = timm.create_model(name, depth=2).double().eval()
    size = model.patch_embed.img_size
    images = images_of(size, 1, torch.float64)
    assert_unchanged_at_r_0(model, images)
    counted = macs(model, 0)
    assert counted.dense == torch_counts(model, images)
    assert counted.dense > 2 * counted.overhead
    assert macs(model, 0) == counted
