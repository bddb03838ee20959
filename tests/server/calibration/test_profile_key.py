import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from tome_server.calibration.environment import device_name
from tome_server.calibration.profile_key import profile_key
from tome_server.merging import merge, pack
from tome_server.models.loaded import LoadedModel, with_schedules

CPU = torch.device("cpu")


def test_the_key_holds_what_latency_depends_on(model: LoadedModel, tmp_path: Path) -> None:
    checkpoint = tmp_path / "weights"
    checkpoint.write_bytes(b"")
    key = profile_key(model, checkpoint, CPU, 4)
    assert key.weights == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert key.model == "vit_tiny_patch16_224"
    assert key.rs == tuple(level.r for level in model.info.grid)
    assert key.macs == tuple(level.cost.total for level in model.info.grid)
    assert (key.dtype, key.max_batch, key.input_size) == ("float32", 4, (3, 16, 16))
    assert key.torch == torch.__version__
    assert key.device == device_name(CPU) != ""
    assert profile_key(model, None, CPU, 4).weights == "hub:vit_tiny_patch16_224"


def test_the_key_holds_schedules_for_equal_work_may_take_another_time(model: LoadedModel) -> None:
    constant, written = (profile_key(m, None, CPU, 4) for m in (model, with_schedules(model, {2: (2, 2)})))
    assert constant.schedules == ""
    assert written.schedules == "2: 2 2"
    assert written.macs == constant.macs
    assert written.digest != constant.digest


def test_the_key_holds_what_a_few_threads_divide_among_them(model: LoadedModel) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval().requires_grad_(False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        divisions = []
        for divided in (False, True):
            packed = replace(model, merged=pack(merge(network), divided=divided))
            divisions.append(profile_key(packed, None, CPU, 4).division)
    finally:
        torch.set_num_threads(before)
    assert divisions == ["images", "images and blocks"]
    assert profile_key(model, None, CPU, 4).division == ""


def test_the_key_holds_the_threads_that_were_set_last(model: LoadedModel) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert profile_key(model, None, CPU, 4).threads == threads
    finally:
        torch.set_num_threads(before)


def test_what_is_run_from_its_source_has_no_version_and_a_profile_all_the_same(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def of_others(name: str) -> str:
        if name == "tome-serving":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert profile_key(model, None, torch.device("cpu"), 4).tome_serving == "0+unknown"
