"""The forward pass never has the host wait for the device, nor the device for the host.

On the meta device, where tensors have shapes and no values: whatever needs a value there (item, tolist, nonzero,
boolean indexing) fails, and so do shapes that depend on values. What copies from the host shows as an operation on a
tensor of the CPU, or as an index that is a Python list. `test_cuda.py` has the driver's own word for it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.server.merging.small_models import KINDS
from tome_server.merging import merge
from tome_server.merging.families.eva import fix_positions
from tome_server.models.loaded import normalise
from tome_server.models.transform import ImageSettings

FAMILIES = (
    "class token",
    "avg pool with prefix",
    "map pool",
    "distilled",
    "gate, all norms",
    "padded image",
    "parallel scaling",
    "parallel things",
    "norms after",
    "EVA-02, norms inside",
    "EVA-02, norms after and inside, rotated",
    "Perception Encoder, map pool",
    "RoPE, mixed",
    "NaFlex, axial",
    "NaFlex, mixed, class token",
)


class HostTensors(TorchDispatchMode):
    """Refuses operations that take or give a tensor of the host; single numbers are arguments of a kernel."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, given)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.ndim:
                raise AssertionError(f"{func} on a tensor of the host, {list(tensor.shape)}")
        return given


class HostIndices(TorchFunctionMode):
    """Refuses indices that are lists: each is copied to the device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list | range) for part in parts), f"index {args[1]} is of the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_pass_waits_for_nothing(name: str) -> None:
    kind = KINDS[name]
    model = merge(kind.build(dtype=torch.float32).to("meta"))
    images = kind.images(4, dtype=torch.float32).to("meta")
    for rs in (8, [9, 0, 5, 9]):
        for whole in (False, True):
            with torch.inference_mode(), HostTensors(), HostIndices():
                output = model(images, rs, return_tokens=whole, return_token_map=whole)
            assert output.logits.shape[0] == 4


def test_normalising_waits_for_nothing() -> None:
    settings = ImageSettings((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 1.0, "center")
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta")
    with torch.inference_mode(), HostTensors(), HostIndices():
        assert normalise(pixels, settings).dtype == torch.float32


@pytest.mark.parametrize("name", ["DINOv3", "Sapiens2, shared keys", "RoPE, mixed"])
def test_positions_are_made_once_for_images_of_one_size(name: str) -> None:
    kind = KINDS[name]
    merged, images = merge(kind.build(dtype=torch.float32)), kind.images(2, dtype=torch.float32)
    with torch.inference_mode():
        expected = merged(images, 5).logits
        fix_positions(merged.model, (8, 8))
        assert torch.equal(merged(images, 5).logits, expected)
    merged, images = merged.to("meta"), images.to("meta")
    with torch.inference_mode(), HostTensors(), HostIndices():
        merged(images, 5)


def test_positions_keep_their_type_in_lesser_ones_and_images_of_another_size_have_their_own() -> None:
    kind = KINDS["DINOv3"]
    model, images = kind.build(dtype=torch.float32), kind.images(2, dtype=torch.float32)
    for dtype, given in ((torch.bfloat16, images), (torch.float32, images[..., :40, :])):
        plain, fixed = merge(copy.deepcopy(model)), merge(copy.deepcopy(model))
        fix_positions(fixed.model, (8, 8))
        with torch.inference_mode():
            expected = plain.to(dtype)(given.to(dtype), 5).logits
            assert torch.equal(fixed.to(dtype)(given.to(dtype), 5).logits, expected)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[[2, 0, 1]],
        lambda x: x[:, range(2)],
        lambda x: x + torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x.cpu(),
    ],
    ids=["item", "mask", "nonzero", "list", "range", "upload", "download"],
)
def test_what_waits_is_found(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), HostTensors(), HostIndices():
        waits(torch.ones(3, 2, device="meta"))
