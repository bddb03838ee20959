"""Packed weights: the same results, and nothing of the original touched."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from tests.server.merging.small_models import KINDS, Kind, each_kind
from tome_server.merging import MergedModel, macs, merge, pack, packable
from tome_server.merging.cpu.kernels import PackedLinear, _faster, _Mkl, _OneDnn
from tome_server.merging.cpu.packing import PackedPatches, _has_bfloat16


def frozen(model: nn.Module) -> MergedModel:
    return merge(model.eval().requires_grad_(False))


@each_kind
def test_packed_results_are_the_plain_ones_to_rounding(kind: Kind) -> None:
    merged = frozen(kind.build(dtype=torch.float32))
    images = kind.images(dtype=torch.float32)
    packed = pack(merged)
    each: list[int | list[int]] = [0, 3, [3, 0]]
    for r in each:
        with torch.inference_mode():
            expected, found = merged(images, r), packed(images, r)
        assert found.tokens_per_block == expected.tokens_per_block
        difference = (found.logits - expected.logits).abs().max()
        assert difference < 1e-4 * expected.logits.abs().max()


@each_kind
def test_no_linear_layer_of_a_block_is_left_as_it_was_and_counts_are(kind: Kind) -> None:
    merged = frozen(kind.build(dtype=torch.float32))
    packed = pack(merged)
    assert not [name for name, part in packed.model.blocks.named_modules() if type(part) is nn.Linear]
    assert macs(packed.model, 3, kind.image) == macs(merged.model, 3, kind.image)


class Adapted(nn.Linear):
    """A layer that does more than torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


MIXED = ["layer scale", "SwiGLU", "parallel scaling, qk_norm, layer scale", "parallel things", "EVA-02, norms inside"]


@pytest.mark.parametrize("name", [*MIXED, "DINOv3", "EVA-02, biases added apart", "Sapiens2, shared keys"])
@pytest.mark.parametrize("first", [0, 1])
def test_layers_of_another_class_stay_as_they_are(name: str, first: int) -> None:
    model = KINDS[name].build(dtype=torch.float32)
    for part in [part for part in model.blocks.modules() if type(part) is nn.Linear][first::2]:
        part.__class__ = Adapted
    changed, images = frozen(model), KINDS[name].images(dtype=torch.float32)
    expected = changed(images, 2).logits
    assert (pack(changed)(images, 2).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_packing_changes_nothing_in_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, init_values=0.5)
    model.eval().requires_grad_(False)
    before = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    packed = pack(merge(model))
    assert [type(module) for module in model.modules()] == classes
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert packed.model.pos_embed is model.pos_embed


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: m.half(), lambda m: m.train(), lambda m: m.requires_grad_(True)],
    ids=["double", "float16", "training", "gradients"],
)
def test_no_other_dtype_and_no_training_is_packed(change: Callable[[nn.Module], nn.Module]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval().requires_grad_(False)
    merged = merge(change(model))
    assert not packable(merged)
    with pytest.raises(ValueError, match="float32"):
        pack(merged)


def test_a_model_of_which_a_part_is_in_training_mode_is_not_packed() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval().requires_grad_(False)
    model.blocks[1].train()
    assert not packable(merge(model))


@pytest.mark.parametrize("name", ["class token", "NaFlex", "DINOv3"])
def test_a_packed_model_is_neither_converted_nor_moved(name: str) -> None:
    merged, images = frozen(KINDS[name].build(dtype=torch.float32)), KINDS[name].images(dtype=torch.float32)
    packed = pack(merged)
    expected = packed(images, 3).logits
    for change in (lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to("meta")):
        with pytest.raises(RuntimeError, match="packed weights stay"):
            change(copy.deepcopy(packed.model.blocks))
    assert torch.equal(packed.float().to("cpu")(images, 3).logits, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_torchs_defaults_for_new_tensors_do_not_matter(threads: int) -> None:
    kind = KINDS["class token"]
    merged, images = frozen(kind.build(dtype=torch.float32)), kind.images(dtype=torch.float32)
    before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads)
    _faster.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            packed = pack(merged)
        torch.set_default_dtype(before[1])
        torch.testing.assert_close(packed(images, 3).logits, merged(images, 3).logits, rtol=1e-3, atol=1e-4)
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])


@pytest.mark.parametrize("size", [(32, 48), (35, 50)])
def test_patches_are_those_of_the_convolution_and_what_fills_none_is_left_out(size: tuple[int, int]) -> None:
    convolution = nn.Conv2d(3, 24, kernel_size=(8, 16), stride=(8, 16)).requires_grad_(False)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(PackedPatches(convolution)(images), convolution(images), rtol=1e-4, atol=1e-5)


def test_a_layer_without_bias_can_be_packed() -> None:
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(5, 16)
    torch.testing.assert_close(PackedLinear(linear.weight, None)(x), linear(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("product", [_OneDnn, _Mkl])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("inner", "outer"), [(100, 37), (192, 576), (768, 192)])
def test_either_librarys_product_is_the_layers_for_any_number_of_rows(
    product: type[_OneDnn] | type[_Mkl], activation: str, inner: int, outer: int
) -> None:
    if product is _Mkl and not _Mkl.is_available():
        pytest.skip("torch comes without MKL here")
    linear = nn.Linear(inner, outer).requires_grad_(False)
    packed = product(linear.weight, linear.bias, activation)
    for rows in (1, 2, 15, 64, 197, 1000, 1025, 2500):
        x = torch.randn(rows, inner)
        expected = linear(x)
        if activation != "none":
            expected = nn.functional.gelu(expected, approximate="tanh" if activation == "gelu_tanh" else "none")
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_of_a_packed_model_gives_the_same_results(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval().requires_grad_(False)
        packed, images = pack(merge(model)), torch.randn(2, 3, 32, 32)
        assert torch.equal(copy.deepcopy(packed)(images, 1).logits, packed(images, 1).logits)
    finally:
        torch.set_num_threads(before)


def test_packed_positions_fit_images_of_any_size_and_copies() -> None:
    kind = KINDS["DINOv3"]
    merged, images = frozen(kind.build(dtype=torch.float32)), kind.images(dtype=torch.float32)
    packed = pack(merged)
    for given in (images, images[..., :40, :], images[..., :48]):
        expected = merged(given, 2).logits
        for model in (packed, copy.deepcopy(packed)):
            assert (model(given, 2).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.skipif(not _has_bfloat16(), reason="the CPU computes nothing in bfloat16")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_base_patch16_xp_224"]
)
def test_packed_results_in_bfloat16_are_as_near_to_float32_as_those_of_the_plain_model(threads: int, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, patch_size=16, embed_dim=192, num_heads=3, depth=3)
    model.eval().requires_grad_(False)
    images, before = torch.randn(4, 3, 64, 64), torch.get_num_threads()
    exact = merge(model)(images, 0).features
    merged = merge(copy.deepcopy(model).bfloat16())
    torch.set_num_threads(threads)
    try:
        packed = pack(merged)
        found = packed(images.bfloat16(), 0).features
        assert packed(images.bfloat16(), 3).logits.isfinite().all()
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.bfloat16
    plain = (merged(images.bfloat16(), 0).features.float() - exact).norm()
    assert (found.float() - exact).norm() < 1.5 * plain
