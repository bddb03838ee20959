"""A model small enough to load in every test."""

from pathlib import Path

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tome_server.models.spec import ModelSpec

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    """timm's own model, of random weights; tests must leave it as it is."""
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, **KWARGS).eval()


@pytest.fixture
def spec(tiny: nn.Module, tmp_path: Path) -> ModelSpec:
    """What loads `tiny`."""
    checkpoint = tmp_path / "weights.safetensors"
    save_file(tiny.state_dict(), checkpoint)
    return ModelSpec(name="tiny", architecture=ARCHITECTURE, kwargs=KWARGS, checkpoint=checkpoint)
