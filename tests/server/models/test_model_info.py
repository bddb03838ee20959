from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from tome_server.merging import merge
from tome_server.models.loaded import loaded_model
from tome_server.models.loading import load
from tome_server.models.model_info import LEAST_WORK, ModelInfo, Quality
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.spec import ModelSpec
from tome_server.models.transform import ImageSettings


def hosted(model: nn.Module, size: int, **changes: object) -> ModelInfo:
    settings = ImageSettings((3, size, size), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    loaded = loaded_model(merge(model), Preprocess(settings, Limits()), name="model", architecture="vit")
    return replace(loaded.info, **changes)


def on_meta(architecture: str, **kwargs: object) -> nn.Module:
    """A model without memory: its size is all that costs need."""
    with torch.device("meta"):
        return timm.create_model(architecture, **kwargs)


def test_the_grid_of_vit_b_is_known() -> None:
    model = hosted(on_meta("vit_base_patch16_224"), 224)
    assert [level.r for level in model.grid] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert model.patch_grid == (14, 14)
    assert model.largest_r == 98
    assert model.num_classes == 1000
    assert model.feature_dim == 768


@pytest.mark.parametrize(
    ("architecture", "kwargs", "size"),
    [
        ("vit_tiny_patch16_224", {}, 224),
        ("vit_large_patch16_224", {}, 224),
        ("deit_tiny_distilled_patch16_224", {}, 224),
        ("vit_base_patch16_siglip_224", {}, 224),
        ("vit_tiny_patch16_384", {}, 384),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "patch_size": 8}, 32),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32, "patch_size": 16}, 32),
    ],
)
def test_the_grid_rises_from_0_to_where_half_of_the_work_is_left(
    architecture: str, kwargs: dict[str, object], size: int
) -> None:
    model = hosted(on_meta(architecture, **kwargs), size)
    grid = [level.r for level in model.grid]
    assert grid[0] == 0
    step = grid[1] - grid[0]
    assert step > 0
    assert all(high - low == step for low, high in pairwise(grid))
    assert len(grid) <= 9
    assert grid[-1] <= model.largest_r
    dense = model.cost(0).dense
    assert model.cost(grid[-1]).merged >= LEAST_WORK * dense
    # A step more would go too far, or does not exist.
    following = grid[-1] + step
    assert following > model.largest_r or model.cost(following).merged < LEAST_WORK * dense


def test_a_model_of_one_patch_has_nothing_to_merge() -> None:
    model = hosted(on_meta("vit_tiny_patch16_224", img_size=16), 16)
    assert model.largest_r == 0
    assert [level.r for level in model.grid] == [0]


def test_costs_fall_with_r_and_are_counted_once(spec: ModelSpec) -> None:
    model = load(spec, torch.device("cpu")).info
    costs = [model.cost(r) for r in range(model.largest_r + 1)]
    assert all(before.merged > after.merged for before, after in pairwise(costs))
    assert {cost.dense for cost in costs} == {costs[0].merged}
    assert model.cost(3) is model.cost(3)


def test_the_grid_carries_costs_and_what_was_measured() -> None:
    measured = {0: Quality(1.0, 0.9), 4: Quality(0.8), 5: Quality(0.7)}
    model = hosted(on_meta("vit_base_patch16_224"), 224, quality=measured)
    levels = {level.r: level for level in model.grid}
    assert {r: level.quality for r, level in levels.items() if level.quality} == {0: measured[0], 4: measured[4]}
    assert levels[4].cost == model.cost(4)


def test_the_largest_r_is_half_of_the_patches(spec: ModelSpec) -> None:
    model = load(spec, torch.device("cpu")).info
    assert model.patch_grid == (4, 4)
    assert model.largest_r == 8


# What quality policies go by


def of_quality(values: Sequence[Quality | None]) -> ModelInfo:
    model = hosted(on_meta("vit_base_patch16_224"), 224)
    return replace(model, quality={level.r: value for level, value in zip(model.grid, values, strict=True) if value})


def test_quality_is_top1_as_a_share_of_that_at_r_0() -> None:
    top1 = [0.8, 0.82, 0.8, 0.79, 0.78, 0.77, 0.76, 0.74, 0.72]
    model = of_quality([Quality(agreement=0.5, top1=value) for value in top1])
    assert model.relative_quality == pytest.approx([value / 0.8 for value in top1])
    assert model.assumed_quality == model.relative_quality


def test_where_not_all_of_it_is_labelled_quality_is_agreement() -> None:
    agreement = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92]
    measured = [Quality(value) for value in agreement]
    assert of_quality(measured).relative_quality == pytest.approx(agreement)
    assert of_quality([Quality(1.0, top1=0.8), *measured[1:]]).relative_quality == pytest.approx(agreement)


@pytest.mark.parametrize("missing", [0, 4, 8])
def test_quality_not_measured_at_every_level_is_not_known(missing: int) -> None:
    model = of_quality([Quality(1.0) if i != missing else None for i in range(9)])
    assert model.relative_quality is None


def test_quality_not_known_is_assumed_to_fall_as_was_published(spec: ModelSpec) -> None:
    """ViT-B/16's own loses 4.19 of 84.57 points at r = 16; another model's is read off at the work it leaves."""
    published = hosted(on_meta("vit_base_patch16_224"), 224).assumed_quality
    assert published[0] == 1
    assert published[-1] == pytest.approx(80.38 / 84.57, abs=0.003)
    for model in (hosted(on_meta("vit_tiny_patch16_384"), 384), load(spec, torch.device("cpu")).info):
        assumed = model.assumed_quality
        assert len(assumed) == len(model.grid)
        assert assumed[0] == 1
        assert all(before > after for before, after in pairwise(assumed))
        assert assumed[-1] >= 80 / 84.57


def test_a_level_that_is_worth_nothing_makes_no_policy_divide_by_it() -> None:
    """Such a report is of a model that can't tell its classes: it is shown, and not gone by."""
    model = of_quality([Quality(1.0 - i / 8, top1=0.5 - i / 16) for i in range(9)])
    assert model.relative_quality is not None
    assert model.relative_quality[-1] == 0
    assert min(model.assumed_quality) > 0
    assert of_quality([Quality(1.0, top1=0.0)] * 9).relative_quality is None
