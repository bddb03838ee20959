import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.server.models.conftest import ARCHITECTURE, KWARGS
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.merging import MergedModel
from tome_server.models import loading
from tome_server.models.loaded import LoadedModel
from tome_server.models.loading import create, load
from tome_server.models.model_info import Quality
from tome_server.models.quality_report import stored_schedules
from tome_server.models.spec import ModelSpec, bundled_spec, weights_digest

CPU = torch.device("cpu")


def refusal(spec: ModelSpec) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(spec, CPU)
    return str(caught.value)


def same_logits(hosted: LoadedModel, model: nn.Module) -> bool:
    image = torch.rand(2, *hosted.info.preprocess.settings.input_size)
    with torch.inference_mode():
        return torch.allclose(hosted.merged(image).logits, model(image), rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the hub with random weights; returns the architectures that were asked for."""
    asked: list[str] = []
    create = timm.create_model

    def random(architecture: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            asked.append(architecture)
        return create(architecture, **kwargs)

    monkeypatch.setattr(timm, "create_model", random)
    return asked


def test_the_bundled_model_is_complete() -> None:
    hosted = load(bundled_spec("fashion"), CPU)
    assert hosted.info.name == "fashion"
    assert len(hosted.info.labels) == hosted.info.num_classes == 10
    assert "sandal" in {label.lower() for label in hosted.info.labels}
    assert hosted.info.patch_grid == (14, 14)
    assert hosted.info.preprocess.settings.input_size == (3, 28, 28)
    assert hosted.info.default_budget is None
    assert hosted.info.relative_quality is not None
    assert hosted.info.description


def test_an_unknown_bundled_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no bundled model is named 'fashoin'; there is fashion"):
        bundled_spec("fashoin")


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_local_weights_give_the_model_they_were_saved_from(
    spec: ModelSpec, tiny: nn.Module, tmp_path: Path, key: str | None, prefix: str
) -> None:
    weights: dict[str, Any] = {prefix + name: value for name, value in tiny.state_dict().items()}
    checkpoint = tmp_path / "weights.pth"
    torch.save({key: weights, "epoch": 3} if key else weights, checkpoint)
    assert same_logits(load(spec, CPU), tiny)
    assert same_logits(load(replace(spec, checkpoint=checkpoint), CPU), tiny)


def test_a_loaded_model_is_ready_to_serve(spec: ModelSpec) -> None:
    hosted = load(spec, CPU)
    assert not hosted.merged.training
    assert not any(parameter.requires_grad for parameter in hosted.merged.parameters())
    assert hosted.info.labels == ()
    assert hosted.info.num_classes == 7
    assert hosted.info.feature_dim == 48


class Evil:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_code_in_a_checkpoint_is_reported_and_not_run(spec: ModelSpec, tmp_path: Path) -> None:
    trace, checkpoint = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({"state_dict": Evil(trace)}, checkpoint)
    assert f"checkpoint {checkpoint} can't be read" in refusal(replace(spec, checkpoint=checkpoint))
    checkpoint.write_bytes(pickle.dumps(Evil(trace)))
    assert f"checkpoint {checkpoint} can't be read" in refusal(replace(spec, checkpoint=checkpoint))
    assert not trace.exists()


def test_weights_that_do_not_fit_are_named(spec: ModelSpec, tiny: nn.Module, tmp_path: Path) -> None:
    weights = tiny.state_dict()
    del weights["blocks.1.mlp.fc1.bias"]
    weights["blocks.2.mlp.fc1.bias"] = torch.zeros(3)
    weights["head.weight"] = torch.zeros(9, 48)
    checkpoint = tmp_path / "other.safetensors"
    save_file(weights, checkpoint)
    message = refusal(replace(spec, checkpoint=checkpoint))
    assert f"{checkpoint} doesn't fit vit_tiny_patch16_224" in message
    assert "missing: blocks.1.mlp.fc1.bias;" in message
    assert "unexpected: blocks.2.mlp.fc1.bias;" in message
    assert message.endswith("of another shape: head.weight [9, 48] for [7, 48]")


def test_of_many_weights_that_do_not_fit_a_few_are_named(spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, checkpoint)
    message = refusal(replace(spec, checkpoint=checkpoint))
    assert "cls_token, pos_embed," in message
    assert "and 27 more" in message


@pytest.mark.parametrize("content", [[1, 2], 3, "text", {"state_dict": 3}, {"state_dict": {1: torch.zeros(1)}}])
def test_a_pth_that_holds_no_weights_is_reported(spec: ModelSpec, tmp_path: Path, content: object) -> None:
    checkpoint = tmp_path / "other.pth"
    torch.save(content, checkpoint)
    assert "can't be read" in refusal(replace(spec, checkpoint=checkpoint))


def test_a_weight_that_is_no_tensor_is_missing(spec: ModelSpec, tiny: nn.Module, tmp_path: Path) -> None:
    checkpoint = tmp_path / "other.pth"
    torch.save({**tiny.state_dict(), "cls_token": 3}, checkpoint)
    assert refusal(replace(spec, checkpoint=checkpoint)).endswith("missing: cls_token")


@pytest.mark.parametrize("name", ["empty.pth", "empty.safetensors"])
def test_an_empty_file_is_reported_with_a_reason(spec: ModelSpec, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    message = refusal(replace(spec, checkpoint=tmp_path / name))
    assert "can't be read: " in message
    assert "can't be read: ;" not in message


def test_a_checkpoint_that_is_not_there_is_reported(spec: ModelSpec, tmp_path: Path) -> None:
    assert refusal(replace(spec, checkpoint=tmp_path / "gone.pth")).endswith("gone.pth is no file")
    assert "is no file" in refusal(replace(spec, checkpoint=tmp_path))


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("vit_bas_patch16_224", "did you mean vit_base_patch16_224"),
        ("vit_base_patch16_225", "did you mean vit_base_patch16_224"),
        ("ViT_base_patch16_224.augreg_in21k", "did you mean vit_base_patch16_224"),
        ("deit3", "did you mean deit3_base_patch16_224"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest(spec: ModelSpec, architecture: str, hint: str) -> None:
    message = refusal(replace(spec, architecture=architecture))
    assert message.startswith(f"timm has no model named '{architecture}'")
    assert hint in message


def test_for_nothing_like_an_architecture_the_list_of_them_is_named(spec: ModelSpec) -> None:
    assert refusal(replace(spec, architecture="12345678")) == (
        "timm has no model named '12345678'; tome-server models supported lists those there are"
    )


def test_an_unknown_tag_is_named(spec: ModelSpec) -> None:
    assert "nonsense" in refusal(replace(spec, architecture="vit_tiny_patch16_224.nonsense"))


def test_an_architecture_that_cannot_be_merged_says_so(spec: ModelSpec) -> None:
    beit = replace(spec, architecture="beit_base_patch16_224", kwargs={"depth": 1})
    assert "beit_base_patch16_224 can't be merged: model is a Beit" in refusal(beit)


def test_an_architecture_that_cannot_be_merged_is_not_downloaded(spec: ModelSpec, no_hub: list[str]) -> None:
    for architecture in ("beit_base_patch16_224", "resnet18"):
        assert "can't be merged" in refusal(ModelSpec(name="other", architecture=architecture))
    assert no_hub == []


def test_kwargs_that_do_not_fit_are_named(spec: ModelSpec) -> None:
    assert "nonsense" in refusal(replace(spec, kwargs={"nonsense": 1}))


def test_without_the_hub_the_way_out_is_named(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(timm, "create_model", unreachable)
    message = refusal(replace(spec, checkpoint=None))
    assert "pretrained weights from the hub: name resolution failed. Where the hub can't be reached, give " in message


def test_pretrained_weights_are_asked_for_once_without_a_checkpoint(spec: ModelSpec, no_hub: list[str]) -> None:
    load(replace(spec, checkpoint=None), CPU)
    assert no_hub == [spec.architecture]


def test_labels_come_from_a_file_one_a_line(spec: ModelSpec, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("zero\none\nthe second\nthree\nfour\nfünf\nsix\n", encoding="utf-8")
    assert load(replace(spec, labels=labels), CPU).info.labels == (
        "zero",
        "one",
        "the second",
        "three",
        "four",
        "fünf",
        "six",
    )


def test_labels_of_another_number_are_refused(spec: ModelSpec, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("only one\n")
    assert refusal(replace(spec, labels=labels)).endswith("labels.txt has 1 labels; tiny has 7 classes")


def test_labels_that_cannot_be_read_are_reported(spec: ModelSpec, tmp_path: Path) -> None:
    assert "can't be read" in refusal(replace(spec, labels=tmp_path / "gone.txt"))
    (tmp_path / "latin1.txt").write_bytes("grün\n".encode("latin-1") * 7)
    assert "latin1.txt can't be read" in refusal(replace(spec, labels=tmp_path / "latin1.txt"))


def test_a_model_of_imagenets_classes_gets_its_names(spec: ModelSpec, no_hub: list[str]) -> None:
    kwargs = {**spec.kwargs, "num_classes": 1000}
    labels = load(ModelSpec(name="imagenet", architecture=spec.architecture, kwargs=kwargs), CPU).info.labels
    assert len(labels) == 1000
    assert labels[0].startswith("tench")
    assert labels[999].startswith("toilet tissue")


def report(spec: ModelSpec, **changes: object) -> dict[str, object]:
    levels = [{"r": 0, "agreement": 1.0, "top1": 0.8}, {"r": 4, "agreement": 0.9, "top1": None}]
    digest = weights_digest(spec.checkpoint) if spec.checkpoint else None
    return {"model": spec.architecture, "weights_sha256": digest, "levels": levels, **changes}


def with_report(spec: ModelSpec, folder: Path, content: object) -> ModelSpec:
    quality = folder / "quality.json"
    quality.write_text(json.dumps(content))
    return replace(spec, quality=quality)


def test_a_quality_report_says_what_each_r_is_worth(spec: ModelSpec, tmp_path: Path) -> None:
    hosted = load(with_report(spec, tmp_path, report(spec)), CPU)
    assert hosted.info.quality == {0: Quality(1.0, 0.8), 4: Quality(0.9, None)}
    assert {level.r: level.quality for level in hosted.info.grid if level.quality} == hosted.info.quality


def with_schedule(spec: ModelSpec, folder: Path, schedule: object, **changes: object) -> ModelSpec:
    levels = [{"r": 0, "agreement": 1.0}, {"r": 4, "agreement": 0.9, "schedule": schedule}]
    return with_report(spec, folder, report(spec, levels=levels, **changes))


def test_a_quality_report_may_say_how_much_each_block_merges(spec: ModelSpec, tmp_path: Path) -> None:
    plain, hosted = load(spec, CPU), load(with_schedule(spec, tmp_path, [5, 2]), CPU)
    assert hosted.info.schedules == {4: (5, 2)}
    assert hosted.info.cost(4).tokens == (12, 10)
    assert hosted.info.cost(4).total <= plain.info.cost(4).total
    assert hosted.info.rs == plain.info.rs


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ([4, 4, 4], r"quality\.json: the schedule has 3 values, the model 2 blocks"),
        ([3, 4], r"quality\.json: the schedule of r = 4 takes .* multiply-accumulates, not"),
        ([9, 0], r"quality\.json: .* can't merge 9 of 17 tokens in block 0"),
        ([4.5, 4], r"levels\[1\]\.schedule\[0\] must be a whole number of 0 to 16,384, not 4.5"),
        ("44", r"levels\[1\]\.schedule must be a list, not 44"),
        (None, r"quality\.json can't be read"),
        (4, r"quality\.json can't be read"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(spec: ModelSpec, tmp_path: Path, schedule: object, error: str) -> None:
    assert re.search(error, refusal(with_schedule(spec, tmp_path, schedule)))


def test_schedules_outlive_what_was_measured_but_not_the_weights(spec: ModelSpec, tmp_path: Path) -> None:
    assert stored_schedules(spec) == {}
    assert stored_schedules(with_schedule(spec, tmp_path, [5, 2])) == {4: (5, 2)}
    assert stored_schedules(with_schedule(spec, tmp_path, [5, 2], weights_sha256="0" * 64)) == {}
    assert stored_schedules(with_report(spec, tmp_path, [])) == {}
    assert load(replace(spec, schedules={4: (5, 2)}), CPU).info.schedules == {4: (5, 2)}


def test_a_quality_report_of_other_weights_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    other = with_report(spec, tmp_path, report(spec, weights_sha256="0" * 64))
    assert "measured on other weights" in refusal(other)
    assert "run tome-server evaluate again" in refusal(other)


def test_pretrained_weights_need_a_report_of_that_very_model(
    spec: ModelSpec, tmp_path: Path, no_hub: list[str]
) -> None:
    pretrained = replace(spec, checkpoint=None)
    assert load(with_report(pretrained, tmp_path, report(pretrained)), CPU).info.quality[4] == Quality(0.9)
    for wrong in (report(spec), report(pretrained, model="vit_small_patch16_224")):
        assert "measured on other weights" in refusal(with_report(pretrained, tmp_path, wrong))


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        {},
        {"levels": None},
        {"levels": [3]},
        {"levels": [{"r": 0}]},
        {"levels": [{"agreement": 1.0}]},
        {"levels": [{"r": 0, "agreement": "much"}]},
        {"levels": [{"r": "none", "agreement": 1.0}]},
        {"levels": [{"r": 0, "agreement": 1.0, "top1": []}]},
    ],
)
def test_a_malformed_quality_report_is_refused(spec: ModelSpec, tmp_path: Path, content: object) -> None:
    assert "quality.json can't be read" in refusal(with_report(spec, tmp_path, content))


def test_a_quality_report_that_is_no_json_or_not_there_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    quality = tmp_path / "quality.json"
    assert "can't be read" in refusal(replace(spec, quality=quality))
    quality.write_text("{")
    assert "can't be read" in refusal(replace(spec, quality=quality))


def test_the_default_budget_is_the_specs(spec: ModelSpec) -> None:
    assert load(spec, CPU).info.default_budget is None
    assert load(replace(spec, default_budget=0.25), CPU).info.default_budget == 0.25


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_model_that_merging_would_change_at_r_0_is_refused(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    forward = MergedModel.forward

    def wrong(self: MergedModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return replace(output, logits=output.logits + error * output.logits.abs().max())

    monkeypatch.setattr(MergedModel, "forward", wrong)
    assert "merging would change this model even at r = 0" in refusal(spec)


def test_the_input_size_is_the_models_own(spec: ModelSpec) -> None:
    # timm's data config says 224, which is what the architecture's pretrained weights take.
    assert load(spec, CPU).info.preprocess.settings.input_size == (3, 32, 32)


def test_data_overrides_timms_data_config(spec: ModelSpec) -> None:
    data = {"mean": [0.1, 0.2, 0.3], "std": [0.5], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    settings = load(replace(spec, data=data), CPU).info.preprocess.settings
    assert settings.mean == (0.1, 0.2, 0.3)
    assert settings.std == (0.5, 0.5, 0.5)
    assert (settings.crop_pct, settings.crop_mode, settings.interpolation) == (1.0, "squash", "bilinear")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"crop": 0.9}, "data of tiny: crop is none of input_size, mean, std, interpolation"),
        ({"input_size": [3, 32]}, "input_size is [channels, height, width]"),
        ({"input_size": [3, 48, 48]}, "the model fails on an input of [3, 48, 48]"),
        ({"mean": [0.1, 0.2]}, "mean and std are lists of one number a channel"),
        ({"mean": 0.5}, "data of tiny: "),
        ({"std": [0, 0, 0]}, "no std may be 0"),
        ({"interpolation": "cubic"}, "'cubic' is none of nearest"),
        ({"crop_mode": "centre"}, "'centre' is none of center"),
        ({"crop_pct": "all"}, "data of tiny: "),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(spec: ModelSpec, data: dict[str, Any], says: str) -> None:
    assert says in refusal(replace(spec, data=data))


def test_a_grey_model_must_be_told_its_mean_and_std(spec: ModelSpec, no_hub: list[str]) -> None:
    grey = replace(spec, kwargs={**spec.kwargs, "in_chans": 1}, checkpoint=None)
    assert "mean and std take 1 numbers" in refusal(grey)
    settings = load(replace(grey, data={"mean": [0.5], "std": [0.5]}), CPU).info.preprocess.settings
    assert settings.input_size == (1, 32, 32)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert weights_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_proportional_attention_is_as_the_spec_says(spec: ModelSpec) -> None:
    assert load(spec, CPU).merged.proportional_attention
    assert not load(replace(spec, proportional_attention=False), CPU).merged.proportional_attention


def test_a_model_that_cannot_be_tried_without_memory_is_built_anyway(
    spec: ModelSpec, no_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def no_meta(architecture: str, **kwargs: Any) -> nn.Module:
        if torch.empty(0).device.type == "meta":
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")
        return create(architecture, **kwargs)

    monkeypatch.setattr(loading.timm, "create_model", no_meta)
    load(replace(spec, checkpoint=None), CPU)
    assert no_hub == [spec.architecture]


# Other types than float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_runs_in_the_type_it_is_told_to(spec: ModelSpec, dtype: Any) -> None:
    plain, lesser = load(spec, CPU), load(replace(spec, dtype=dtype), CPU)
    assert lesser.info.dtype == dtype
    assert {parameter.dtype for parameter in lesser.merged.parameters()} == {getattr(torch, dtype)}
    assert 2 * lesser.info.weights_bytes == plain.info.weights_bytes
    images = torch.rand(3, *plain.info.preprocess.settings.input_size)
    with torch.inference_mode():
        for r in (0, 2):
            exact = plain.merged(plain.input(images, CPU), r).logits
            near = lesser.merged(lesser.input(images, CPU), r).logits
            assert near.dtype == getattr(torch, dtype)
            assert torch.allclose(near.float(), exact, atol=0.05 * float(exact.abs().max()))


def test_a_quality_report_of_another_type_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    report = tmp_path / "quality.json"
    levels = [{"r": 0, "agreement": 0.99, "top1": 0.8}]
    digest = weights_digest(spec.checkpoint)
    report.write_text(json.dumps({"weights_sha256": digest, "levels": levels}))
    assert "was measured in float32, not bfloat16" in refusal(replace(spec, dtype="bfloat16", quality=report))
    report.write_text(json.dumps({"weights_sha256": digest, "dtype": "bfloat16", "levels": levels}))
    assert "was measured in bfloat16, not float32" in refusal(replace(spec, quality=report))


def test_little_agreement_with_float32_is_said(
    spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = tmp_path / "quality.json"
    for agreement, said in ((0.996, False), (0.99, True)):
        levels = [{"r": 0, "agreement": agreement, "top1": None}]
        content = {"weights_sha256": weights_digest(spec.checkpoint), "dtype": "bfloat16", "levels": levels}
        report.write_text(json.dumps(content))
        caplog.clear()
        load(replace(spec, dtype="bfloat16", quality=report), CPU)
        assert ("agrees with float32 on only 99.00 %" in caplog.text) == said


def test_weights_beyond_what_a_lesser_type_holds_are_named(spec: ModelSpec, tiny: nn.Module, tmp_path: Path) -> None:
    weights = tiny.state_dict() | {"head.bias": torch.full((7,), 1e6)}
    checkpoint = tmp_path / "large.safetensors"
    save_file(weights, checkpoint)
    load(replace(spec, checkpoint=checkpoint), CPU)
    said = refusal(replace(spec, checkpoint=checkpoint, dtype="float16"))
    assert said == f"{checkpoint} in float16: head.bias holds infinity; such weights give no answer"


@pytest.mark.parametrize("changes", [{"embed_dim": 3 * 512, "depth": 12}, {"num_classes": 10**7}, {"mlp_ratio": 1e4}])
def test_arguments_that_ask_for_far_more_memory_than_the_weights_take_are_refused_before_it_is_taken(
    spec: ModelSpec, changes: dict[str, Any]
) -> None:
    """`create` is the last to look: what `outline` can't build without memory comes here unchecked."""
    torch_made: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and not made.is_meta:
                torch_made.append(made.nbytes)
            return made

    with Watch(), pytest.raises(ModelLoadError, match=r"tiny: kwargs make it take more than [0-9,]+ MiB of memory"):
        create(replace(spec, kwargs={**KWARGS, **changes}))
    assert sum(torch_made) < 2**30


def test_too_large_arguments_for_weights_of_the_hub_are_refused_before_memory_is_taken_or_anything_fetched() -> None:
    large = ModelSpec(name="large", architecture=ARCHITECTURE, kwargs={"embed_dim": 3 * 4096})
    with pytest.raises(ModelLoadError, match="large: kwargs make it take more than"):
        create(large)
