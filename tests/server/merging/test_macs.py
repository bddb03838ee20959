"""The MAC counts that papers print, and agreement with a count of what torch really runs."""

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.server.merging.small_models import KINDS, Kind
from tome_server.merging import Schedule, UnsupportedModelError, dispatch, macs, merge, tokens_per_block

DEIT_TI, DEIT_S = "deit_tiny_patch16_224", "deit_small_patch16_224"
VIT_B, VIT_L, VIT_H = "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"

COMPUTED = {  # G at r, to the digit
    DEIT_TI: {0: 1.254, 8: 0.924, 12: 0.769, 16: 0.622},
    DEIT_S: {0: 4.599, 8: 3.416, 13: 2.703, 16: 2.291},
    VIT_B: {0: 17.564, 8: 13.104, 11: 11.457, 13: 10.367, 16: 8.772},
    VIT_L: {0: 61.555, 5: 42.292, 6: 38.492, 7: 34.710, 8: 30.963},
    VIT_H: {0: 167.295, 5: 113.843, 6: 103.312},
}
PUBLISHED = {  # G at r, as ToMe's tables round them
    DEIT_TI: {0: 1.3, 8: 0.9, 12: 0.8, 16: 0.6},
    DEIT_S: {0: 4.6, 8: 3.4, 13: 2.7, 16: 2.3},
    VIT_B: {0: 17.6, 11: 11.5, 13: 10.4},
    VIT_L: {0: 61.6, 5: 42.3, 6: 38.5, 7: 34.7, 8: 31.0},
}


@cache
def on_meta(entrypoint: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(entrypoint, num_classes=1000)


def rows(table: dict[str, dict[int, float]]) -> list[tuple[str, int, float]]:
    return [(name, r, giga) for name, line in table.items() for r, giga in line.items()]


def plain_vit(patches: int, patch: int, width: int, per_block: tuple[int, ...]) -> int:
    """The formula of a plain ViT with a class token, 1000 classes and an MLP ratio of 4."""
    total = patches * width * patch * patch * 3 + width * 1000
    tokens = patches + 1
    for r in per_block:
        left = tokens - min(r, (tokens - 1) // 2)
        total += 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * left * width**2
        tokens = left
    return total


@pytest.mark.parametrize(("entrypoint", "r", "giga"), rows(PUBLISHED))
def test_merged_macs_are_those_published(entrypoint: str, r: int, giga: float) -> None:
    tolerance = 0.06e9 if entrypoint.startswith("deit") else 0.005 * giga * 1e9
    assert macs(on_meta(entrypoint), r).merged == pytest.approx(giga * 1e9, abs=tolerance)


@pytest.mark.parametrize(("entrypoint", "r", "giga"), rows(COMPUTED))
def test_merged_macs_are_those_computed_by_hand(entrypoint: str, r: int, giga: float) -> None:
    count = macs(on_meta(entrypoint), r)
    assert count.merged == pytest.approx(giga * 1e9, abs=0.0006e9)
    assert count.dense == pytest.approx(COMPUTED[entrypoint][0] * 1e9, abs=0.0006e9)


@pytest.mark.parametrize("r", [0, 1, 16, 99, 1000, Schedule.linear(13), Schedule.explicit(list(range(0, 36, 3)))])
@pytest.mark.parametrize(
    ("entrypoint", "patches", "patch", "width"),
    [(DEIT_TI, 196, 16, 192), (DEIT_S, 196, 16, 384), (VIT_B, 196, 16, 768)],
)
def test_macs_of_a_plain_vit_are_the_formula_exactly(
    entrypoint: str, patches: int, patch: int, width: int, r: int | Schedule
) -> None:
    per_block = r.per_block(12) if isinstance(r, Schedule) else (r,) * 12
    count = macs(on_meta(entrypoint), r)
    assert count.merged == plain_vit(patches, patch, width, per_block)
    assert count.dense == plain_vit(patches, patch, width, (0,) * 12)
    assert count.tokens == tokens_per_block(patches, 1, per_block)


@pytest.mark.parametrize("entrypoint", [DEIT_TI, DEIT_S, VIT_B, VIT_L, VIT_H])
def test_nothing_is_saved_and_nothing_spent_on_merging_at_r_0(entrypoint: str) -> None:
    count = macs(on_meta(entrypoint), 0)
    assert count.merged == count.dense
    assert count.overhead == 0
    assert set(count.tokens) == {257 if entrypoint == VIT_H else 197}


@pytest.mark.parametrize("r", [1, 4, 8, 13, 16, 98, Schedule.linear(8), Schedule.linear(8, 1.0)])
@pytest.mark.parametrize("entrypoint", [DEIT_TI, DEIT_S, VIT_B, VIT_L, VIT_H])
def test_merging_costs_something_but_less_than_2_percent(entrypoint: str, r: int | Schedule) -> None:
    count = macs(on_meta(entrypoint), r)
    assert 0 < count.overhead < 0.02 * count.dense
    assert count.merged + count.overhead < count.dense


def test_a_block_that_merges_nothing_costs_no_overhead() -> None:
    one, two = (
        macs(on_meta(VIT_B), Schedule.explicit(values)).overhead for values in ([8] + [0] * 11, [8, 8] + [0] * 10)
    )
    assert 0 < one < two < 2 * one


def test_what_a_head_of_the_class_token_leaves_unread_is_the_last_blocks() -> None:
    """MLP of all but the class token, 8 C² each, and there what merging takes."""
    assert macs(on_meta(VIT_B), 0).unread == 8 * 768**2 * 196
    at_16 = macs(on_meta(VIT_B), 16)
    assert at_16.unread > 8 * 768**2 * (at_16.tokens[-1] - 1)
    last_alone = macs(on_meta(VIT_B), Schedule.explicit([0] * 11 + [16]))
    assert last_alone.unread == 8 * 768**2 * 180 + last_alone.overhead
    assert macs(on_meta("vit_base_patch16_siglip_224"), 8).unread == 0


def test_macs_fall_with_r_until_it_is_clamped() -> None:
    counts = [macs(on_meta(VIT_B), r) for r in range(0, 99, 7)]
    merged = [count.merged for count in counts]
    assert merged == sorted(merged, reverse=True)
    assert len(set(merged)) == len(merged)
    assert macs(on_meta(VIT_B), 98) == macs(on_meta(VIT_B), 10**6)
    assert macs(on_meta(VIT_B), 98).tokens[-1] == 2


def test_another_image_size_costs_what_a_model_of_that_size_does() -> None:
    with torch.device("meta"):
        larger = timm.create_model("vit_base_patch16_384")
        dynamic = timm.create_model(VIT_B, dynamic_img_size=True)
        wide = timm.create_model(VIT_B, img_size=(224, 448))
    assert macs(dynamic, 8, (384, 384)) == macs(larger, 8)
    assert macs(dynamic, 8, (224, 448)) == macs(wide, 8)
    assert macs(dynamic, 8) == macs(on_meta(VIT_B), 8)


def test_a_negative_r_and_another_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        macs(on_meta(VIT_B), -1)
    with pytest.raises(ValueError, match=r"3.*12"):
        macs(on_meta(VIT_B), Schedule.explicit([1, 2, 3]))


def test_an_unsupported_model_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("beit_base_patch16_224", depth=1)
    with pytest.raises(UnsupportedModelError, match="Beit"):
        macs(model, 4)


def counted(model: nn.Module, *arguments: Any, **options: Any) -> int:
    """MACs that torch's own counter sees, with attention in separate matrix products of torch's."""
    model.requires_grad_(False)  # the counter's module hooks trip over views of parameters
    counter = FlopCounterMode(display=False)
    by_torch = patch.object(dispatch, "ATTENTION_KERNELS", new=[])
    with by_torch, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*arguments, **options)
    return counter.get_total_flops() // 2


EXTRA = {
    "SwiGLU, wide": Kind(options={"mlp_layer": SwiGLU, "mlp_ratio": 3.5}),
    "SwiGLU packed, wide": Kind(options={"mlp_layer": SwiGLUPacked, "mlp_ratio": 5.0}),
    "rectangular patches": Kind(options={"patch_size": (8, 16)}),
}
ALL = {**KINDS, **EXTRA}
each_kind = pytest.mark.parametrize("kind", ALL.values(), ids=ALL.keys())


@each_kind
def test_dense_macs_are_those_that_torch_counts(kind: Kind) -> None:
    model = kind.build(dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = kind.images(1, dtype=torch.float32)
    assert macs(model, 0, kind.image).dense == counted(model, images)


@pytest.mark.parametrize("r", [9, 1000])
@each_kind
def test_merged_macs_are_those_that_torch_counts(kind: Kind, r: int) -> None:
    model = kind.build(dtype=torch.float32)
    images = kind.images(1, dtype=torch.float32)
    expected = macs(model, r, kind.image)
    merged = merge(model)
    # With tokens asked for, the last block isn't cut short. The counter sees only the matrix
    # products of merging: the similarities.
    real = counted(merged, images, r, return_tokens=True)
    assert expected.merged < real <= expected.merged + expected.overhead
    assert (expected.tokens,) == merged(images, r).tokens_per_block


def test_deit_s_costs_what_torch_counts_with_fused_attention_off() -> None:
    model = timm.create_model(DEIT_S, depth=2)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert macs(model, 0).dense == counted(model, torch.zeros(1, 3, 224, 224))
