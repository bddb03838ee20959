"""The list of timm's entry points that can be merged."""

import pytest
import timm
import torch

from tome_server.merging import UnsupportedModelError, merge
from tome_server.merging.entrypoints import entrypoints

FAMILIES = ("deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vitamin")
# Of the installed timm, whichever it is: those of 1.0.31 number 282.
LEAST_SUPPORTED = 260


def test_every_entry_point_of_timm_is_listed_once_with_a_verdict_and_hundreds_are_supported() -> None:
    found = list(entrypoints())
    assert [entry.name for entry in found] == sorted(timm.list_models())
    assert all(entry.supported == (entry.reason is None) for entry in found)
    assert sum(entry.supported for entry in found) >= LEAST_SUPPORTED
    may = {name for module in FAMILIES for name in timm.list_models(module=module)}
    refused = {entry.name: str(entry.reason) for entry in found if not entry.supported}
    assert {entry.name for entry in found} - refused.keys() <= may
    # What is built and refused is refused by what it holds, ...
    assert all("Diff" in refused[name] for name in refused.keys() & may)
    # ... and the others by what timm's module builds.
    assert all("VisionTransformer" in refused[name] for name in refused.keys() - may)


def test_those_without_a_family_are_refused_by_merge_too() -> None:
    """Guards the short cut: a module that knows none of the classes can't build one."""
    others = sorted(set(timm.list_modules()) - set(FAMILIES))
    tried = [
        name for name in ("beit", "vision_transformer_sam", "cait", "resnet", "swin_transformer") if name in others
    ]
    assert tried
    for module in tried:
        name = timm.list_models(module=module)[0]
        [entry] = entrypoints(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        assert not entry.supported
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            merge(model)


def test_a_pattern_chooses_among_them() -> None:
    found = list(entrypoints("*small*dinov3"))
    assert found
    assert all("dinov3" in entry.name and entry.supported for entry in found)
    assert list(entrypoints("no such model")) == []
