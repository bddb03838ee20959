"""What a request's settings allow, who decides within that, and what stands in for what was never measured."""

import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
import torch

from tome_server.api.rpc.convert import model_to
from tome_server.config.model_overrides import ModelOverrides
from tome_server.errors import ConfigError, InvalidRequestError
from tome_server.merging import merge
from tome_server.models.loaded import loaded_model
from tome_server.models.model_info import ModelInfo, Quality
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings
from tome_server.scheduling.profile import Latency, Profile
from tome_server.serving.served import Bounds, ServedModel

RS = (0, 2, 4, 6, 8, 10, 12, 14, 16)
LARGEST = 98
# Of r = 0, with a dip at r = 8 that r = 10 doesn't have.
MEASURED = (1.0, 1.002, 0.999, 0.995, 0.985, 0.992, 0.98, 0.97, 0.95)
PROFILE = Profile(
    sizes=(1, 8),
    rs=RS,
    p50=tuple(tuple(0.001 * (1 + size * (1 - r / 32)) for r in RS) for size in (1, 8)),
    p95=tuple(tuple(0.0012 * (1 + size * (1 - r / 32)) for r in RS) for size in (1, 8)),
)


@pytest.fixture(scope="module")
def unmeasured() -> ModelInfo:
    """ViT-B/16 without memory: its costs are all that is needed."""
    with torch.device("meta"):
        network = timm.create_model("vit_base_patch16_224")
    settings = ImageSettings((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    model = loaded_model(
        merge(network), Preprocess(settings, Limits()), name="vit", architecture="vit_base_patch16_224"
    )
    return model.info


@pytest.fixture(scope="module")
def measured(unmeasured: ModelInfo) -> ModelInfo:
    top1 = {r: Quality(agreement=0.5, top1=0.8 * share) for r, share in zip(RS, MEASURED, strict=True)}
    return replace(unmeasured, quality=top1)


@pytest.fixture(scope="module")
def served(measured: ModelInfo) -> ServedModel[object]:
    return ServedModel(measured, PROFILE, "price")


# Bounds


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, Bounds(0, 8)),
        ({"min_r": 0, "max_r": LARGEST}, Bounds(0, 8)),
        ({"min_r": 4}, Bounds(2, 8)),
        ({"max_r": 4}, Bounds(0, 2)),
        ({"max_r": 0}, Bounds(0, 0)),
        ({"min_r": 8, "max_r": 8}, Bounds(4, 4)),
    ],
    ids=str,
)
def test_bounds_are_levels_of_the_grid(served: ServedModel[object], settings: dict[str, int], bounds: Bounds) -> None:
    assert served.bounds(**settings) == bounds


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [({"min_r": 3}, Bounds(2, 8)), ({"max_r": 5}, Bounds(0, 2)), ({"min_r": 1, "max_r": 7}, Bounds(1, 3))],
    ids=str,
)
def test_bounds_between_levels_keep_to_those_within(
    served: ServedModel[object], settings: dict[str, int], bounds: Bounds
) -> None:
    assert served.bounds(**settings) == bounds


@pytest.mark.parametrize(
    ("settings", "r", "level"),
    [
        ({"min_r": 3, "max_r": 3}, 3, 1),
        ({"min_r": 17}, 17, 8),
        ({"min_r": 17, "max_r": 50}, 17, 8),
        ({"min_r": LARGEST}, LARGEST, 8),
    ],
    ids=str,
)
def test_bounds_without_a_level_take_the_least_r_they_allow(
    served: ServedModel[object], settings: dict[str, int], r: int, level: int
) -> None:
    """It is expected to take as long as the level below, which is the dearer neighbour."""
    assert served.bounds(**settings) == Bounds(level, level, r)


@pytest.mark.parametrize("r", [0, 1, 2, 3, 15, 16, 17, 50, LARGEST])
def test_an_r_that_is_named_is_run_exactly_on_the_grid_or_off_it(served: ServedModel[object], r: int) -> None:
    bounds = served.bounds(r=r)
    assert bounds.exact == r
    assert bounds.low == bounds.high
    assert RS[bounds.low] <= r
    assert bounds.low == len(RS) - 1 or r < RS[bounds.low + 1]


@pytest.mark.parametrize(
    ("min_quality", "most"),
    [
        (1.0, 2),  # more than at r = 0 is enough as well
        (0.999, 4),
        (0.99, 6),  # r = 10 would keep it, and r = 8, on the way there, would not
        (0.985, 10),
        (0.96, 14),
        (0.95, 16),
        (1e-9, 16),
    ],
)
def test_the_least_quality_bounds_r_to_where_every_smaller_r_keeps_it(
    served: ServedModel[object], min_quality: float, most: int
) -> None:
    assert served.bounds(min_quality=min_quality) == Bounds(0, RS.index(most))
    assert served.bounds(min_quality=min_quality, max_r=1) == Bounds(0, 0)
    assert served.bounds(min_quality=min_quality, max_r=LARGEST) == Bounds(0, RS.index(most))
    assert served.bounds(min_quality=min_quality, r=most).exact == most


@pytest.mark.parametrize(
    ("settings", "field", "says"),
    [
        ({"r": -1}, "r", "must lie in 0..98 for vit, and is -1"),
        ({"min_r": 99}, "min_r", "must lie in 0..98 for vit, and is 99"),
        ({"max_r": 99}, "max_r", "must lie in 0..98 for vit, and is 99"),
        ({"min_r": 5, "max_r": 4}, "min_r", "is 5, more than max_r, which is 4"),
        ({"r": 3, "min_r": 4}, "r", "is 3, outside of min_r..max_r, which is 4..16"),
        ({"r": 8, "max_r": 4}, "r", "is 8, outside of min_r..max_r, which is 0..4"),
        ({"min_quality": 0.0}, "min_quality", "must lie above 0 and up to 1, and is 0"),
        ({"min_quality": -0.5}, "min_quality", "must lie above 0 and up to 1, and is -0.5"),
        ({"min_quality": 1.01}, "min_quality", "must lie above 0 and up to 1, and is 1.01"),
        ({"min_quality": 99.0}, "min_quality", "must lie above 0 and up to 1, and is 99"),
        ({"min_quality": math.nan}, "min_quality", "must lie above 0 and up to 1, and is nan"),
        ({"min_quality": math.inf}, "min_quality", "must lie above 0 and up to 1, and is inf"),
        ({"min_quality": 0.99, "r": 8}, "min_quality", "is 0.99, which needs r ≤ 6; asked is ≥ 8"),
        ({"min_quality": 0.99, "min_r": 7}, "min_quality", "is 0.99, which needs r ≤ 6; asked is ≥ 7"),
        # Of what lies between two levels, and beyond the last, nothing is known.
        ({"min_quality": 0.99, "r": 7}, "min_quality", "is 0.99, which needs r ≤ 6; asked is ≥ 7"),
        ({"min_quality": 0.1, "r": 17}, "min_quality", "is 0.1, which needs r ≤ 16; asked is ≥ 17"),
    ],
    ids=str,
)
def test_what_is_out_of_range_or_contradicts_itself_names_the_field(
    served: ServedModel[object], settings: dict[str, float], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        served.bounds(**settings)
    assert (caught.value.field, caught.value.description) == (field, says)


def test_every_setting_in_range_gives_bounds_that_hold_it(served: ServedModel[object]) -> None:
    for least in range(20):
        for most in range(least, 22):
            bounds = served.bounds(min_r=least, max_r=most)
            rs = [bounds.exact] if bounds.exact is not None else served.rs[bounds.low : bounds.high + 1]
            assert rs
            assert all(least <= r <= most for r in rs)


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, Bounds(4, 4)),
        ({"max_r": 5}, Bounds(2, 2)),
        ({"min_r": 11}, Bounds(6, 6)),
        ({"min_quality": 0.99}, Bounds(3, 3)),
        ({"r": 3}, Bounds(1, 1, 3)),
        ({"r": 16}, Bounds(8, 8, 16)),
    ],
    ids=str,
)
def test_under_a_fixed_policy_nothing_else_is_admitted_for(
    measured: ModelInfo, settings: dict[str, float], bounds: Bounds
) -> None:
    served: ServedModel[object] = ServedModel(measured, PROFILE, "fixed:8")
    assert served.bounds(**settings) == bounds


# Quality that was never measured


def test_a_least_quality_of_what_was_never_measured_is_refused(unmeasured: ModelInfo) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ServedModel(unmeasured, PROFILE, "price").bounds(min_quality=0.5)
    assert str(caught.value) == "min_quality: the quality of vit was never measured"


def test_quality_never_measured_is_assumed_to_fall_and_nowhere_shown(
    unmeasured: ModelInfo, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        served = ServedModel(unmeasured, PROFILE, "price")
    assert "the quality of vit was never measured: see tome-server evaluate" in caplog.text
    assert unmeasured.relative_quality is None
    assumed = unmeasured.assumed_quality
    assert assumed[0] == 1
    assert all(before > after > 0 for before, after in pairwise(assumed))
    for level in model_to(served).r_grid:
        assert not level.HasField("top1")
        assert not level.HasField("agreement")


def test_quality_measured_is_what_policies_go_by(measured: ModelInfo, caplog: pytest.LogCaptureFixture) -> None:
    ServedModel(measured, PROFILE, "price")
    assert measured.assumed_quality == measured.relative_quality == pytest.approx(MEASURED)
    assert "never measured" not in caplog.text


# The policy and the default budget


@pytest.mark.parametrize("name", ["price", "fixed:0", "fixed:8", "fixed:16", "max_accuracy", "max_batch", "slackfit"])
def test_every_policy_can_be_named(measured: ModelInfo, name: str) -> None:
    served: ServedModel[object] = ServedModel(measured, PROFILE, name)
    assert served.policy == name
    assert len(served.scheduler) == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cheapest", "'cheapest' is no policy; there are price, fixed:R, max_accuracy, max_batch, slackfit"),
        ("", "'' is no policy; there are price, fixed:R, max_accuracy, max_batch, slackfit"),
        ("fixed", "'fixed' is no policy; there are "),
        ("price:3", "'price:3' is no policy; there are "),
        ("fixed:-1", "'fixed:-1' is no policy; there are "),
        ("fixed:3", "fixed:3: the model is served at r = 0, 2, 4, 6, 8, 10, 12, 14, 16"),
        ("fixed:98", "fixed:98: the model is served at r = 0, "),
    ],
)
def test_a_policy_that_there_is_not_is_said_in_a_sentence(measured: ModelInfo, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServedModel(measured, PROFILE, name)
    assert str(caught.value).startswith(f"policy, for model vit: {says}")


def test_the_default_budget_is_as_set_or_what_the_model_needs(measured: ModelInfo) -> None:
    def budget(model: ModelInfo, profile: Profile = PROFILE) -> float:
        return ServedModel(model, profile, "price").default_budget

    assert budget(replace(measured, default_budget=0.25)) == 0.25
    assert budget(measured) == 1.0
    slow = replace(PROFILE, p95=tuple(tuple(0.5 for _ in row) for row in PROFILE.p95))
    assert budget(measured, slow) == 5.0


# Another profile


def test_another_profile_takes_the_place_of_the_one_that_it_was_served_with(measured: ModelInfo) -> None:
    slow = replace(PROFILE, p95=tuple(tuple(0.5 for _ in row) for row in PROFILE.p95))
    model: ServedModel[object] = ServedModel(measured, slow, "fixed:4")
    model.scheduler.latency.allow(3)
    assert model.default_budget == 5.0
    latency = Latency(PROFILE)
    latency.observe([0], 2 * PROFILE.p50[0][0])
    model.adopt(PROFILE, latency)
    assert model.profile is PROFILE
    assert model.scheduler.latency is latency
    assert model.default_budget == 1.0
    # What memory was found to be too little for stays out, and a fixed policy stays fixed.
    assert latency.max_batch == 3
    assert model.bounds() == Bounds(2, 2)


# What a model's own settings say


def with_own(model: ModelInfo, **settings: object) -> ServedModel[object]:
    return ServedModel(
        model, PROFILE, "price", overrides=ModelOverrides(**settings), file=Path("models/vit/config.yaml")
    )


def test_a_models_own_policy_takes_the_place_of_the_servers(measured: ModelInfo) -> None:
    assert with_own(measured, policy="fixed:4").policy == "fixed:4"
    assert with_own(measured).policy == "price"


def test_defaults_hold_for_requests_that_say_nothing_of_merging(measured: ModelInfo) -> None:
    model = with_own(measured, default_min_r=2, default_max_r=6)
    assert model.bounds() == Bounds(1, 3)
    # Of whoever says something, they say nothing.
    assert model.bounds(max_r=16) == Bounds(0, 8)
    assert model.bounds(min_r=8) == Bounds(4, 8)
    assert model.bounds(r=10) == Bounds(5, 5, 10)
    assert with_own(measured, default_min_quality=0.99).bounds() == model.bounds(min_quality=0.99) == Bounds(0, 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": "fixed:3"}, "policy: fixed:3: the model is served at r = 0, 2, "),
        ({"default_max_r": 99}, "default_max_r: must lie in 0..98 for vit, and is 99"),
        ({"default_min_r": 6, "default_max_r": 4}, "default_min_r: is 6, more than max_r, which is 4"),
        ({"default_min_r": 12, "default_min_quality": 0.99}, "default_min_quality: is 0.99, which needs r ≤ 6"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_refused_with_file_and_key(
    measured: ModelInfo, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_own(measured, **settings)
    assert str(caught.value).startswith(f"models/vit/config.yaml: {says}")


def test_a_default_quality_needs_one_that_was_measured(unmeasured: ModelInfo) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: default_min_quality: the quality of vit was never measured"):
        with_own(unmeasured, default_min_quality=0.9)
