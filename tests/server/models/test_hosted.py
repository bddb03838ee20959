from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from tome_server.merging import merge
from tome_server.models.hosted import LEAST_WORK, HostedModel, Quality
from tome_server.models.loading import ModelSpec, load
from tome_server.models.preprocess import ImageSettings, Limits, Preprocess


def hosted(model: nn.Module, size: int, **changes: object) -> HostedModel:
    settings = ImageSettings((3, size, size), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    return replace(
        HostedModel(
            name="model",
            architecture="vit",
            description="",
            merged=merge(model),
            preprocess=Preprocess(settings, Limits()),
            labels=(),
            default_r=0,
        ),
        **changes,
    )


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
    model = load(spec, torch.device("cpu"))
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
    model = load(spec, torch.device("cpu"))
    assert model.patch_grid == (4, 4)
    assert model.largest_r == 8
    assert model.cost(9).tokens == model.cost(8).tokens
