"""The search for schedules: what it may propose, and that it finds what is better."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tome_server.calibration.schedule_search import PerBlock, SearchSpace, search
from tome_server.merging import tokens_per_block

DEPTH = 12


def work(patches: int, prefix: int, per_block: PerBlock) -> int:
    """Falls with every token merged, and the more the earlier it is."""
    return patches + prefix + sum(tokens_per_block(patches, prefix, per_block))


def room(patches: int, r: int, *, prefix: int = 1, free: int = DEPTH) -> SearchSpace:
    most = work(patches, prefix, (r,) * DEPTH)
    rest = (r,) * (DEPTH - free)
    return SearchSpace(patches, prefix, free, rest, lambda per_block: work(patches, prefix, per_block) <= most)


def tried(given: SearchSpace, better: Callable[[PerBlock], float] = lambda _: 0.0, **options: int) -> list[PerBlock]:
    """All schedules that a search runs; `better` is to be brought down."""
    ran: list[PerBlock] = []

    def judge(per_block: PerBlock) -> bool:
        best = min((better(other) for other in ran), default=float("inf"))
        ran.append(per_block)
        return better(per_block) < best

    search(given, judge, **{"blocks": 4, "trials": 40, "seed": 0, **options})
    return ran


sizes = st.tuples(st.integers(4, 300), st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(size=sizes, r=st.integers(1, 20), blocks=st.integers(1, DEPTH), seed=st.integers(0, 9), last=st.booleans())
def test_whatever_is_tried_fits_and_can_be_merged_and_is_tried_once(
    size: tuple[int, int], r: int, blocks: int, seed: int, last: bool
) -> None:
    patches, prefix = size
    given = room(patches, r, prefix=prefix, free=DEPTH - last)
    ran = tried(given, blocks=blocks, trials=12, seed=seed)
    assert len(ran) == len(set(ran)) <= 12
    for per_block in ran:
        assert len(per_block) == DEPTH
        assert given.fits(per_block)
        counts = (patches + prefix, *tokens_per_block(patches, prefix, per_block))
        assert [before - after for before, after in pairwise(counts)] == list(per_block)
        assert min(counts) >= prefix + 1
        assert sum(own > 0 for own in per_block[: given.free]) <= blocks


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 16), weights=st.lists(st.floats(0, 1), min_size=DEPTH, max_size=DEPTH))
def test_a_filled_schedule_merges_nothing_that_it_need_not(r: int, weights: list[float]) -> None:
    given = room(196, r)
    made = given.fill(weights)
    if made is None:
        return
    for block, own in enumerate(made):
        if own:
            less = (*made[:block], own - 1, *made[block + 1 :])
            assert not given.fits(less)


def test_equal_weights_make_a_constant_r() -> None:
    assert room(196, 8).fill([1.0] * DEPTH) == (8,) * DEPTH


def test_what_cannot_merge_enough_makes_none() -> None:
    assert room(196, 14).fill([0.0] * 11 + [1.0]) is None
    assert room(196, 14).fill([0.0] * DEPTH) is None
    assert tried(room(196, 14), blocks=1, trials=5) != []  # by the first block or the second alone


@pytest.mark.parametrize("block", [0, 3, 5])
def test_moves_find_the_block_that_loses_least(block: int) -> None:
    def lost(per_block: PerBlock) -> float:
        return sum(own for i, own in enumerate(per_block) if i != block) - per_block[block]

    ran = tried(room(196, 6), lost, blocks=4, trials=80)
    best = min(ran, key=lost)
    assert lost(best) < min(lost(start) for start in ran[:12])
    assert best[block] == max(best)


def test_the_same_seed_tries_the_same_and_another_does_not() -> None:
    assert tried(room(196, 8), seed=3) == tried(room(196, 8), seed=3)
    assert tried(room(196, 8), seed=3) != tried(room(196, 8), seed=4)


def test_a_start_is_scaled_to_the_room() -> None:
    first = tried(room(196, 4), trials=1, start=(0, 40, 0, 0, 40, 0, 0, 40, 0, 0, 0, 0))[0]
    assert [block for block, own in enumerate(first) if own] == [1, 4, 7]
    assert 0 < max(first) < 40
    assert max(first) - min(own for own in first if own) <= 2
