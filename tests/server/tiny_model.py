"""A model small enough to run in every test."""

from dataclasses import replace

import tome_server.merging.timm_import  # noqa: F401  isort: skip

import pytest
import timm
import torch

from tome_server.calibration.cpu_load import LoadMeter
from tome_server.merging import merge
from tome_server.models.loaded import LoadedModel, loaded_model
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings

LABELS = ("coat", "bag", "shirt", "boot")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is found to do nothing else, however busy it is."""
    monkeypatch.setattr(LoadMeter, "share", lambda _: 0.0)


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    """16 patches, 4 classes, random weights."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=len(LABELS)
    )
    # timm starts at almost nothing, which would make every image the same.
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name not in ("cls_token", "pos_embed"):
            torch.nn.init.normal_(parameter, std=3 * parameter[0].numel() ** -0.5)
    settings = ImageSettings((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    model = loaded_model(
        merge(network.eval().requires_grad_(False)),
        Preprocess(settings, Limits()),
        name="tiny",
        architecture="vit_tiny_patch16_224",
    )
    return replace(model, info=replace(model.info, labels=LABELS))
