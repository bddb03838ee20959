"""NaFlexVit on images as patches: each of its own shape, padded to one number of patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.server.merging import reference
from tests.server.merging.small_models import DEPTH, OTHER_KINDS, PLAIN_KINDS, Kind
from tome_server.merging import MergedOutput, Schedule, merge, unmerge

NAFLEX = {name: kind for name, kind in OTHER_KINDS.items() if name.startswith("NaFlex")}
GRIDS = [(4, 6), (7, 3), (1, 2), (4, 6), (5, 7)]
RS = [9, 0, 3, Schedule.linear(4), 1000]
WIDTH = 8 * 8 * 3

each_kind = pytest.mark.parametrize("kind", NAFLEX.values(), ids=NAFLEX.keys())


def image(grid: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    coord = torch.tensor([(row, column) for row in range(rows) for column in range(columns)])
    patches = torch.randn(rows * columns, WIDTH, generator=generator, dtype=torch.float64)
    return {"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(rows * columns, dtype=torch.bool)}


def batch(images: list[dict[str, Tensor]], padding: int = 2, junk: float = 0.0) -> dict[str, Tensor]:
    """All images, padded to the most patches and `padding` more; `junk` is what padding shows."""
    count = max(len(each["patches"]) for each in images) + padding
    out = {
        "patches": torch.full((len(images), count, WIDTH), junk, dtype=torch.float64),
        "patch_coord": torch.zeros(len(images), count, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(len(images), count, dtype=torch.bool),
    }
    for i, each in enumerate(images):
        for name, values in each.items():
            out[name][i, : len(values)] = values
    return out


def some(grids: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    return [image(grid, seed) for seed, grid in enumerate(grids)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@each_kind
def test_r_0_is_the_unmerged_model(kind: Kind) -> None:
    model, images = kind.build(), batch(some(GRIDS))
    with torch.no_grad():
        close(merge(model)(images).logits, model(images))
        close(merge(model)(images, return_tokens=True).logits, model(images))


def assert_of_the_reference(out: MergedOutput, i: int, expected: reference.ReferenceOutput) -> None:
    close(out.logits[i], expected.logits)
    close(out.features[i], expected.features)
    assert out.tokens_per_block[i] == expected.tokens_per_block
    count, patches = len(expected.sizes), len(expected.token_map)
    close(out.tokens[i, :count], expected.tokens)
    assert out.sizes[i].tolist() == expected.sizes + [0] * (out.sizes.shape[1] - count)
    assert out.token_map[i].tolist() == expected.token_map + [-1] * (out.token_map.shape[1] - patches)


@each_kind
def test_each_image_gets_what_the_reference_gives_it_without_padding(kind: Kind) -> None:
    model, images = kind.build(), some(GRIDS)
    with torch.no_grad():
        out = merge(model)(batch(images), RS, return_tokens=True, return_token_map=True)
        plain = merge(model)(batch(images), RS)
    close(plain.logits, out.logits)
    for i, (each, r) in enumerate(zip(images, RS, strict=True)):
        per_block = r.per_block(DEPTH) if isinstance(r, Schedule) else (r,) * DEPTH
        assert_of_the_reference(out, i, reference.forward(model, each, per_block))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(NAFLEX)),
    grids=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    r=st.integers(0, 12),
    padding=st.integers(0, 5),
    junk=st.sampled_from([0.0, 1e6, float("nan")]),
)
def test_neither_padding_nor_other_images_change_an_image(
    name: str, grids: list[tuple[int, int]], r: int, padding: int, junk: float
) -> None:
    merged, images = merge(NAFLEX[name].build()), some(grids)
    with torch.no_grad():
        out = merged(batch(images, padding, junk), r, return_token_map=True)
        for i, each in enumerate(images):
            alone = merged(batch([each], 0), r, return_token_map=True)
            close(out.logits[i], alone.logits[0])
            assert out.tokens_per_block[i] == alone.tokens_per_block[0]
            assert torch.equal(out.token_map[i, : len(each["patches"])], alone.token_map[0])


@pytest.mark.parametrize("name", ["NaFlex", "NaFlex, map pool"])
def test_patches_of_a_whole_image_give_what_the_image_gives(name: str) -> None:
    kind = NAFLEX[name]
    merged, images = merge(kind.build()), kind.images(2)
    patches = images.reshape(2, 3, 8, 8, 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 64, WIDTH)
    coord = torch.cartesian_prod(torch.arange(8), torch.arange(8)).expand(2, -1, -1)
    valid = torch.ones(2, 64, dtype=torch.bool)
    with torch.no_grad():
        as_patches = merged({"patches": patches, "patch_coord": coord, "patch_valid": valid}, 7)
        close(as_patches.logits, merged(images, 7).logits)


def test_unmerged_padding_is_zero() -> None:
    kind, images = NAFLEX["NaFlex"], some([(2, 3), (4, 4)])
    with torch.no_grad():
        out = merge(kind.build())(batch(images), 2, return_tokens=True, return_token_map=True)
    patches = unmerge(out.tokens, out.token_map)
    assert patches.shape[:2] == out.token_map.shape
    assert not patches[0, 6:].any()
    assert patches[0, :6].any(dim=-1).all()


def test_sizes_may_differ_in_eval_mode_only() -> None:
    merged, images = merge(NAFLEX["NaFlex"].build().train()), some([(2, 3), (4, 4)])
    with pytest.raises(ValueError, match="eval mode"):
        merged(batch(images), 2)
    assert merged(batch(images[:1] * 2), 2).logits.shape == (2, 7)


def wrong(**changes: Tensor | None) -> dict[str, Tensor]:
    images = {**batch(some([(2, 3), (4, 4)])), **changes}
    return {name: value for name, value in images.items() if value is not None}


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (wrong(patch_valid=None), "patch_valid"),
        (wrong(attn_mask=torch.zeros(2, 1, 18, 18)), "attn_mask"),
        (wrong(patch_coord=torch.zeros(2, 9, 2, dtype=torch.int64)), r"patch_coord \[2, 9, 2\]"),
        (wrong(patch_valid=torch.ones(2, 9, dtype=torch.bool)), r"patch_valid \[2, 9\]"),
        (wrong(patch_valid=torch.ones(18, dtype=torch.bool)), r"patch_valid \[18\]"),
        (wrong(patch_valid=torch.arange(18).expand(2, -1) > 0), "padding"),
        (wrong(patch_valid=torch.zeros(2, 18, dtype=torch.bool)), "no patches"),
    ],
)
def test_patches_that_do_not_fit_are_refused_by_name(images: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        merge(NAFLEX["NaFlex"].build())(images, 2)


def test_other_models_take_no_patches() -> None:
    with pytest.raises(ValueError, match="VisionTransformer"):
        merge(PLAIN_KINDS["class token"].build())(batch(some([(2, 3)])), 2)


def test_dropping_patches_in_training_is_refused() -> None:
    for entrypoint, options in (
        ("naflexvit_base_patch16_gap", {"patch_size": 8}),
        ("vit_small_patch16_dinov3", {"img_size": 64, "patch_size": 8}),
    ):
        kind = Kind(entrypoint, {**options, "patch_drop_rate": 0.5}, any_size=entrypoint.startswith("naflex"))
        model = kind.build()
        merge(model)(kind.images(1), 2)
        with pytest.raises(ValueError, match="patch_drop_rate"):
            merge(model.train())(kind.images(1), 2)
