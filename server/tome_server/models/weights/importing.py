"""Brings weights that other code saved into the form of timm's own models."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import timm
import torch
from torch import Tensor, nn

from tome_server.errors import ModelLoadError
from tome_server.merging.geometry import default_size, patch_grid
from tome_server.merging.support import check_supported
from tome_server.models.weights.checkpoint_header import SUFFIX
from tome_server.models.weights.checkpoints import outlined_checkpoint, read_checkpoint

# Names of Hugging Face's Dinov2Model, and what timm calls the same parameters.
_DINOV2_MARK = "embeddings.patch_embeddings.projection.weight"
_DINOV2_NAMES = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"encoder\.layer\.(\d+)\.(norm1|norm2)\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)", r"blocks.\1.mlp.\2.\3"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(weight|bias)", r"blocks.\1.mlp.w12.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(weight|bias)", r"blocks.\1.mlp.w3.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
)
_DINOV2_QKV = r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)"
# Only used in training.
_DINOV2_UNUSED = ("embeddings.mask_token",)


@dataclass(frozen=True)
class ImportedWeights:
    """Weights under timm's names, from which a model can be built and filled."""

    path: Path
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]
    """Tensors of the file that aren't part of a Vision Transformer, such as those of a decoder."""
    input_size: tuple[int, int] | None = None
    """Height and width in pixels that the export is for, if it says so."""
    antialias: bool = True
    """Whether the code that saved the weights antialiases position embeddings when it resizes them."""

    @property
    def num_classes(self) -> int:
        """The number of classes of the head; 0 for a backbone without one."""
        head = self.tensors.get("head.weight")
        return len(head) if head is not None and head.ndim else 0


def read_weights(path: Path) -> ImportedWeights:
    """Read a checkpoint: .safetensors, .pth or .bin (tensors only, no pickled code), or .onnx.

    Raises ModelLoadError if it can't be read, or if it is an ONNX file and the package onnx is missing.
    """
    if path.suffix == ".onnx" and path.is_file():
        try:
            from tome_server.models.weights.onnx_weights import read_onnx
        except ModuleNotFoundError as error:
            raise ModelLoadError(f"{path}: {error}; it needs: pip install 'tome-serving[onnx]'") from error
        export = read_onnx(path)
        return _imported(path, export.tensors, export.input_size)
    return _imported(path, read_checkpoint(path))


def outline_weights(path: Path) -> ImportedWeights:
    """Read a checkpoint like `read_weights`, but of a .safetensors file only the header: its tensors have no values."""
    return _imported(path, outlined_checkpoint(path)) if path.suffix == SUFFIX else read_weights(path)


def _imported(path: Path, tensors: Mapping[str, Tensor], size: tuple[int, int] | None = None) -> ImportedWeights:
    marks = [name for name in tensors if name.endswith(_DINOV2_MARK)]
    if not marks:
        return ImportedWeights(path, dict(tensors), (), size)
    try:
        return _from_dinov2(path, tensors, marks[0].removesuffix(_DINOV2_MARK), size)
    except (RuntimeError, IndexError) as error:  # query, key and value don't fit together
        raise ModelLoadError(f"checkpoint {path} isn't what Hugging Face's Dinov2Model saves: {error}") from error


def fitted(weights: ImportedWeights, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the form of `model`, converted by the function that timm uses for weights of its hub.

    It resizes position embeddings of another grid, and translates names of other code. The result may still not fit the
    model, which the caller must check. Raises ModelLoadError for tensors that timm can't convert.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    tensors = dict(weights.tensors)
    if convert is not None:
        try:
            tensors = dict(convert(tensors, model, **({} if weights.antialias else {"antialias": False})))
        except Exception as error:  # timm's arithmetic raises all kinds of errors for tensors of other shapes
            raise ModelLoadError(
                f"checkpoint {weights.path} can't be brought into the form of {type(model).__name__}: "
                f"{str(error) or repr(error)}"
            ) from error
    if getattr(model, "num_classes", None) == 0:  # without a head
        tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    return tensors


def inferred(architecture: str, kwargs: Mapping[str, Any], weights: ImportedWeights) -> dict[str, Any]:
    """Return the arguments of create_model that follow from the weights, where timm's default is another value."""
    try:
        with torch.device("meta"):
            usual = timm.create_model(architecture, **{"num_classes": weights.num_classes, **kwargs})
            check_supported(usual)
    except Exception:  # building the model itself will raise it again
        return {}
    found: dict[str, Any] = {"num_classes": weights.num_classes}
    size = weights.input_size or _trained_size(usual, weights)
    if size and size != default_size(usual):
        found["img_size"] = size[0] if size[0] == size[1] else list(size)
    return found


def _trained_size(usual: Any, weights: ImportedWeights) -> tuple[int, int] | None:
    """Return the image size that the position embeddings are for; None unless their patches make a square."""
    theirs, ours = weights.tensors.get("pos_embed"), getattr(usual, "pos_embed", None)
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[1] == ours.shape[1]:
        return None
    height, width = default_size(usual)
    rows, columns = patch_grid(usual, height, width)
    patches = theirs.shape[1] - (ours.shape[1] - rows * columns)  # the number of prefix tokens is the same
    side = math.isqrt(max(patches, 0))
    return (side * height // rows, side * width // columns) if side and side * side == patches else None


def _from_dinov2(
    path: Path, tensors: Mapping[str, Tensor], prefix: str, size: tuple[int, int] | None
) -> ImportedWeights:
    """Translate Hugging Face's names, which begin with `prefix`, to timm's."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for name, value in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or inner in _DINOV2_UNUSED:
            left_out.append(name)
        elif part := re.fullmatch(_DINOV2_QKV, inner):
            parts.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = value
        else:
            found[_translated(inner)] = value
    for name, three in parts.items():
        if len(three) == 3:
            found[name] = torch.cat([three["query"], three["key"], three["value"]])
    if "pos_embed" not in found and (halves := _position_embeddings(tensors, left_out)):
        found["pos_embed"] = torch.cat([tensors[half] for half in halves], dim=1)
        left_out = [name for name in left_out if name not in halves]
    return ImportedWeights(path, found, tuple(left_out), size, antialias=False)


def _translated(name: str) -> str:
    for pattern, replacement in _DINOV2_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _position_embeddings(tensors: Mapping[str, Tensor], among: list[str]) -> tuple[str, str] | None:
    """Return the names of the position embeddings of the class token and of the patches.

    An export for another input size stores them apart, under names of its own.
    """
    rows = {name: tensors[name].shape for name in among if "::" in name and tensors[name].ndim == 3}
    classes = [name for name, shape in rows.items() if shape[:2] == (1, 1)]
    patches = [name for name, shape in rows.items() if shape[1] > 1 and math.isqrt(shape[1]) ** 2 == shape[1]]
    return (classes[0], patches[0]) if len(classes) == len(patches) == 1 else None
