"""What a forward pass allocates: never more at once than timm's own model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from tome_server.merging import merge, pack, packable


@dataclass(frozen=True)
class Sized:
    """Wide enough for tokens to take more than what is kept beside them."""

    entrypoint: str
    options: dict[str, Any] = field(default_factory=dict)


NARROW = {"embed_dim": 192, "num_heads": 3}
MODELS = {
    "class token": Sized("vit_tiny_patch16_224"),
    "map pool": Sized("vit_base_patch16_siglip_224", NARROW),
    "layer scale, registers": Sized("vit_small_patch14_reg4_dinov2", {"img_size": 196}),
    "parallel scaling": Sized("vit_base_patch16_xp_224", NARROW),
    "parallel things": Sized("vit_small_patch16_18x2_224"),
    "norms after": Sized("vit_base_patch16_rpn_224", NARROW),
    "DINOv3": Sized("vit_small_patch16_dinov3", {"img_size": 224}),
    "EVA-02": Sized("eva02_tiny_patch14_224"),
    "RoPE, mixed": Sized("vit_small_patch16_rope_mixed_224"),
    "Perception Encoder": Sized("vit_pe_core_tiny_patch16_384", {"img_size": 224}),
    "Sapiens2, shared keys": Sized(
        "vit_base_patch16_sapiens2", {"img_size": 224, "embed_dim": 192, "num_heads": 6, "num_kv_heads": 3}
    ),
    "NaFlex": Sized("naflexvit_base_patch16_gap", NARROW),
}


def peak(call: Callable[[], object]) -> int:
    """The most bytes that the call holds of torch's memory at once."""
    with torch.inference_mode():
        call()  # what is made once stays out
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            held = call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    del held
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_peak_is_what_is_held_at_once() -> None:
    def call() -> object:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= peak(call) < 8100  # and some scalars


@pytest.mark.parametrize("sized", MODELS.values(), ids=MODELS.keys())
def test_a_forward_pass_holds_no_more_memory_than_timms(sized: Sized) -> None:
    model = timm.create_model(sized.entrypoint, depth=3, **sized.options).eval().requires_grad_(False)
    images = torch.randn(4, 3, *getattr(getattr(model, "patch_embed", None), "img_size", (224, 224)))
    merged = merge(model)
    theirs = peak(lambda: model(images))
    for r in (0, 1, 8, 16, [0, 8, 16, 0]):
        assert peak(lambda r=r: merged(images, r)) <= theirs
    if packable(merged):
        packed = pack(merged)
        for r in (0, 8, [0, 8, 16, 0]):
            assert peak(lambda r=r: packed(images, r)) <= theirs


def test_a_divided_model_holds_no_more_memory_than_timms() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3).eval().requires_grad_(False)
    images, threads = torch.randn(4, 3, 224, 224), torch.get_num_threads()
    theirs = peak(lambda: model(images))
    torch.set_num_threads(2)
    try:
        divided = pack(merge(model), divided=True)
    finally:
        torch.set_num_threads(threads)
    # In one thread, the only one whose memory is counted: its parts then hold no less than side by side.
    for r in (0, 8, [0, 8, 16, 0]):
        assert peak(lambda r=r: divided(images, r)) <= theirs
