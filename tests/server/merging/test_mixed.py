"""Images of one batch that merge differently: each gets what it gets alone."""

import sys
import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.server.merging.outputs import equal
from tests.server.merging.small_models import DEPTH, KINDS, Kind, each_kind, typical_kinds
from tome_server.merging import MergedModel, MergedOutput, Schedule, merge, pack

SCHEDULES = (Schedule.linear(8), Schedule.linear(5, 1.0), Schedule.explicit([0, 20, 3]), Schedule.constant(4))

r_or_schedule = st.one_of(st.sampled_from([0, 4, 9, 1000]), st.integers(0, 40), st.sampled_from(SCHEDULES))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def assert_as_alone(
    merged: MergedModel, images: Tensor, rs: Sequence[int | Schedule], out: MergedOutput, tolerance: float = 1e-9
) -> None:
    """Compare every field with what each image gives alone; what is past an image's own tokens is zero."""
    assert len(out.logits) == len(out.features) == len(out.tokens_per_block) == len(images)
    for i, r in enumerate(rs):
        alone = merged(images[i : i + 1], r, return_tokens=out.tokens is not None, return_token_map=True)
        close(out.logits[i], alone.logits[0], tolerance)
        close(out.features[i], alone.features[0], tolerance)
        assert out.tokens_per_block[i] == alone.tokens_per_block[0]
        count = alone.tokens_per_block[0][-1]
        if out.tokens is not None:
            close(out.tokens[i, :count], alone.tokens[0], tolerance)
            assert not out.tokens[i, count:].any()
        if out.sizes is not None:
            assert torch.equal(out.sizes[i, :count], alone.sizes[0])
            assert not out.sizes[i, count:].any()
        if out.token_map is not None:
            assert torch.equal(out.token_map[i], alone.token_map[0])


@each_kind
def test_each_image_gets_what_it_gets_alone(kind: Kind) -> None:
    model = kind.build()
    merged, images = merge(model), kind.images(5)
    rs = [9, 0, Schedule.explicit([3] * len(model.blocks)), 9, 1000]
    with torch.no_grad():
        assert_as_alone(merged, images, rs, merged(images, rs))
        assert_as_alone(merged, images, rs, merged(images, rs, return_tokens=True))
        assert_as_alone(merged, images, rs, merged(images, rs, return_tokens=True, return_token_map=True))


@typical_kinds
def test_packed_weights_give_it_too(kind: Kind) -> None:
    merged = merge(kind.build(dtype=torch.float32).requires_grad_(False))
    images, rs = kind.images(4, dtype=torch.float32), [7, 0, 3, 7]
    with torch.inference_mode():
        close(pack(merged)(images, rs).logits, merged(images, rs).logits, 1e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_rs_are(data: st.DataObject) -> None:
    three_deep = [name for name, kind in KINDS.items() if (kind.options or {}).get("depth", DEPTH) == DEPTH]
    kind = KINDS[data.draw(st.sampled_from(three_deep))]
    rs = data.draw(st.lists(r_or_schedule, min_size=1, max_size=6))
    tokens, token_map = data.draw(st.booleans()), data.draw(st.booleans())
    merged, images = merge(kind.build()), kind.images(len(rs))
    with torch.no_grad():
        out = merged(images, rs, return_tokens=tokens, return_token_map=token_map)
        assert_as_alone(merged, images, rs, out)
    assert (out.tokens is not None, out.token_map is not None) == (tokens, token_map)
    assert (out.sizes is not None) == (tokens or token_map)


@pytest.mark.parametrize("name", ["class token", "map pool beside prefix", "distilled", "avgmax pool"])
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)))
def test_a_permutation_of_the_batch_permutes_the_output(name: str, order: list[int]) -> None:
    kind = KINDS[name]
    merged, images, rs = merge(kind.build()), kind.images(5), [0, 11, 4, 11, 0]
    with torch.no_grad():
        expected = merged(images, rs, return_tokens=True, return_token_map=True)
        permuted = merged(images[order], [rs[i] for i in order], return_tokens=True, return_token_map=True)
    for field in ("logits", "features", "tokens", "sizes"):
        close(getattr(permuted, field), getattr(expected, field)[order], 1e-9)
    assert torch.equal(permuted.token_map, expected.token_map[order])
    assert permuted.tokens_per_block == tuple(expected.tokens_per_block[i] for i in order)


@pytest.mark.parametrize("name", ["class token", "avg pool", "gate, all norms"])
def test_images_that_turn_out_alike_are_computed_as_by_one_r(name: str) -> None:
    kind = KINDS[name]
    merged, images = merge(kind.build(dtype=torch.float32)), kind.images(3, dtype=torch.float32)
    with torch.inference_mode():
        one, each = merged(images, 6), merged(images, [6, Schedule.constant(6), Schedule.explicit([6] * DEPTH)])
    assert torch.equal(each.logits, one.logits)
    assert torch.equal(each.features, one.features)
    assert each.tokens_per_block == one.tokens_per_block


@pytest.mark.parametrize("rs", [[], [3], [3, 3, 3], [0, 1, 2, 3]])
def test_another_number_of_rs_than_images_is_refused(rs: list[int]) -> None:
    kind = KINDS["class token"]
    with pytest.raises(ValueError, match=rf"\b2\b.*\b{len(rs)}\b"):
        merge(kind.build())(kind.images(2), rs)


@pytest.mark.parametrize("wrong", [-1, Schedule.explicit([1, 2]), 1.5, True, "3"])
def test_one_wrong_r_is_refused(wrong: object) -> None:
    kind = KINDS["class token"]
    with pytest.raises((TypeError, ValueError)):
        merge(kind.build())(kind.images(2), [3, wrong])


def test_in_training_mode_only_one_r_is_taken() -> None:
    kind = KINDS["class token"]
    merged, images = merge(kind.build().train()), kind.images(2)
    assert merged(images, [3, 3]).logits.shape == (2, 7)
    with pytest.raises(ValueError, match="eval mode"):
        merged(images, [3, 4])


def test_gradients_are_those_of_each_image_alone() -> None:
    kind = KINDS["registers"]
    model, images, rs = kind.build(), kind.images(3), [0, 8, 3]
    merge(model)(images, rs).logits.square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for image, r in zip(images, rs, strict=True):
        merge(model)(image[None], r).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        close(together[name], parameter.grad, 1e-8)


@pytest.mark.parametrize("name", ["class token", "map pool", "registers"])
def test_threads_with_different_rs_do_not_disturb_each_other(name: str) -> None:
    kind = KINDS[name]
    merged = merge(kind.build(dtype=torch.float32).requires_grad_(False))
    merged = pack(merged)
    batches = [
        (kind.images(4, dtype=torch.float32, seed=seed), rs) for seed, rs in ((1, [9, 0, 4, 9]), (2, [1, 2, 3, 0]))
    ]

    def call(which: int) -> MergedOutput:
        images, rs = batches[which]
        with torch.inference_mode():
            return merged(images, rs, return_tokens=True, return_token_map=True)

    alone = [call(which) for which in range(2)]
    start = threading.Barrier(2)
    wrong: list[str] = []

    def hammer(which: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        wrong.extend(
            f"batch {which}, attempt {attempt}" for attempt in range(30) if not equal(call(which), alone[which])
        )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hammer, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
