"""Schedules of a model's own: what it merges at an r, and which it refuses."""

import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tome_server.merging import Schedule, macs, merge
from tome_server.models.loaded import LoadedModel, loaded_model, with_schedules
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings

DEPTH, PATCHES = 3, 64


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """64 patches, three blocks, random weights."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=DEPTH, num_heads=2, num_classes=5
    )
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    image = ImageSettings((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    return loaded_model(
        merge(network.eval().requires_grad_(False)), Preprocess(image, Limits()), name="m", architecture="vit"
    )


def total(model: LoadedModel, per_block: tuple[int, ...]) -> int:
    return macs(model.merged.model, Schedule.explicit(per_block), (32, 32)).total


def of_equal_work(model: LoadedModel, r: int) -> list[tuple[int, ...]]:
    """All schedules that take no more than r in every block, and no less than r + 1."""
    least, most = total(model, (r + 1,) * DEPTH), total(model, (r,) * DEPTH)
    every = itertools.product(range(PATCHES // 2 + 1), range(17), range(17))
    return [values for values in every if sum(values) <= 4 * r + 4 and least <= total(model, values) <= most]


@pytest.fixture(scope="module")
def others(model: LoadedModel) -> list[tuple[int, ...]]:
    return of_equal_work(model, 6)


def test_a_model_merges_at_an_r_what_its_schedule_says_and_r_in_every_block_elsewhere(
    model: LoadedModel, others: list[tuple[int, ...]]
) -> None:
    own = max(others)  # as early as can be
    assert own != (6,) * DEPTH
    tuned, images = with_schedules(model, {6: own}), torch.rand(2, 3, 32, 32)
    given = tuned.run(images, [6, 8], return_token_map=True)
    assert given.tokens_per_block == (tuned.info.cost(6).tokens, model.info.cost(8).tokens)
    for i, how in enumerate((Schedule.explicit(own), 8)):
        alone = model.merged(images[i : i + 1], how, return_token_map=True)
        assert torch.allclose(given.logits[i], alone.logits[0], atol=1e-5)
    assert torch.equal(tuned.run(images, 6).logits, model.merged(images, Schedule.explicit(own)).logits)
    assert torch.equal(tuned.run(images).logits, model.merged(images, 0).logits)


def test_what_an_r_costs_is_what_its_schedule_costs(model: LoadedModel, others: list[tuple[int, ...]]) -> None:
    tuned = with_schedules(model, {6: others[0]})
    assert tuned.info.cost(6) == macs(model.merged.model, Schedule.explicit(others[0]), (32, 32)) != model.info.cost(6)
    assert [tuned.info.cost(r) for r in (0, 5, 7)] == [model.info.cost(r) for r in (0, 5, 7)]
    assert tuned.info.rs == model.info.rs
    assert [level.r for level in tuned.info.grid] == [level.r for level in model.info.grid]
    assert tuned.info.schedules == {6: others[0]}
    totals = [tuned.info.cost(r).total for r in range(1, tuned.info.largest_r + 1)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("r", [1, 6, 8])
def test_r_in_every_block_written_down_is_that_r(model: LoadedModel, r: int) -> None:
    written, images = with_schedules(model, {r: [r] * DEPTH}), torch.rand(2, 3, 32, 32)
    assert written.info.cost(r) == model.info.cost(r)
    assert torch.equal(written.run(images, r).logits, model.run(images, r).logits)


@settings(max_examples=200, deadline=None)
@given(r=st.integers(-1, 40), values=st.lists(st.integers(0, 40), min_size=DEPTH, max_size=DEPTH))
def test_what_is_taken_never_costs_more_than_its_r_nor_merges_more_than_there_is(
    model: LoadedModel, r: int, values: list[int]
) -> None:
    try:
        tuned = with_schedules(model, {r: values})
    except ValueError:
        return
    cost = tuned.info.cost(r)
    assert cost.total <= model.info.cost(r).total
    assert min(cost.tokens) >= model.merged.prefix + 1
    before = (cost.tokens_in, *cost.tokens[:-1])
    assert [more - less for more, less in zip(before, cost.tokens, strict=True)] == values


@pytest.mark.parametrize(
    ("r", "values", "error"),
    [
        (6, [6, 6], r"2 values.* 3 blocks"),
        (6, [6, 6, 6, 6], r"4 values.* 3 blocks"),
        (6, [], "one r for each block"),
        (6, [5, 6, 6], r"r = 6 takes [\d,]+ multiply-accumulates, not [\d,]+ to [\d,]+"),
        (6, [8, 8, 8], "multiply-accumulates, not"),
        (6, [33, 0, 0], "r = 6 can't merge 33 of 65 tokens in block 0"),
        (6, [20, 23, 0], "r = 6 can't merge 23 of 45 tokens in block 1"),
        (0, [0, 0, 0], "an r of 1 to 32, not 0"),
        (33, [32, 16, 8], "an r of 1 to 32, not 33"),
        (6, [6, -1, 6], "-1"),
    ],
)
def test_a_schedule_that_is_not_for_this_model_or_r_is_refused(
    model: LoadedModel, r: int, values: list[int], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        with_schedules(model, {r: values})


@pytest.mark.parametrize("values", [[6, 6, 6.0], ["6", 6, 6], [6, True, 6], 6])
def test_a_schedule_that_is_no_list_of_whole_numbers_is_refused(model: LoadedModel, values: object) -> None:
    with pytest.raises(TypeError):
        with_schedules(model, {6: values})  # type: ignore[dict-item]
