import builtins
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tome_server.errors import ModelLoadError
from tome_server.models.weights.importing import fitted, read_weights

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 0.1}


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    """A model with DINOv2's parts and no classifier."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as Hugging Face's Dinov2Model names and splits them."""
    found = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for piece, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"encoder.layer.{part[1]}.attention.attention.{piece}.{part[2]}"] = value.clone()
            continue
        for ours, theirs in {
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "attn.proj": "attention.output.dense",
            "ls1.gamma": "layer_scale1.lambda1",
            "ls2.gamma": "layer_scale2.lambda1",
            "blocks.": "encoder.layer.",
        }.items():
            name = name.replace(ours, theirs)
        found[re.sub(r"^norm\.", "layernorm.", name)] = tensor
    return found


def export(model: nn.Module, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one, and that it traces
        torch.onnx.export(model, (torch.rand(1, 3, 32, 32),), str(path), dynamo=False, **options)
    return path


def same(given: dict[str, Tensor], model: nn.Module) -> bool:
    wanted = model.state_dict()
    return given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_timms_own_weights_stay_as_they_are(tiny: nn.Module, tmp_path: Path) -> None:
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    assert weights.num_classes == 7
    assert weights.left_out == ()
    assert same(fitted(weights, tiny), tiny)


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.dinov2."])
def test_hugging_faces_names_become_timms(backbone: nn.Module, tmp_path: Path, prefix: str) -> None:
    saved = {prefix + name: value for name, value in hugging_face(backbone.state_dict()).items()}
    saved |= {"decoder.weight": torch.zeros(3), f"{prefix}embeddings.mask_token": torch.zeros(1, 48)}
    if not prefix:
        del saved["decoder.weight"]  # nothing tells it from the rest
    save_file(saved, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path / "model.safetensors")
    assert same(fitted(weights, backbone), backbone)
    assert weights.num_classes == 0
    assert set(weights.left_out) == {"decoder.weight", f"{prefix}embeddings.mask_token"} & saved.keys()


def test_an_onnx_export_gives_back_the_weights_it_was_made_of(tiny: nn.Module, tmp_path: Path) -> None:
    # A new model's biases are all zero, of which an export keeps one.
    weights = read_weights(export(tiny, tmp_path / "model.onnx"))
    assert same(fitted(weights, tiny), tiny)
    assert weights.input_size == (32, 32)
    assert weights.num_classes == 7


def test_an_onnx_export_for_any_size_says_none(tiny: nn.Module, tmp_path: Path) -> None:
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    path = export(tiny, tmp_path / "model.onnx", input_names=["images"], dynamic_axes=axes)
    assert read_weights(path).input_size is None


def test_position_embeddings_of_another_grid_are_resized(tiny: nn.Module, tmp_path: Path) -> None:
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    larger = timm.create_model("vit_tiny_patch16_224", **{**KWARGS, "init_values": None, "img_size": 48}, num_classes=7)
    given = fitted(read_weights(tmp_path / "weights.safetensors"), larger)
    assert given["pos_embed"].shape == (1, 37, 48)
    assert torch.equal(given["pos_embed"][:, :1], tiny.state_dict()["pos_embed"][:, :1])


def test_a_head_is_dropped_where_none_is_wanted(tiny: nn.Module, tmp_path: Path) -> None:
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    headless = timm.create_model("vit_tiny_patch16_224", **{**KWARGS, "init_values": None}, num_classes=0)
    assert fitted(read_weights(tmp_path / "weights.safetensors"), headless).keys() == headless.state_dict().keys()


@pytest.mark.parametrize("name", ["gone.pth", "gone.onnx", "gone.safetensors"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{name} is no file"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x01\x12\x02" * 50, b"\xff" * 4000])
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.onnx can't be read as ONNX: ."):
        read_weights(tmp_path / "model.onnx")


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "tome_server.models.weights.onnx_weights":
            raise ModuleNotFoundError("No module named 'onnx'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelLoadError, match=r"No module named 'onnx'; it needs: pip install 'tome-serving\[onnx\]'"):
        read_weights(tmp_path / "model.onnx")
