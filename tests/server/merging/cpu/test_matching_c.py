"""Matching and merging in C against the same by torch's operators, which are held against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.server.merging.test_matching import kinds, seeds, shapes
from tome_server.merging import matching
from tome_server.merging.cpu import matching_c

pytestmark = pytest.mark.skipif(not matching_c.BUILT, reason="was installed without a C compiler")

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
layouts = st.sampled_from(["of a projection", "contiguous", "dim first"])


def keys_of(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Keys [B, heads, N, dim]: sums over heads and their products are exact unless "random"."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens, dim = shape
    if kind == "random":
        keys = torch.randn(shape, generator=generator)
    else:
        # Of "copies" there is one direction, at other lengths.
        channels = torch.randint(0, dim if kind == "ties" else 1, (batch, 1, tokens), generator=generator)
        lengths = torch.randint(0, 3, (batch, 1, tokens, 1), generator=generator)
        keys = (nn.functional.one_hot(channels, dim) * lengths).float().expand(shape)
    keys = keys.to(dtype)
    if layout == "of a projection":
        projected = torch.zeros(batch, tokens, 3, heads, dim, dtype=dtype)
        projected[:, :, 1] = keys.transpose(1, 2)
        return projected.permute(2, 0, 3, 1, 4)[1]
    return keys.contiguous() if layout == "contiguous" else keys.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def assert_matched_alike(one: matching.Matching, other: matching.Matching) -> None:
    for name in ("order", "merged", "into"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@given(shapes(), st.integers(1, 3), st.integers(1, 3), kinds, dtypes, layouts, seeds)
def test_tokens_are_matched_as_by_torch(
    shape: tuple[int, int, int], batch: int, heads: int, kind: str, dtype: torch.dtype, layout: str, seed: int
) -> None:
    tokens, prefix, r = shape
    keys = keys_of(kind, (batch, heads, tokens, 5), dtype, layout, seed)
    assert_matched_alike(matching_c.match(keys, r, prefix), matching.match(keys, r, prefix))


@given(shapes(), st.integers(1, 3), st.integers(1, 40), dtypes, st.booleans(), seeds)
def test_tokens_are_merged_as_by_torch(
    shape: tuple[int, int, int], batch: int, channels: int, dtype: torch.dtype, contiguous: bool, seed: int
) -> None:
    tokens, prefix, r = shape
    generator = torch.Generator().manual_seed(seed)
    keys = keys_of("ties", (batch, 1, tokens, 5), torch.float32, "contiguous", seed)
    x = torch.randn(batch, channels, tokens, generator=generator).to(dtype).mT
    size = torch.randint(1, 20, (tokens, batch), generator=generator).float().T
    if contiguous:
        x, size = x.contiguous(), size.contiguous()
    matched = matching.match(keys, r, prefix)
    before = x.clone(), size.clone()
    merged, sizes = matching_c.combine(x, size, matched)
    expected, expected_sizes = matching.combine(x, size, matched)
    assert torch.equal(sizes, expected_sizes)
    # A step is rounded once more by torch's operators.
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(merged, expected, **tolerance)
    assert torch.equal(x, before[0])
    assert torch.equal(size, before[1])


@pytest.mark.parametrize("count", [7, 8, 33, 98, 512])
def test_the_first_of_equal_proposals_is_chosen_at_any_width(count: int) -> None:
    """Vector registers hold 4, 8 or 16 similarities; what is left over is looked at one by one."""
    keys = torch.zeros(1, 1, 2 * count, 4)
    keys[..., 0] = 1
    matched = matching_c.match(keys, count // 2, 0)
    assert matched.merged.tolist() == [list(range(0, 2 * (count // 2), 2))]
    assert matched.into.tolist() == [[count - count // 2] * (count // 2)]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_torchs_defaults_for_new_tensors_do_not_matter(default: torch.dtype | str) -> None:
    keys, x, size = torch.randn(2, 3, 41, 8), torch.randn(2, 41, 5), torch.ones(2, 41)
    expected = matching_c.match(keys, 12, 1)
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with torch.device("meta" if default == "meta" else "cpu"):
            matched = matching_c.match(keys, 12, 1)
            merged, sizes = matching_c.combine(x, size, matched)
    finally:
        torch.set_default_dtype(before)
    assert_matched_alike(matched, expected)
    expected_merged, expected_sizes = matching.combine(x, size, expected)
    torch.testing.assert_close(merged, expected_merged)
    assert torch.equal(sizes, expected_sizes)


def test_keys_that_are_no_numbers_cost_nothing_but_sense() -> None:
    keys = torch.full((2, 2, 21, 8), float("nan"))
    keys[1] = torch.randn(2, 21, 8)
    matched = matching_c.match(keys, 6, 1)
    for image in range(2):
        every = sorted(matched.order[image].tolist() + matched.merged[image].tolist())
        assert every == list(range(21 * image, 21 * (image + 1)))
    merged, sizes = matching_c.combine(torch.randn(2, 21, 3), torch.ones(2, 21), matched)
    assert merged.isfinite().all()
    assert sizes.sum(dim=1).tolist() == [21, 21]
    assert_matched_alike(matching_c.match(keys[1:], 6, 1), matching.match(keys[1:], 6, 1))


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-8, 8).repeat(256)
    x = torch.stack([torch.zeros(4096), values]).bfloat16()[None]
    # One source into one destination, a third of the way.
    matched = matching.Matching(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[0]]))
    merged, _ = matching_c.combine(x, torch.tensor([[1.0, 2.0]]), matched)
    exact = x[0, 1].float()
    assert torch.equal(merged[0, 0], (exact + (0 - exact) * torch.tensor(1.0).div(3)).bfloat16())


@pytest.mark.parametrize(
    ("x", "served"),
    [
        (torch.zeros(1), True),
        (torch.zeros(1, dtype=torch.bfloat16), True),
        (torch.zeros(1, dtype=torch.float64), False),
        (torch.zeros(1, dtype=torch.float16), False),
        (torch.zeros(1, device="meta"), False),
        (torch.zeros(1, requires_grad=True), False),
        (nn.Parameter(torch.zeros(1)), False),
    ],
)
def test_what_it_serves(x: Tensor, served: bool) -> None:
    assert matching_c.serves(x) is served


def test_tokens_are_served_only_with_keys_that_are() -> None:
    x = torch.zeros(1)
    assert matching_c.serves(x, x.bfloat16())
    assert not matching_c.serves(x, x.half())
    assert not matching_c.serves(x, torch.zeros(1, requires_grad=True))


def test_gradients_that_nobody_takes_are_no_hindrance() -> None:
    x = torch.zeros(1, requires_grad=True)
    with torch.no_grad():
        assert matching_c.serves(x)


WRONG_SIZES: dict[str, dict[str, object]] = {
    "sizes of fewer tokens": {"size": torch.ones(2, 8)},
    "sizes of fewer images": {"size": torch.ones(1, 9)},
    "sizes in float64": {"size": torch.ones(2, 9, dtype=torch.float64)},
    "tokens in float16": {"x": torch.zeros(2, 9, 4, dtype=torch.float16)},
    "tokens of fewer images": {"x": torch.zeros(1, 9, 4)},
    "fewer tokens": {"x": torch.zeros(2, 8, 4), "size": torch.ones(2, 8)},
    "tokens elsewhere": {"x": torch.zeros(2, 9, 4, device="meta")},
    "order of fewer tokens": {"order": torch.zeros(2, 5, dtype=torch.int64)},
    "order in int32": {"order": torch.zeros(2, 6, dtype=torch.int32)},
    "order in strides": {"order": torch.zeros(2, 12, dtype=torch.int64)[:, ::2]},
    "more sources than destinations of them": {"merged": torch.zeros(2, 4, dtype=torch.int64)},
    "more destinations than sources": {"into": torch.zeros(2, 4, dtype=torch.int64)},
}


@pytest.mark.parametrize("wrong", WRONG_SIZES.values(), ids=WRONG_SIZES.keys())
def test_tensors_that_do_not_fit_each_other_never_reach_the_merge_in_c(
    wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads and writes memory by these sizes alone."""
    monkeypatch.setattr(matching_c, "_matching", None)
    matched = matching.match(torch.randn(2, 1, 9, 4), 3, 0)
    given: dict[str, object] = {"x": torch.zeros(2, 9, 4), "size": torch.ones(2, 9), **vars(matched), **wrong}
    x, size = given.pop("x"), given.pop("size")
    with pytest.raises(AssertionError):
        matching_c.combine(x, size, matching.Matching(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "r", "prefix"),
    [
        (torch.zeros(2, 1, 9, 4, dtype=torch.float16), 3, 0),
        (torch.zeros(2, 1, 9, 4, device="meta"), 3, 0),
        (torch.zeros(2, 1, 9, 4), -1, 0),
        (torch.zeros(2, 1, 9, 4), 3, 12),
        (torch.zeros(2, 1, 9, 4), 3, -2),
    ],
    ids=["float16", "elsewhere", "negative r", "more prefix tokens than tokens", "negative prefix"],
)
def test_keys_that_do_not_fit_never_reach_the_matching_in_c(
    keys: Tensor, r: int, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching_c, "_matching", None)
    with pytest.raises(AssertionError):
        matching_c.match(keys, r, prefix)
