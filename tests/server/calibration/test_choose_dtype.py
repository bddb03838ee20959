import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tome_server.calibration import choose_dtype, speedups
from tome_server.calibration.choose_dtype import LEAST_GAIN, LEAST_IMAGES, choose, load_chosen, measure_gain
from tome_server.calibration.profile_key import profile_key
from tome_server.config.dtypes import Dtype
from tome_server.errors import ModelLoadError
from tome_server.execution.batch import BatchItem, BatchResult
from tome_server.merging import MergedModel
from tome_server.merging.cpu import matching_c, packing
from tome_server.merging.cpu.packing import packed_dtypes
from tome_server.models import loading
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import load
from tome_server.models.quality_report import LEAST_AGREEMENT
from tome_server.models.spec import ModelSpec, in_dtype, qualities, quality_file, weights_digest

# What was measured is kept for good.
pytestmark = pytest.mark.usefixtures("quiet")

CPU = torch.device("cpu")
ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A small model with quality reports in float32 and in bfloat16, which agree well."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = folder / "weights.safetensors"
    save_file(timm.create_model(ARCHITECTURE, **KWARGS).state_dict(), checkpoint)
    report = {"weights_sha256": weights_digest(checkpoint), "images": 10_000}
    for dtype, agreement in (("float32", 1.0), ("bfloat16", 0.9979)):
        levels = [{"r": 0, "agreement": agreement, "top1": agreement - 0.1}]
        quality_file(folder, dtype).write_text(json.dumps(report | {"dtype": dtype, "levels": levels}))
    return ModelSpec(
        name="tiny",
        architecture=ARCHITECTURE,
        kwargs=KWARGS,
        checkpoint=checkpoint,
        profiles=folder / "profiles",
        **qualities(folder / "quality.json", "auto"),
    )


# What is chosen

AGREEMENTS = st.floats(0, 1) | st.sampled_from([LEAST_AGREEMENT, math.nan])
IMAGES = st.integers(0, 100_000) | st.sampled_from([LEAST_IMAGES - 1, LEAST_IMAGES])
GAINS = st.none() | st.floats(0, 100) | st.sampled_from([LEAST_GAIN, math.nan])


@given(AGREEMENTS, IMAGES, GAINS)
def test_bfloat16_is_chosen_where_it_agrees_on_enough_images_and_gains_enough_and_nowhere_else(
    agreement: float, images: int, gain: float | None
) -> None:
    chosen = choose(agreement, images, lambda: gain)
    agrees = agreement >= LEAST_AGREEMENT and images >= LEAST_IMAGES
    gains = gain is not None and gain >= LEAST_GAIN
    assert chosen.dtype == ("bfloat16" if agrees and gains else "float32")
    assert chosen.reason


@given(AGREEMENTS, IMAGES)
def test_nothing_is_measured_where_agreement_does_not_suffice(agreement: float, images: int) -> None:
    asked: list[float] = []

    def gain() -> float:
        asked.append(2.0)
        return 2.0

    choose(agreement, images, gain)
    assert len(asked) == (agreement >= LEAST_AGREEMENT and images >= LEAST_IMAGES)


# How it is measured


class Device:
    """Says that a batch takes so many seconds, by dtype, for each image; and remembers what was run."""

    def __init__(self, float32: float, bfloat16: float) -> None:
        self.seconds = {"float32": float32, "bfloat16": bfloat16}
        self.sizes: list[int] = []

    def __call__(self, model: LoadedModel, batch: Sequence[BatchItem[Any]], *_: object, **__: object) -> BatchResult:
        self.sizes.append(len(batch))
        return BatchResult((), len(batch) * self.seconds[model.info.dtype])


@pytest.fixture(scope="module")
def both(spec: ModelSpec) -> dict[Dtype, LoadedModel]:
    return {dtype: load(in_dtype(spec, dtype), CPU) for dtype in ("float32", "bfloat16")}


def measured(both: dict[Dtype, LoadedModel], device: Device, max_batch: int = 8) -> float:
    return measure_gain(both, CPU, max_batch=max_batch, run=device)


@pytest.mark.parametrize(("seconds", "size"), [(0.001, 8), (0.04, 8), (0.08, 4), (0.3, 1)])
def test_batches_are_as_large_as_time_allows(both: dict[Dtype, LoadedModel], seconds: float, size: int) -> None:
    device = Device(seconds, seconds / 2)
    assert measured(both, device) == pytest.approx(2)
    assert max(device.sizes) == size


def test_a_single_image_is_all_that_a_server_without_batches_is_measured_with(both: dict[Dtype, LoadedModel]) -> None:
    device = Device(0.002, 0.001)
    assert measured(both, device, max_batch=1) == pytest.approx(2)
    assert set(device.sizes) == {1}


@pytest.mark.parametrize(("seconds", "size"), [(0.001, 8), (0.3, 1)])
def test_a_gpu_is_asked_for_a_graph_of_the_batch_that_is_measured_and_judged_by_it(
    both: dict[Dtype, LoadedModel], seconds: float, size: int
) -> None:
    """As a GPU does, batches take the same in both types but by graphs."""
    device, asked = Device(seconds, seconds), list[tuple[str, int, int]]()

    def graphed(model: LoadedModel, size: int, r: int) -> LoadedModel:
        asked.append((model.info.dtype, size, r))
        return replace(model, graphs=model.merged)

    def run(model: LoadedModel, batch: Sequence[BatchItem[Any]], *_: object, **__: object) -> BatchResult:
        result = device(model, batch)
        by_graph = {"float32": 1 / 2, "bfloat16": 1 / 8}
        return replace(result, seconds=result.seconds * by_graph[model.info.dtype]) if model.graphs else result

    assert measure_gain(both, CPU, max_batch=8, run=run, graphed=graphed) == pytest.approx(4)
    grid = both["float32"].info.grid
    assert asked == [(dtype, size, grid[len(grid) // 2].r) for dtype in ("float32", "bfloat16")]


def test_a_type_that_the_processor_emulates_is_given_up_soon(both: dict[Dtype, LoadedModel]) -> None:
    device = Device(0.001, 0.1)
    assert measured(both, device) == pytest.approx(0.01)
    assert device.sizes == [1, 1, 1, 1]


# What a model is loaded in


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[str]]:
    """Return a function that has measuring give a number, or raise; it returns a list that grows with each."""

    def stand_in(result: object) -> list[str]:
        asked: list[str] = []

        def measure(models: dict[Dtype, LoadedModel], *_: object, **__: object) -> object:
            asked.append(" and ".join(models))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(choose_dtype, "measure_gain", measure)
        return asked

    return stand_in


def chosen(spec: ModelSpec, folder: Path, **changes: Any) -> LoadedModel:
    settings: dict[str, Any] = {"max_batch": 4, "folder": folder} | changes
    return load_chosen(spec, CPU, **settings)


def reported(spec: ModelSpec, folder: Path, **changes: object) -> ModelSpec:
    """The model with another report of how far bfloat16 agrees with float32."""
    assert spec.quality_bfloat16
    report = json.loads(spec.quality_bfloat16.read_text()) | changes
    (folder / "quality-bfloat16.json").write_text(json.dumps(report))
    return replace(spec, quality_bfloat16=folder / "quality-bfloat16.json")


@pytest.mark.parametrize(("measures", "dtype", "why"), [
    (2.0, "bfloat16", "it is 2.00 times as fast as float32 here, and agrees on 99.79% of 10000 images"),
    (1.05, "float32", "bfloat16 is 1.05 times as fast here, and 1.1 is the least"),
    (MemoryError(), "float32", "there is not the memory to measure bfloat16 beside it"),
])  # fmt: skip
def test_auto_is_what_was_measured_to_be_better_and_the_log_says_why(
    spec: ModelSpec,
    gain: Callable[[object], list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    measures: object,
    dtype: Dtype,
    why: str,
) -> None:
    caplog.set_level(logging.INFO)
    asked = gain(measures)
    model = chosen(spec, tmp_path)
    assert asked == ["float32 and bfloat16"]
    assert model.info.dtype == dtype
    # With the quality that was measured in that.
    assert model.info.quality == load(in_dtype(spec, dtype), CPU).info.quality
    assert f"tiny runs in {dtype}: {why}" in caplog.messages


def test_what_fails_otherwise_than_for_memory_is_no_answer(
    spec: ModelSpec, gain: Callable[[object], list[str]], tmp_path: Path
) -> None:
    gain(ValueError("a fault"))
    with pytest.raises(ValueError, match="a fault"):
        chosen(spec, tmp_path)


def test_a_type_that_is_named_is_not_measured(
    spec: ModelSpec, gain: Callable[[object], list[str]], tmp_path: Path
) -> None:
    asked = gain(2.0)
    for dtype in ("float32", "bfloat16", "float16"):
        assert chosen(in_dtype(spec, dtype), tmp_path).info.dtype == dtype
    assert asked == []


@pytest.mark.parametrize(("report", "why"), [
    ({"levels": [{"r": 0, "agreement": 0.99}]}, "bfloat16 agrees with it on 99.00% of 10000 images, and 99.5% is"),
    ({"images": 20}, "bfloat16 was compared with it on 20 images, and 200 are the least"),
    ({"weights_sha256": "0" * 64}, "quality-bfloat16.json was measured on other weights than"),
    ({"dtype": "float16"}, "quality-bfloat16.json was measured in float16, not bfloat16"),
    ({"levels": [{"r": 2, "agreement": 1.0}]}, "quality-bfloat16.json: levels has none of r = 0"),
    ({"images": None}, "quality-bfloat16.json: images is missing"),
    ({"levels": 3}, "quality-bfloat16.json can't be read: levels must be a list, not 3"),
])  # fmt: skip
def test_without_a_record_that_it_agrees_bfloat16_is_not_even_measured(
    spec: ModelSpec,
    gain: Callable[[object], list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    report: dict[str, object],
    why: str,
) -> None:
    caplog.set_level(logging.INFO)
    asked = gain(2.0)
    assert chosen(reported(spec, tmp_path, **report), tmp_path).info.dtype == "float32"
    assert asked == []
    [line] = [line for line in caplog.messages if line.startswith("tiny runs in float32: ")]
    assert why in line


def test_where_nothing_is_recorded_the_log_names_the_command_that_would(
    spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stored = replace(spec, quality_bfloat16=None)
    chosen(stored, tmp_path)
    chosen(replace(stored, profiles=None), tmp_path)
    chosen(replace(stored, profiles=None, quality=None), tmp_path)
    said = [line for line in caplog.messages if "runs in float32: nothing records whether bfloat16 agrees" in line]
    commands = [line.partition("; ")[2].removesuffix(" does") for line in said]
    assert spec.quality
    assert commands == [
        "tome-server models evaluate tiny --repository DIR --dtype bfloat16 --data IMAGES",
        "tome-server evaluate --dtype bfloat16 --data IMAGES "
        f"--output {spec.quality.with_name('quality-bfloat16.json')}",
        "tome-server evaluate --dtype bfloat16 --data IMAGES --output quality-bfloat16.json",
    ]


def test_it_is_measured_once_for_what_speed_depends_on(
    spec: ModelSpec, gain: Callable[[object], list[str]], tmp_path: Path
) -> None:
    asked = gain(2.0)
    for _ in range(2):
        assert chosen(spec, tmp_path).info.dtype == "bfloat16"
    assert len(asked) == 1
    # Weights that were trained further are as fast, but what bfloat16 costs them is another matter.
    assert chosen(reported(spec, tmp_path, levels=[{"r": 0, "agreement": 0.9}]), tmp_path).info.dtype == "float32"
    assert len(asked) == 1
    for changes in ({"max_batch": 2}, {"anew": True}):
        chosen(spec, tmp_path, **changes)
    chosen(spec, tmp_path / "elsewhere")
    assert len(asked) == 4


def test_what_came_with_the_model_is_taken(
    spec: ModelSpec, gain: Callable[[object], list[str]], tmp_path: Path
) -> None:
    asked = gain(2.0)
    came = replace(spec, profiles=tmp_path / "model")
    chosen(came, tmp_path / "model")
    assert chosen(came, tmp_path / "server").info.dtype == "bfloat16"
    assert len(asked) == 1


def test_it_is_measured_again_where_merging_or_packing_or_threads_have_changed(
    spec: ModelSpec,
    gain: Callable[[object], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
) -> None:
    asked = gain(2.0)
    chosen(spec, tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(matching_c, "BUILT", not matching_c.BUILT)
        chosen(spec, tmp_path)
    assert len(asked) == 2
    with monkeypatch.context() as changed:
        for module in (packing, speedups):
            changed.setattr(module, "packed_dtypes", lambda: ())
        chosen(spec, tmp_path)
    assert len(asked) == 3
    torch.set_num_threads(1)
    chosen(spec, tmp_path)
    assert len(asked) == 4
    torch.set_num_threads(2)
    chosen(spec, tmp_path)
    assert len(asked) == 4


# What a few threads divide


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dividing(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> Callable[[float], list[torch.dtype]]:
    """Return a function that has dividing an image measured to gain so much; its list grows by the dtype with each."""

    def stand_in(gain: float) -> list[torch.dtype]:
        asked: list[torch.dtype] = []

        def measure(merged: MergedModel) -> float:
            asked.append(next(merged.parameters()).dtype)
            return gain

        monkeypatch.setattr(loading, "division_gain", measure)
        return asked

    return stand_in


@pytest.mark.parametrize(("gain", "later", "division"), [(1.19, 1.2, "images"), (1.2, 1.19, "images and blocks")])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_threads_divide_stays_the_same_from_start_to_start_however_busy_the_machine_is(
    spec: ModelSpec,
    dividing: Callable[[float], list[torch.dtype]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    gain: float,
    later: float,
    division: str,
    dtype: Literal["auto", "float32"],
) -> None:
    caplog.set_level(logging.INFO)
    spec = replace(spec, dtype=dtype, quality_bfloat16=None)
    said = f"tiny: 2 CPU threads divide {division}: one image is {gain:.2f} times as fast on all of them as on one"
    asked = dividing(gain)
    first = chosen(spec, tmp_path)
    assert asked == [torch.float32]
    asked = dividing(later)
    second = chosen(spec, tmp_path)
    assert [first.info.division, second.info.division] == [division] * 2
    assert profile_key(first, None, CPU, 4) == profile_key(second, None, CPU, 4)
    assert asked == []
    assert caplog.text.count(said) == 2
    # Until all is measured anew.
    assert chosen(spec, tmp_path, anew=True).info.division != division
    assert chosen(spec, tmp_path).info.division != division


@pytest.mark.skipif(torch.bfloat16 not in packed_dtypes(), reason="the CPU computes nothing in bfloat16")
def test_dtypes_are_compared_with_what_threads_divide_in_each_and_that_one_serves(
    spec: ModelSpec, dividing: Callable[[float], list[torch.dtype]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[dict[Dtype, LoadedModel]] = []

    def measure(models: dict[Dtype, LoadedModel], *_: object, **__: object) -> float:
        compared.append(dict(models))
        return 2.0

    monkeypatch.setattr(choose_dtype, "measure_gain", measure)
    asked = dividing(1.5)
    model = chosen(spec, tmp_path)
    assert asked == [torch.float32, torch.bfloat16]
    assert [(dtype, one.info.division) for dtype, one in compared[0].items()] == [
        ("float32", "images and blocks"),
        ("bfloat16", "images and blocks"),
    ]
    assert model is compared[0]["bfloat16"]
    dividing(1.0)
    again = chosen(spec, tmp_path)
    assert (again.info.dtype, again.info.division) == ("bfloat16", "images and blocks")
    assert len(compared) == 1


def test_one_thread_divides_nothing_and_the_log_does_not_speak_of_it(
    spec: ModelSpec, dividing: Callable[[float], list[torch.dtype]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked = dividing(2.0)
    torch.set_num_threads(1)
    model = chosen(replace(spec, dtype="float32"), tmp_path)
    assert (asked, model.info.division, model.division_gain) == ([], "", None)
    assert "divide" not in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_refused_as_ever(spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="did you mean"):
        chosen(replace(spec, architecture="vit_tiny_patch16_225"), tmp_path)
    with pytest.raises(ModelLoadError, match="did you mean"):
        chosen(replace(spec, architecture="vit_tiny_patch16_225", quality_bfloat16=None), tmp_path)


def test_the_real_measurement_gives_a_ratio(both: dict[Dtype, LoadedModel]) -> None:
    assert 0 < measure_gain(both, CPU, max_batch=2, budget=0.1) < 1000
