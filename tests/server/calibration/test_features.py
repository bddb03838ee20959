from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tome_server.calibration.datasets import load_labelled
from tome_server.calibration.features import pooled_features
from tome_server.models.loaded import LoadedModel

CPU = torch.device("cpu")


def test_features_are_what_enters_the_classifier_at_each_r(model: LoadedModel, tmp_path: Path) -> None:
    for i in range(7):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    images = load_labelled(tmp_path)
    features = pooled_features(model, images, [0, 4], CPU, batch=3)
    assert features.shape == (2, 7, model.info.feature_dim)
    for row, r in enumerate((0, 4)):
        for i, (image, _) in enumerate(images):
            with torch.inference_mode():
                output = model.merged(model.input(torch.from_numpy(model.info.preprocess.image(image))[None], CPU), r)
            assert torch.allclose(features[row, i], output.features[0], atol=1e-5)
            assert torch.allclose(model.merged.model.head(features[row, i]), output.logits[0], atol=1e-4)
