from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tome_server.errors import ModelLoadError
from tome_server.models.head import Head
from tome_server.models.preparing import Prepared, Recipe, headless_weights, prepare, prepare_with_head


def prepared(folder: Path, architecture: str, **kwargs: Any) -> Prepared:
    """Make a model's folder of random weights that timm's names go with."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, depth=2, **kwargs)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "given.safetensors")
    (folder / "model").mkdir()
    recipe = Recipe(architecture, weights=folder / "given.safetensors", kwargs={"depth": 2})
    return prepare(recipe, "model", folder / "model")


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 112}),
        ("vit_small_patch16_dinov3", {"num_classes": 5}),
        ("vit_base_patch16_siglip_224", {}),
        ("eva02_tiny_patch14_224", {"num_classes": 3, "img_size": 112}),
    ],
)
def test_each_family_is_stored_as_it_was_and_takes_a_head(
    tmp_path: Path, architecture: str, kwargs: dict[str, Any]
) -> None:
    made = prepared(tmp_path, architecture, **kwargs)
    stored, given = load_file(tmp_path / "model/weights.safetensors"), load_file(tmp_path / "given.safetensors")
    assert stored.keys() == given.keys()
    assert all(torch.equal(stored[name], given[name]) for name in given)
    assert made.spec.kwargs["num_classes"] == kwargs.get("num_classes", 0)
    assert made.spec.kwargs.get("img_size") == kwargs.get("img_size")

    head = Head(torch.randn(4, made.model.info.feature_dim), torch.randn(4), penalty=0.1, accuracy=0.5)
    (tmp_path / "fitted").mkdir()
    fitted = prepare_with_head(made.spec, headless_weights(made.spec), head, list("abcd"), tmp_path / "fitted").model
    assert fitted.info.labels == tuple("abcd")
    with torch.inference_mode():
        output = fitted.merged(torch.randn(2, *fitted.info.preprocess.settings.input_size))
    assert torch.allclose(output.logits, head(output.features), atol=1e-5)


def test_a_classifier_of_two_heads_is_not_replaced(tmp_path: Path) -> None:
    made = prepared(tmp_path, "deit_tiny_distilled_patch16_224")
    assert made.model.info.num_classes == 1000
    with pytest.raises(ModelLoadError, match=r"has a classifier of several parts \(head_dist\): none can be fitted"):
        headless_weights(made.spec)
