"""`match` and `combine` against their definition, and against a reference in plain loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.server.merging import reference
from tome_server.merging import matching
from tome_server.merging.cpu import matching_c
from tome_server.merging.matching import Matching, add_by_product, combine

REAL_COUNTS = [(129, 1), (161, 1), (197, 1), (257, 5), (577, 1)]  # tokens, prefix

prefixes = st.integers(0, 6)
seeds = st.integers(0, 2**31)
kinds = st.sampled_from(["random", "ties", "copies"])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(tokens, prefix, r), r also beyond what can be merged."""
    prefix = draw(prefixes)
    tokens = prefix + draw(st.integers(1, 60))
    return tokens, prefix, draw(st.integers(0, tokens))


def match(metric: Tensor, r: int, prefix: int) -> Matching:
    """Match by one head's keys."""
    return matching.match(metric.unsqueeze(1), r, prefix)


def metric_of(kind: str, batch: int, tokens: int, seed: int) -> Tensor:
    """Metrics whose cosines are well apart or, unless "random", often equal to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    if kind == "copies":  # the same direction at other lengths, and zeros, which have none
        directions = torch.eye(4, dtype=torch.float64)[:1].expand(tokens, 4)
        lengths = torch.randint(0, 3, (batch, tokens, 1), generator=generator)
        return directions * lengths * 2.0
    chosen = torch.randint(0, 4, (batch, tokens), generator=generator)
    return torch.eye(4, dtype=torch.float64)[chosen]


def contents(metric: Tensor, r: int, prefix: int) -> list[list[list[int]]]:
    """For each image, the input positions in each output token, found through `combine` alone."""
    batch, tokens, _ = metric.shape
    identity = torch.eye(tokens, dtype=torch.float64).expand(batch, tokens, tokens)
    ones = torch.ones(batch, tokens, dtype=torch.float64)
    x, size = combine(identity, ones, match(metric, r, prefix))
    assert torch.equal((x > 0).sum(dim=2).to(size.dtype), size)
    return [[row.nonzero().flatten().tolist() for row in image] for image in x]


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_groups_and_their_order_are_those_of_the_reference(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    tokens, prefix, r = shape
    metric = metric_of(kind, 2, tokens, seed)
    for image, groups in zip(metric, contents(metric, r, prefix), strict=True):
        expected = reference.match(image.numpy(), r, prefix)
        assert groups == [sorted(group) for group in expected]


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_groups_are_those_of_the_reference_at_real_token_counts(tokens: int, prefix: int, kind: str) -> None:
    metric = metric_of(kind, 1, tokens, seed=tokens)
    (groups,) = contents(metric, 16, prefix)
    assert groups == [sorted(group) for group in reference.match(metric[0].numpy(), 16, prefix)]


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_every_token_goes_to_exactly_one_and_r_are_merged_as_far_as_can_be(
    shape: tuple[int, int, int], kind: str, seed: int
) -> None:
    tokens, prefix, r = shape
    for groups in contents(metric_of(kind, 2, tokens, seed), r, prefix):
        assert sorted(i for group in groups for i in group) == list(range(tokens))
        assert len(groups) == tokens - min(r, (tokens - prefix) // 2)


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_prefix_tokens_come_first_alone_and_unchanged(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    tokens, prefix, r = shape
    metric = metric_of(kind, 2, tokens, seed)
    x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))
    size = torch.ones(2, tokens)
    merged, sizes = combine(x, size, match(metric, r, prefix))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(sizes[:, :prefix], size[:, :prefix])
    for groups in contents(metric, r, prefix):
        assert groups[:prefix] == [[i] for i in range(prefix)]


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_only_sources_move_and_each_to_its_best_destination(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    tokens, prefix, r = shape
    metric = metric_of(kind, 1, tokens, seed)
    unit = torch.nn.functional.normalize(metric[0], dim=-1)
    for group in contents(metric, r, prefix)[0]:
        if len(group) == 1:
            continue
        odd = [i for i in group if i % 2 == 1]
        assert len(odd) == 1
        for source in set(group) - set(odd):
            scores = unit[[i for i in range(prefix, tokens) if i % 2 == 1]] @ unit[source]
            assert unit[odd[0]] @ unit[source] >= scores.max() - 1e-12


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_merged_tokens_are_size_weighted_means_and_sizes_add_up_over_repeated_merging(
    shape: tuple[int, int, int], kind: str, seed: int
) -> None:
    tokens, prefix, r = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 3, generator=generator, dtype=torch.float64)
    original = x[0].numpy()
    size = torch.ones(1, tokens, dtype=torch.float64)
    members = [[i] for i in range(tokens)]
    for step in range(3):
        metric = metric_of(kind, 1, x.shape[1], seed + step)
        x, size = combine(x, size, match(metric, r, prefix))
        groups = reference.match(metric[0].numpy(), r, prefix)
        members = [[i for token in group for i in members[token]] for group in groups]

        assert size.sum().item() == tokens
        assert size[0].tolist() == [len(inside) for inside in members]
        means = np.stack([original[inside].mean(axis=0) for inside in members])
        np.testing.assert_allclose(x[0].numpy(), means, rtol=0, atol=1e-12)


@given(shapes(), seeds)
@settings(deadline=None)
def test_any_sizes_weigh_the_mean(shape: tuple[int, int, int], seed: int) -> None:
    tokens, prefix, r = shape
    generator = torch.Generator().manual_seed(seed)
    metric = metric_of("random", 2, tokens, seed)
    x = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 50, (2, tokens), generator=generator).double()
    merged, sizes = combine(x, size, match(metric, r, prefix))
    for i in range(2):
        groups = reference.match(metric[i].numpy(), r, prefix)
        expected, expected_sizes = reference.combine(x[i].numpy(), size[i].tolist(), groups)
        assert sizes[i].tolist() == expected_sizes
        np.testing.assert_allclose(merged[i].numpy(), expected, rtol=0, atol=1e-12)


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_images_of_a_batch_do_not_touch_each_other(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    tokens, prefix, r = shape
    metric = metric_of(kind, 4, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (4, tokens), generator=generator).double()
    merged, sizes = combine(x, size, match(metric, r, prefix))

    order = torch.randperm(4, generator=generator)
    shuffled, shuffled_sizes = combine(x[order], size[order], match(metric[order], r, prefix))
    assert torch.equal(shuffled, merged[order])
    assert torch.equal(shuffled_sizes, sizes[order])
    for i in range(4):
        alone, alone_size = combine(x[i : i + 1], size[i : i + 1], match(metric[i : i + 1], r, prefix))
        torch.testing.assert_close(alone[0], merged[i], rtol=0, atol=1e-12)
        assert torch.equal(alone_size[0], sizes[i])


@given(st.integers(0, 6), st.integers(1, 60), st.integers(0, 10**9), seeds)
@settings(deadline=None)
def test_r_is_clamped_at_half_of_the_tokens_that_are_not_prefix(
    prefix: int, patches: int, excess: int, seed: int
) -> None:
    tokens = prefix + patches
    metric = metric_of("random", 1, tokens, seed)
    most = patches // 2
    assert contents(metric, most + excess, prefix) == contents(metric, most, prefix)
    assert len(contents(metric, most, prefix)[0]) == tokens - most


@given(shapes(), kinds, seeds)
@settings(deadline=None)
def test_r_0_changes_nothing(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    tokens, prefix, _ = shape
    x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))
    size = torch.ones(2, tokens)
    merged, sizes = combine(x, size, match(metric_of(kind, 2, tokens, seed), 0, prefix))
    assert torch.equal(merged, x)
    assert torch.equal(sizes, size)


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
def test_the_same_input_gives_the_same_result(tokens: int, prefix: int) -> None:
    metric = metric_of("ties", 2, tokens, seed=0).float()
    x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0))
    size = torch.ones(2, tokens)
    first, first_size = combine(x, size, match(metric, 20, prefix))
    for _ in range(20):
        again, again_size = combine(x, size, match(metric, 20, prefix))
        assert torch.equal(again, first)
        assert torch.equal(again_size, first_size)


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
def test_inputs_are_left_as_they_were(tokens: int, prefix: int) -> None:
    inputs = (
        metric_of("random", 2, tokens, seed=3),
        torch.randn(2, tokens, 8, dtype=torch.float64),
        torch.ones(2, tokens, dtype=torch.float64),
    )
    copies = [value.clone() for value in inputs]
    combine(inputs[1], inputs[2], match(inputs[0], 20, prefix))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("positions", ["even", "odd"])
def test_ties_go_to_the_lowest_position(positions: str) -> None:
    metric = torch.ones(1, 12, 1, dtype=torch.float64)
    (groups,) = contents(metric, 3, prefix=2)
    if positions == "even":  # the first three sources merge
        assert groups[2:4] == [[8], [10]]
    else:  # all into the first destination
        assert groups[4:] == [[2, 3, 4, 6], [5], [7], [9], [11]]


def test_length_of_a_metric_does_not_matter_only_its_direction() -> None:
    metric = metric_of("random", 1, 40, seed=9)
    lengths = 2.0 ** torch.randint(-20, 20, (1, 40, 1), generator=torch.Generator().manual_seed(1))
    assert contents(metric * lengths, 9, 1) == contents(metric, 9, 1)


def test_zero_metrics_merge_without_nan() -> None:
    x = torch.randn(1, 21, 4)
    merged, sizes = combine(x, torch.ones(1, 21), match(torch.zeros(1, 21, 4), 5, 1))
    assert merged.shape == (1, 16, 4)
    assert merged.isfinite().all()
    assert sizes.sum() == 21


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
def test_bf16_tokens_stay_close_to_the_same_merge_in_float64(tokens: int, prefix: int) -> None:
    metric = metric_of("random", 2, tokens, seed=5)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, tokens, 16, generator=generator).bfloat16()
    size = torch.ones(2, tokens)
    exact, exact_size = x.double(), size.double()
    for _ in range(5):
        matched = match(metric[:, : x.shape[1]], 20, prefix)
        x, size = combine(x, size, matched)
        exact, exact_size = combine(exact, exact_size, matched)
    assert x.dtype == torch.bfloat16
    assert x.isfinite().all()
    assert torch.equal(size.double(), exact_size)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
def test_bf16_metrics_find_edges_nearly_as_strong_as_the_best(tokens: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # All keys share a large component, as those of real models do.
    metric = 2 + torch.randn(1, tokens, 64, generator=generator)
    metric = metric.bfloat16()
    r = 16

    def strength(groups: list[list[int]]) -> float:
        scores = []
        for group in groups:
            if len(group) > 1:
                (destination,) = [i for i in group if i % 2 == 1]
                scores += [
                    reference.cosine(exact[source], exact[destination]) for source in group if source != destination
                ]
        assert len(scores) == r
        return sum(scores) / r

    exact = metric[0].double().numpy()
    best = strength(reference.match(exact, r, prefix))
    assert strength(contents(metric, r, prefix)[0]) == pytest.approx(best, abs=0.004)


@pytest.mark.parametrize("matched_by", [matching.match, matching_c.match])
def test_autocast_rounds_no_similarity(matched_by: Callable[[Tensor, int, int], Matching]) -> None:
    if matched_by is matching_c.match and not matching_c.BUILT:
        pytest.skip("was installed without a C compiler")
    keys = metric_of("random", 2, 65, 3).float().unsqueeze(1)
    expected = matching.match(keys, 16, 1)
    with torch.autocast("cpu", torch.bfloat16):
        matched = matched_by(keys, 16, 1)
    for name in ("order", "merged", "into"):
        assert torch.equal(getattr(matched, name), getattr(expected, name)), name


@pytest.mark.parametrize(("tokens", "prefix"), REAL_COUNTS)
@pytest.mark.parametrize("kind", ["random", "copies"])
def test_the_product_that_cuda_adds_tokens_by_adds_what_index_add_adds(kind: str, tokens: int, prefix: int) -> None:
    matched = match(metric_of(kind, 3, tokens, 0), tokens // 4, prefix)
    left, r = matched.order.shape[1], matched.into.shape[1]
    x, step = torch.randn(3, left, 8, dtype=torch.float64), torch.randn(3, r, 8, dtype=torch.float64)
    expected = x.flatten(0, 1).index_add(0, matched.into.flatten(), step.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(add_by_product(x, step, matched.into), expected)


def test_gradients_reach_every_token() -> None:
    x = torch.randn(2, 21, 4, dtype=torch.float64, requires_grad=True)
    size = torch.ones(2, 21, dtype=torch.float64)
    matched = match(metric_of("random", 2, 21, seed=0), 6, 1)
    assert torch.autograd.gradcheck(lambda tokens: combine(tokens, size, matched)[0], (x,))
    combine(x, size, matched)[0].sum().backward()
    assert (x.grad > 0).all()
