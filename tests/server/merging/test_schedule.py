"""Schedules: shapes, totals, bounds and errors."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.server.merging.small_models import KINDS
from tome_server.merging import Schedule, merge, tokens_per_block

rs = st.integers(0, 200)
depths = st.integers(1, 48)
inflects = st.floats(-1, 1)


@given(rs, depths)
def test_constant_gives_the_same_r_to_every_block(r: int, depth: int) -> None:
    assert Schedule.constant(r).per_block(depth) == (r,) * depth


@given(rs, st.integers(0, 60), depths)
def test_constant_may_start_later(r: int, start: int, depth: int) -> None:
    values = Schedule.constant(r, start).per_block(depth)
    assert values == (0,) * min(start, depth) + (r,) * max(0, depth - start)


@given(rs, inflects, depths)
def test_linear_merges_as_many_in_all_as_constant(r: int, inflect: float, depth: int) -> None:
    values = Schedule.linear(r, inflect).per_block(depth)
    assert len(values) == depth
    assert all(isinstance(value, int) for value in values)
    assert sum(values) == r * depth


@given(rs, inflects, st.integers(2, 48))
def test_linear_is_within_one_of_the_line(r: int, inflect: float, depth: int) -> None:
    for i, value in enumerate(Schedule.linear(r, inflect).per_block(depth)):
        line = r * (1 + inflect * (2 * i / (depth - 1) - 1))
        assert abs(value - line) <= 1 + 1e-6
        assert 0 <= value <= 2 * r


@given(rs, depths)
def test_linear_without_inflection_is_constant(r: int, depth: int) -> None:
    assert Schedule.linear(r, 0.0).per_block(depth) == (r,) * depth


@given(rs, st.integers(2, 48))
def test_linear_falls_by_default_and_rises_for_inflect_1(r: int, depth: int) -> None:
    falling = Schedule.linear(r).per_block(depth)
    assert falling == Schedule.linear(r, -1.0).per_block(depth)
    assert abs(falling[0] - 2 * r) <= 1
    assert falling[-1] <= 1
    rising = Schedule.linear(r, 1.0).per_block(depth)
    assert rising[0] <= 1
    assert abs(rising[-1] - 2 * r) <= 1
    assume(r >= 2)
    assert falling[0] > falling[-1]
    assert rising[0] < rising[-1]


def test_linear_in_figures() -> None:
    assert Schedule.linear(8, -1.0).per_block(5) == (16, 12, 8, 4, 0)
    assert Schedule.linear(8, 1.0).per_block(5) == (0, 4, 8, 12, 16)
    assert Schedule.linear(8, 0.5).per_block(5) == (4, 6, 8, 10, 12)
    assert Schedule.linear(8, -1.0).per_block(1) == (8,)


@given(st.lists(rs, min_size=1, max_size=48))
def test_explicit_gives_what_it_was_given(values: list[int]) -> None:
    assert Schedule.explicit(values).per_block(len(values)) == tuple(values)


def test_explicit_keeps_its_values_when_the_list_changes() -> None:
    values = [1, 2, 3]
    schedule = Schedule.explicit(values)
    values[0] = 99
    assert schedule.per_block(3) == (1, 2, 3)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_explicit_of_another_length_than_the_model_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=r"3.*\b" + str(depth)):
        Schedule.explicit([1, 2, 3]).per_block(depth)


@pytest.mark.parametrize("wrong", [-1, -100])
def test_negative_r_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=str(wrong)):
        Schedule.constant(wrong)
    with pytest.raises(ValueError, match=f"start.*{wrong}"):
        Schedule.constant(3, wrong)
    with pytest.raises(ValueError, match=str(wrong)):
        Schedule.linear(wrong)
    with pytest.raises(ValueError, match=str(wrong)):
        Schedule.explicit([3, wrong, 2])


@pytest.mark.parametrize("wrong", [-1.01, 1.5, float("nan"), float("inf")])
def test_inflect_outside_its_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="inflect"):
        Schedule.linear(4, wrong)


@pytest.mark.parametrize("wrong", [1.5, "8", None])
def test_r_that_is_no_integer_is_refused(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Schedule.constant(wrong)  # type: ignore[arg-type]


@given(st.integers(1, 700), st.integers(0, 6), st.lists(rs, min_size=1, max_size=48))
def test_tokens_never_grow_nor_fall_below_one_patch_and_the_prefix(
    patches: int, prefix: int, per_block: list[int]
) -> None:
    counts = tokens_per_block(patches, prefix, per_block)
    assert len(counts) == len(per_block)
    before = patches + prefix
    for r, after in zip(per_block, counts, strict=True):
        assert before - after == min(r, (before - prefix) // 2)
        assert after >= prefix + 1
        before = after


def test_tokens_per_block_in_figures() -> None:
    assert tokens_per_block(196, 1, (16,) * 12) == (*(181, 165, 149, 133, 117, 101, 85, 69, 53, 37), *(21, 11))
    assert tokens_per_block(7, 5, (99,) * 4) == (9, 7, 6, 6)


SCHEDULES = [
    Schedule.constant(7),
    Schedule.constant(7, start=1),
    Schedule.linear(7),
    Schedule.linear(7, 1.0),
    Schedule.explicit([0, 20, 3]),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_model_merges_what_its_schedule_says(schedule: Schedule) -> None:
    kind = KINDS["registers"]
    out = merge(kind.build())(kind.images(1), r=schedule)
    assert out.tokens_per_block == (tokens_per_block(64, 5, schedule.per_block(3)),)


def test_an_int_is_a_constant_schedule() -> None:
    kind = KINDS["class token"]
    merged, images = merge(kind.build()), kind.images(1)
    assert torch.equal(merged(images, r=6).logits, merged(images, r=Schedule.constant(6)).logits)
    assert torch.equal(merged(images, r=6).logits, merged(images, r=Schedule.explicit([6] * merged.depth)).logits)


def test_a_model_refuses_a_schedule_of_another_depth_and_a_negative_r() -> None:
    kind = KINDS["class token"]
    merged, images = merge(kind.build()), kind.images(1)
    with pytest.raises(ValueError, match=r"2.*3"):
        merged(images, r=Schedule.explicit([4, 4]))
    with pytest.raises(ValueError, match="-4"):
        merged(images, r=-4)
