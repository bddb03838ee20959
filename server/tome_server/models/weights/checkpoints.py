"""Reads the tensors of checkpoints."""

import warnings
from pathlib import Path

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.weights.checkpoint_header import SUFFIX, StoredTensor, check_header, read_header

# The types that tensors without values get: all that matters is whether weights may have them.
_FLOATING, _OTHER = torch.float32, torch.int64


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, .safetensors or one that torch.save wrote. Pickled code in it is never run.

    Raises ModelLoadError if it can't be read.
    """
    _check(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kinds of tensors that are refused below
            weights = load_state_dict(str(path), device="cpu", weights_only=True)
        tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise ModelLoadError(
            f"checkpoint {path} can't be read: {str(error) or repr(error)}; "
            "it must be .safetensors, or what torch.save wrote of tensors alone"
        ) from error
    if not tensors:
        raise ModelLoadError(f"checkpoint {path} holds no tensors")
    for name, tensor in tensors.items():
        if odd := _oddity(tensor):
            raise ModelLoadError(f"checkpoint {path}: {name} {odd}; weights are dense tensors of floating point")
    return tensors


def _oddity(tensor: Tensor) -> str | None:
    """Return why a tensor can't be used as it is, None if it can: most operators, even copying, would raise."""
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout != torch.strided:
        return f"is a sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype})"
    return "has no values (it is on the meta device)" if tensor.is_meta else None


def outlined_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file without their values, on the meta device. Raises ModelLoadError."""
    _check(path)
    assert path.suffix == SUFFIX
    try:
        header = read_header(path)
    except ConfigError as error:
        raise ModelLoadError(str(error)) from error
    return dict(clean_state_dict({name: _without_values(stored) for name, stored in header.items()}))


def _without_values(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=_FLOATING if stored.floating else _OTHER, device="meta")


def _check(path: Path) -> None:
    try:
        check_header(path)
    except ConfigError as error:
        raise ModelLoadError(str(error)) from error
