import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tome_server.calibration.datasets import Dataset, DatasetError, load_labelled
from tome_server.calibration.evaluation import evaluate
from tome_server.models.loaded import LoadedModel

CPU = torch.device("cpu")


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8))


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed=int(path.stem)).save(path)


@pytest.fixture
def labelled(tmp_path: Path) -> Dataset:
    """Classes in another order than the model's, and one of its four missing."""
    for i in range(30):
        save(tmp_path / ("boot", "coat", "shirt")[i % 3] / f"{i}.png")
    return load_labelled(tmp_path)


@pytest.fixture
def unlabelled(tmp_path: Path) -> Dataset:
    for i in range(7):
        save(tmp_path / f"{i}.png")
    return load_labelled(tmp_path)


def predictions(model: LoadedModel, images: Dataset, r: int) -> list[int]:
    """The class of each image, one image at a time."""
    with torch.inference_mode():
        return [
            int(model.merged(model.input(pixels[None], CPU), r).logits.argmax())
            for pixels in (torch.from_numpy(model.info.preprocess.image(image)) for image, _ in images)
        ]


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_counts_are_those_of_a_count_by_hand(model: LoadedModel, labelled: Dataset, batch: int) -> None:
    levels = evaluate(model, labelled, [0, 2, 8], CPU, batch=batch)
    names = [labelled.classes[label] for _, label in labelled if label is not None]
    plain = predictions(model, labelled, 0)
    for r in (0, 2, 8):
        given = predictions(model, labelled, r)
        assert levels[r].agreement == sum(a == b for a, b in zip(given, plain, strict=True)) / 30
        assert levels[r].top1 == sum(model.info.labels[i] == name for i, name in zip(given, names, strict=True)) / 30


def test_r_0_agrees_with_itself_and_more_merging_does_not_always(model: LoadedModel, labelled: Dataset) -> None:
    levels = evaluate(model, labelled, [0, 8], CPU)
    assert levels[0].agreement == 1
    assert levels[8].agreement < 1


def test_images_without_labels_have_agreement_alone(model: LoadedModel, unlabelled: Dataset) -> None:
    levels = evaluate(model, unlabelled, [0, 4], CPU)
    assert levels[0].agreement == 1
    assert 0 <= levels[4].agreement <= 1
    assert {level.top1 for level in levels.values()} == {None}


def test_r_0_is_always_measured_and_an_r_given_twice_counts_once(model: LoadedModel, unlabelled: Dataset) -> None:
    levels = evaluate(model, unlabelled, [4, 2, 4], CPU)
    assert list(levels) == [0, 2, 4]
    assert all(level.agreement <= 1 for level in levels.values())


def test_an_r_beyond_the_largest_is_reported_as_what_was_done(model: LoadedModel, unlabelled: Dataset) -> None:
    assert list(evaluate(model, unlabelled, [500], CPU)) == [0, model.info.largest_r]


def test_a_limit_takes_the_first_images(model: LoadedModel, labelled: Dataset) -> None:
    given = predictions(model, labelled, 0)[:5]
    boots = [model.info.labels[i] == "boot" for i in given]
    assert evaluate(model, labelled, [0], CPU, limit=5)[0].top1 == sum(boots) / 5
    assert evaluate(model, labelled, [0], CPU, limit=500) == evaluate(model, labelled, [0], CPU)


def test_numbered_classes_are_the_models_own(model: LoadedModel) -> None:
    image = noise(seed=0)
    [right] = predictions(model, Dataset(lambda _: image, 1, None, ()), 0)
    images = Dataset(lambda _: image, 2, [right, (right + 1) % 4], ("0", "1", "2", "3"))
    assert evaluate(model, images, [0], CPU)[0].top1 == 0.5


def test_more_numbered_classes_than_the_model_has_are_refused(model: LoadedModel) -> None:
    image = Image.new("L", (16, 16))
    images = Dataset(lambda _: image, 1, [0], ("0", "1", "2", "3", "4"))
    with pytest.raises(DatasetError, match="the images have 5 classes, tiny has 4"):
        evaluate(model, images, [0], CPU)


def test_class_names_that_the_model_does_not_know_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    for name in ("coat", "hat", "scarf"):
        save(tmp_path / name / "1.png")
    with pytest.raises(DatasetError, match="tiny has no class named 'hat', 'scarf'"):
        evaluate(model, load_labelled(tmp_path), [0], CPU)


def test_an_image_that_cannot_be_decoded_is_named(model: LoadedModel, tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"2\.png"):
        evaluate(model, load_labelled(tmp_path), [0], CPU)


def test_agreement_is_with_the_reference_where_there_is_one(model: LoadedModel, labelled: Dataset) -> None:
    network = copy.deepcopy(model.merged)
    torch.nn.init.normal_(network.model.head.weight, generator=torch.Generator().manual_seed(1))
    other = replace(model, merged=network)
    theirs, own = predictions(model, labelled, 0), {r: predictions(other, labelled, r) for r in (0, 4)}
    measured = evaluate(other, labelled, [4], CPU, reference=model)
    for r, classes in own.items():
        assert measured[r].agreement == sum(a == b for a, b in zip(classes, theirs, strict=True)) / len(labelled)
    assert measured[0].agreement < 1
