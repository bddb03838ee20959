"""Merged models of every supported kind against a float64 reference, and what `merge` promises."""

import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionPoolLatent, DiffAttention, DropPath
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from tests.server.merging import reference
from tests.server.merging.outputs import equal
from tests.server.merging.small_models import KINDS, PLAIN_KINDS, SMALL, Kind, each_kind, kind, randomise, typical_kinds
from tome_server.merging import (
    MergedModel,
    MergedOutput,
    Schedule,
    UnsupportedModelError,
    merge,
    pack,
    tokens_per_block,
    unmerge,
)

RS: dict[str, int | Schedule] = {
    "r=0": 0,
    "r=3": 3,
    "r=10": 10,
    "r beyond the clamp": 1000,
    "falling": Schedule.linear(8),
    "rising": Schedule.linear(8, 1.0),
}


def per_block(r: int | Schedule, depth: int) -> tuple[int, ...]:
    return r.per_block(depth) if isinstance(r, Schedule) else (r,) * depth


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# The algorithm


@pytest.mark.parametrize("r", RS.values(), ids=RS.keys())
@each_kind
def test_output_is_that_of_the_reference(kind: Kind, r: int | Schedule) -> None:
    model, images = kind.build(), kind.images(2)
    merged = merge(model)
    with torch.no_grad():
        out = merged(images, r, return_tokens=True, return_token_map=True)
        plain = merged(images, r)
    for i, image in enumerate(images):
        expected = reference.forward(model, image, per_block(r, len(model.blocks)))
        close(out.logits[i], expected.logits)
        close(out.features[i], expected.features)
        close(plain.logits[i], expected.logits)
        close(plain.features[i], expected.features)
        close(out.tokens[i], expected.tokens)
        assert out.token_map[i].tolist() == expected.token_map
        assert out.sizes[i].tolist() == expected.sizes
        assert out.tokens_per_block[i] == plain.tokens_per_block[i] == expected.tokens_per_block


@pytest.mark.parametrize("name", ["class token", "registers", "avg pool", "map pool", "distilled"])
def test_without_proportional_attention_only_the_blocks_forget_sizes(name: str) -> None:
    kind = KINDS[name]
    model, images = kind.build(), kind.images(1)
    out = merge(model, proportional_attention=False)(images, 10)
    expected = reference.forward(model, images[0], (10, 10, 10), proportional=False)
    close(out.logits[0], expected.logits)
    weighed = merge(model, proportional_attention=True)(images, 10)
    assert (weighed.logits - out.logits).abs().max() > 1e-3


@each_kind
def test_r_0_is_the_unmerged_model(kind: Kind) -> None:
    model, images = kind.build(), kind.images(2)
    with torch.no_grad():
        out = merge(model)(images)
        full = merge(model)(images, return_tokens=True, return_token_map=True)
        tokens = model.forward_features(images)
        for result in (out, full):
            close(result.logits, model(images))
            close(result.features, model.forward_head(tokens, pre_logits=True))
        close(full.tokens, tokens)
    prefix = model.num_prefix_tokens
    count = tokens.shape[1]
    assert full.token_map.tolist() == [list(range(prefix, count))] * 2
    assert torch.equal(full.sizes, torch.ones_like(full.sizes))
    close(unmerge(full.tokens, full.token_map), tokens[:, prefix:])


# Padding is another token, and rotated ones, or NaFlexVit's, differ by where they are.
WITHOUT_POSITIONS = {
    name: kind
    for name, kind in KINDS.items()
    if (name in PLAIN_KINDS and name != "padded image")
    or name.startswith(("parallel", "three parallel", "norms after"))
    or name in ("EVA", "EVA-02, norms after")
}


@pytest.mark.parametrize("kind", WITHOUT_POSITIONS.values(), ids=WITHOUT_POSITIONS.keys())
def test_merging_equal_tokens_changes_nothing(kind: Kind) -> None:
    """With sizes in attention and pooling, k equal tokens weigh as much merged as apart."""
    model = kind.build()
    if model.pos_embed is not None:
        with torch.no_grad():
            model.pos_embed[:] = model.pos_embed[:, :1]
    patch = torch.randn(1, kind.images(1).shape[1], 8, 8, dtype=torch.float64)
    images = patch.repeat(1, 1, kind.image[0] // 8, kind.image[1] // 8)
    with torch.no_grad():
        dense = model(images)
        for r in (1, 7, 20, 1000):
            close(merge(model)(images, r).logits, dense)


@typical_kinds
def test_a_batch_gives_what_each_image_gives_alone(kind: Kind) -> None:
    model, images = kind.build(), kind.images(3)
    merged = merge(model)
    with torch.no_grad():
        together = merged(images, 9, return_token_map=True)
        for i in range(3):
            alone = merged(images[i : i + 1], 9, return_token_map=True)
            close(alone.logits[0], together.logits[i])
            assert torch.equal(alone.token_map[0], together.token_map[i])


@pytest.mark.parametrize("r", [0, 5, 1000])
@typical_kinds
def test_asking_for_tokens_or_the_map_does_not_change_the_answer(kind: Kind, r: int) -> None:
    merged, images = merge(kind.build()), kind.images(2)
    with torch.no_grad():
        plain = merged(images, r)
        with_tokens = merged(images, r, return_tokens=True)
        with_map = merged(images, r, return_token_map=True)
    for out in (with_tokens, with_map):
        close(out.logits, plain.logits)
        close(out.features, plain.features)
        assert out.tokens_per_block == plain.tokens_per_block
        assert out.sizes is not None
    assert (plain.tokens, plain.token_map, plain.sizes) == (None, None, None)
    assert with_tokens.token_map is None
    assert with_map.tokens is None
    assert torch.equal(with_tokens.sizes, with_map.sizes)


# Token maps


@pytest.mark.parametrize("r", [0, 4, 11, 1000])
@typical_kinds
def test_token_map_and_sizes_agree(kind: Kind, r: int) -> None:
    model, images = kind.build(), kind.images(2)
    out = merge(model)(images, r, return_tokens=True, return_token_map=True)
    prefix, count = model.num_prefix_tokens, out.tokens_per_block[0][-1]
    patches = out.token_map.shape[1]
    assert out.tokens.shape[1] == out.sizes.shape[1] == count
    assert out.token_map.dtype == torch.int64
    assert out.tokens_per_block == (tokens_per_block(patches, prefix, (r,) * len(model.blocks)),) * 2
    for token_map, sizes in zip(out.token_map, out.sizes, strict=True):
        assert token_map.min() >= prefix
        counted = torch.bincount(token_map, minlength=count)
        assert counted[prefix:].tolist() == sizes[prefix:].tolist()
        assert sizes[:prefix].tolist() == [1] * prefix
        assert sizes[prefix:].sum() == patches


def test_unmerge_gives_each_patch_its_token() -> None:
    tokens = torch.randn(2, 5, 3)
    token_map = torch.tensor([[1, 4, 4, 2], [3, 3, 1, 2]])
    patches = unmerge(tokens, token_map)
    assert patches.shape == (2, 4, 3)
    for image in range(2):
        for patch in range(4):
            assert torch.equal(patches[image, patch], tokens[image, token_map[image, patch]])


# The wrapped model


def snapshot(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: (tuple(value) if isinstance(value, dict) else id(value)) for key, value in vars(module).items()}
        state[name] = (type(module), id(module), module.training, own)
    return state


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@typical_kinds
def test_the_original_is_untouched(kind: Kind, training: bool) -> None:
    model, images = kind.build().train(training), kind.images(1)
    with torch.no_grad():
        before, weights, output = snapshot(model), values(model), model(images)
        merged = merge(model)
        assert snapshot(model) == before
        for r in (0, 9):
            merged(images, r, return_tokens=True, return_token_map=True)
            merged(images, r)
        assert snapshot(model) == before
        after = values(model)
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[name], weights[name]) for name in weights)
        assert torch.equal(model(images), output)


def test_parts_that_are_in_another_mode_than_the_model_stay_so() -> None:
    """As when some layers are frozen for fine-tuning."""
    model = KINDS["class token"].build().train()
    model.blocks[0].eval()
    model.head.eval()
    before = snapshot(model)
    merge(model)
    assert snapshot(model) == before


def test_two_wrappers_of_one_model_do_not_disturb_each_other() -> None:
    kind = KINDS["registers"]
    model, images = kind.build(), kind.images(2)
    proportional, other = merge(model), merge(model, proportional_attention=False)
    with torch.no_grad():
        expected = proportional(images, 8), other(images, 8)
        assert equal(proportional(images, 8), expected[0])
        assert equal(other(images, 8), expected[1])


def test_stochastic_depth_acts_as_in_the_unmerged_model() -> None:
    model = KINDS["class token"].build().train()
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(1.0), DropPath(1.0)  # drops every branch
    images = KINDS["class token"].images(2)
    close(merge(model)(images).logits, model(images))


def test_original_with_its_own_attention_kernel_off_gives_the_same() -> None:
    kind = KINDS["qk_norm"]
    model, images = kind.build(), kind.images(1)
    fused = merge(model)(images, 6).logits
    for block in model.blocks:
        block.attn.fused_attn = False
    close(merge(model)(images, 6).logits, fused)


def test_a_model_without_pretrained_config_can_be_merged() -> None:
    model = randomise(
        VisionTransformer(**SMALL, num_classes=5).double().eval()  # not by timm.create_model
    )
    images = kind().images(1)
    expected = reference.forward(model, images[0], (5, 5, 5))
    close(merge(model)(images, 5).logits[0], expected.logits)


@pytest.mark.parametrize(
    ("entrypoint", "proportional"),
    [
        ("vit_base_patch16_224.mae", False),
        ("vit_base_patch16_224.augreg_in1k", True),
        ("vit_base_patch16_224", True),
        ("deit3_base_patch16_224.fb_in1k", True),
    ],
)
def test_attention_is_proportional_by_default_except_for_mae_weights(entrypoint: str, proportional: bool) -> None:
    options = {**SMALL, "num_classes": 7}
    model = randomise(timm.create_model(entrypoint, **options).double().eval())
    images = kind().images(1)
    by_default = merge(model)(images, 10).logits
    assert torch.equal(by_default, merge(model, proportional_attention=proportional)(images, 10).logits)
    assert not torch.equal(by_default, merge(model, proportional_attention=not proportional)(images, 10).logits)


# Concurrency


@pytest.mark.parametrize("name", ["class token", "map pool", "registers", "distilled"])
def test_threads_that_share_a_merged_model_get_what_each_gets_alone(name: str) -> None:
    kind = KINDS[name]
    merged = merge(kind.build(dtype=torch.float32))
    calls: list[dict[str, Any]] = [
        {"images": kind.images(1, dtype=torch.float32, seed=1), "r": 12},
        {"images": kind.images(2, dtype=torch.float32, seed=2), "r": 0},
        {"images": kind.images(1, dtype=torch.float32, seed=3), "r": Schedule.linear(5), "return_token_map": True},
        {"images": kind.images(3, dtype=torch.float32, seed=4), "r": 4, "return_tokens": True},
    ]

    def call(arguments: dict[str, Any]) -> MergedOutput:
        with torch.inference_mode():
            return merged(**arguments)

    alone = [call(arguments) for arguments in calls]
    start = threading.Barrier(len(calls))
    wrong: list[str] = []

    def hammer(which: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        wrong.extend(
            f"call {which}, attempt {attempt}" for attempt in range(40) if not equal(call(calls[which]), alone[which])
        )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hammer, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# Gradients and number types


@pytest.mark.parametrize("r", [0, 7])
@typical_kinds
def test_gradients_flow_to_the_images(kind: Kind, r: int) -> None:
    merged, images = merge(kind.build()), kind.images(2).requires_grad_()
    merged(images, r).logits.square().sum().backward()
    assert images.grad.isfinite().all()
    assert all(image.abs().max() > 0 for image in images.grad)


@pytest.mark.parametrize("name", ["class token", "avg pool", "map pool", "registers"])
def test_gradients_of_a_merged_model_are_those_of_finite_differences(name: str) -> None:
    kind = KINDS[name]
    merged, images = merge(kind.build()), kind.images(1)
    direction = torch.randn_like(images)
    images.requires_grad_()
    merged(images, 9).logits.square().sum().backward()
    step = 1e-6
    with torch.no_grad():
        ahead = merged(images + step * direction, 9).logits.square().sum()
        behind = merged(images - step * direction, 9).logits.square().sum()
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close((images.grad * direction).sum(), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [0, 6, 1000])
@typical_kinds
def test_bf16_gives_finite_results_of_its_type(kind: Kind, r: int) -> None:
    model = kind.build(dtype=torch.bfloat16)
    images = kind.images(2, dtype=torch.bfloat16)
    with torch.inference_mode():
        out = merge(model)(images, r, return_tokens=True, return_token_map=True)
        assert out.logits.dtype == out.tokens.dtype == torch.bfloat16
        assert out.logits.isfinite().all()
        assert (out.sizes[:, model.num_prefix_tokens :].sum(dim=1) == out.token_map.shape[1]).all()
        if r == 0:
            expected = model(images)
            scale = expected.abs().max().item()
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("r", [0, 6])
@pytest.mark.parametrize("name", ["class token", "map pool", "distilled", "gate, all norms"])
def test_runs_under_autocast(name: str, r: int) -> None:
    kind = KINDS[name]
    model, images = kind.build(dtype=torch.float32), kind.images(2, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = merge(model)(images, r)
        assert out.logits.isfinite().all()
        if r == 0:
            expected = model(images)
            scale = expected.abs().max().item()
            torch.testing.assert_close(out.logits, expected, rtol=0, atol=0.05 * scale)


# Graphs of it


def test_traced_it_gives_for_other_images_what_it_gives_for_them() -> None:
    kind = KINDS["class token"]
    model = merge(kind.build(dtype=torch.float32).requires_grad_(False))
    images, others = (kind.images(2, dtype=torch.float32, seed=seed) for seed in (1, 2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: model(x, 6).logits, images, check_trace=False)
        torch.testing.assert_close(traced(others), model(others, 6).logits)


def test_it_is_compiled_as_a_single_graph() -> None:
    kind = KINDS["class token"]
    model = merge(kind.build(dtype=torch.float32).requires_grad_(False))
    images = kind.images(2, dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, [6, 2]).logits, model(images, [6, 2]).logits)


# Input


@pytest.mark.parametrize("pack", [lambda merged: merged, pack], ids=["plain", "packed"])
@pytest.mark.parametrize("r", [0, 6, []])
def test_no_images_give_no_answers(r: int | list[int], pack: Callable[[MergedModel], MergedModel]) -> None:
    kind = KINDS["avg pool"]
    merged = pack(merge(kind.build(dtype=torch.float32).requires_grad_(False)))
    out = merged(kind.images(0, dtype=torch.float32), r)
    assert out.logits.shape == (0, 7)
    assert out.tokens_per_block == ()


@pytest.mark.parametrize("r", [0, 6])
@pytest.mark.parametrize("name", ["class token", "map pool", "other image size"])
def test_memory_layout_of_the_images_does_not_matter(name: str, r: int) -> None:
    kind = KINDS[name]
    merged, images = merge(kind.build()), kind.images(2)
    expected = merged(images, r).logits
    close(merged(images.to(memory_format=torch.channels_last), r).logits, expected)
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    close(merged(strided, r).logits, expected)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((3, 64, 64), r"3, 64, 64"),  # no batch
        ((1, 1, 3, 64, 64), r"1, 1, 3, 64, 64"),
        ((1, 1, 64, 64), r"1, 1, 64, 64"),  # channels
        ((1, 64, 64, 3), r"1, 64, 64, 3"),  # channels last
        ((1, 3, 32, 64), r"32"),  # height
        ((1, 3, 64, 80), r"80"),  # width
    ],
)
@pytest.mark.parametrize("r", [0, 5])
def test_images_of_the_wrong_shape_are_refused_by_name(shape: tuple[int, ...], named: str, r: int) -> None:
    merged = merge(KINDS["class token"].build())
    with pytest.raises(ValueError, match=named):
        merged(torch.zeros(shape, dtype=torch.float64), r)


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    merged = merge(KINDS["other image size"].build())
    with pytest.raises(ValueError, match="60"):
        merged(torch.zeros(1, 3, 60, 64, dtype=torch.float64), 5)


# Refusals


class UsersBlock(Block):
    """Not plain: may compute anything."""


class UsersAttention(Attention):
    """Not plain: may compute anything."""


class UsersModel(VisionTransformer):
    """Not plain: may compute anything."""


class UsersPool(AttentionPoolLatent):
    """Not plain: may compute anything."""


def tiny(entrypoint: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(entrypoint, **{**SMALL, "depth": 2, **options})


def with_last_block() -> nn.Module:
    model = tiny()
    model.blocks[-1] = UsersBlock(48, num_heads=3)
    return model


def with_last_attention() -> nn.Module:
    model = tiny()
    model.blocks[-1].attn = UsersAttention(48, num_heads=3)
    return model


def with_pool() -> nn.Module:
    model = tiny(global_pool="map", class_token=False)
    model.attn_pool = UsersPool(48, num_heads=3)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[nn.Module] | str]] = {
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224", depth=1), "Beit"),
    "Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer"),
    "RelPos": (lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1), "VisionTransformerRelPos"),
    "differential attention beside its MLP": (
        lambda: tiny(num_heads=2, block_fn=DiffParallelScalingBlock),
        DiffParallelScalingBlock,
    ),
    "differential attention": (lambda: tiny(num_heads=2, attn_layer="diff"), DiffAttention),
    "a user's block": (lambda: tiny(block_fn=UsersBlock), UsersBlock),
    "a user's block among others": (with_last_block, UsersBlock),
    "a user's attention": (lambda: tiny(attn_layer=UsersAttention), UsersAttention),
    "a user's attention among others": (with_last_attention, UsersAttention),
    "a user's model": (lambda: UsersModel(**SMALL), UsersModel),
    "a user's pool": (with_pool, UsersPool),
    "PRR pool": (lambda: tiny(global_pool="prr"), "AttentionPoolPrr"),
    "no transformer": (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential"),
}


@pytest.mark.parametrize(("build", "offender"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_the_name_of_its_class(
    build: Callable[[], nn.Module], offender: type[nn.Module] | str
) -> None:
    name = offender if isinstance(offender, str) else offender.__name__
    supported = "AttentionPoolLatent" if "Pool" in name else "VisionTransformer|Block|Attention"
    with pytest.raises(UnsupportedModelError, match=rf"\b{name}\b") as caught:
        merge(build())
    assert isinstance(caught.value, ValueError)
    names_supported = str(caught.value).replace(name, "")
    assert any(word in names_supported for word in supported.split("|"))


def test_pooling_that_gives_no_answer_for_the_image_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="global_pool"):
        merge(tiny(global_pool=""))


class AdaptedLinear(nn.Linear):
    """As LoRA adapters do: a frozen weight with a low-rank change beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.load_state_dict(base.state_dict())
        shape = (base.out_features, 2, base.in_features)
        self.up = nn.Parameter(torch.randn(*shape[:2], dtype=base.weight.dtype))
        self.down = nn.Parameter(0.1 * torch.randn(*shape[1:], dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_adapted_linear_layers_are_honoured_or_refused(part: str) -> None:
    kind = KINDS["class token"]
    model, images = kind.build(), kind.images(1)
    parent, name = part.split(".")
    for block in model.blocks:
        owner = getattr(block, parent)
        setattr(owner, name, AdaptedLinear(getattr(owner, name)))
    try:
        merged = merge(model)
    except UnsupportedModelError as error:
        assert "AdaptedLinear" in str(error)  # noqa: PT017  either is right
        return
    close(merged(images).logits, model(images))
