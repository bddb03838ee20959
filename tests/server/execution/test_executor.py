from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.executor import run_batch
from tome_server.models.loaded import LoadedModel

CPU = torch.device("cpu")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def floats(written: bytes | None) -> np.ndarray:
    """What a result holds of something; nothing where it wasn't asked for."""
    return np.frombuffer(written or b"", "<f4")


@pytest.mark.parametrize("r", [0, 3])
def test_each_image_gets_what_it_would_get_alone(model: LoadedModel, images: torch.Tensor, r: int) -> None:
    together = run_batch(model, [BatchItem(image, Outputs(top_k=4)) for image in images], r, CPU).results
    for image, result in zip(images, together, strict=True):
        [alone] = run_batch(model, [BatchItem(image, Outputs(top_k=4))], r, CPU).results
        assert result.class_ids == alone.class_ids
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)


def test_scores_are_the_probabilities_of_the_best_classes_best_first(model: LoadedModel, images: torch.Tensor) -> None:
    probabilities = model.merged(images[:1], 2).logits.softmax(dim=-1)[0]
    [result] = run_batch(model, [BatchItem(images[0], Outputs(top_k=4))], 2, CPU).results
    assert list(result.class_ids) == probabilities.argsort(descending=True).tolist()
    assert result.scores == pytest.approx(sorted(probabilities.tolist(), reverse=True))
    assert sum(result.scores) == pytest.approx(1)


def test_each_image_gets_only_what_was_asked_for_it(model: LoadedModel, images: torch.Tensor) -> None:
    works = [
        BatchItem(images[0], Outputs(1)),
        BatchItem(images[1], Outputs(3, features=True)),
        BatchItem(images[2], Outputs(2, token_map=True)),
    ]
    plain, featured, mapped = run_batch(model, works, 2, CPU).results
    assert [len(result.class_ids) for result in (plain, featured, mapped)] == [1, 3, 2]
    assert [len(result.scores) for result in (plain, featured, mapped)] == [1, 3, 2]
    assert (plain.features, plain.token_map) == (None, None)
    assert featured.token_map is None
    assert floats(featured.features) == pytest.approx(model.merged(images[1:2], 2).features[0].tolist(), abs=1e-5)
    assert mapped.features is None
    assert mapped.token_map is not None
    tokens = np.frombuffer(mapped.token_map, "<i4")
    assert len(tokens) == 16
    assert len(set(tokens)) == 12  # 16 patches, two merged in each of two blocks


def test_patches_have_the_features_of_the_token_they_went_into(model: LoadedModel, images: torch.Tensor) -> None:
    plain, asked = run_batch(
        model, [BatchItem(images[0], Outputs(1)), BatchItem(images[1], Outputs(1, patches=True))], [0, 2], CPU
    ).results
    assert (plain.patches, asked.token_map, asked.features) == (None, None, None)
    assert asked.patches is not None
    given = torch.frombuffer(bytearray(asked.patches), dtype=torch.float32).reshape(16, -1)
    output = model.merged(images[1:2], 2, return_tokens=True, return_token_map=True)
    assert output.tokens is not None
    assert output.token_map is not None
    assert torch.allclose(given, output.tokens[0, output.token_map[0]], atol=1e-5)
    assert len(given.round(decimals=3).unique(dim=0)) == 12  # merged ones are equal


def test_images_may_come_as_they_are_or_normalised_and_are_the_same(model: LoadedModel) -> None:
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ready = (pixels / 255 - 0.5) / 0.5
    expected = run_batch(model, [BatchItem(image, Outputs(4, logits=True)) for image in ready], 2, CPU).results
    for batch in (list(pixels), [pixels[0], ready[1], pixels[2]]):
        given = run_batch(model, [BatchItem(image, Outputs(4, logits=True)) for image in batch], 2, CPU).results
        for one, other in zip(given, expected, strict=True):
            assert floats(one.logits) == pytest.approx(floats(other.logits), abs=1e-5)


def test_a_model_with_fewer_classes_than_are_asked_for_gives_all_of_them(
    model: LoadedModel, images: torch.Tensor
) -> None:
    batch = [BatchItem(images[0], Outputs(2**31)), BatchItem(images[1], Outputs(2))]
    every, two = run_batch(model, batch, 0, CPU).results
    assert sorted(every.class_ids) == list(range(model.merged(images[:1], 0).logits.shape[-1]))
    assert len(two.class_ids) == 2


def test_logits_are_of_all_classes_and_only_of_who_asked(model: LoadedModel, images: torch.Tensor) -> None:
    plain, raw = run_batch(
        model, [BatchItem(images[0], Outputs(1)), BatchItem(images[1], Outputs(1, logits=True))], 2, CPU
    ).results
    assert plain.logits is None
    assert floats(raw.logits) == pytest.approx(model.merged(images[1:2], 2).logits[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_images_that_differ_in_r_get_what_each_would_get_alone(
    model: LoadedModel, images: torch.Tensor, packed: bool
) -> None:
    works = [BatchItem(image, Outputs(top_k=i + 2, features=True, token_map=True)) for i, image in enumerate(images)]
    works.append(BatchItem(images[0], Outputs(top_k=1)))
    rs = [4, 0, 4, 2]
    together = run_batch(model, works, rs, CPU, packed=packed).results
    for work, r, result in zip(works, rs, together, strict=True):
        [alone] = run_batch(model, [work], r, CPU).results
        assert result.class_ids == alone.class_ids
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)
        assert floats(result.features) == pytest.approx(floats(alone.features), abs=1e-4)
        assert result.token_map == alone.token_map


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rs", [[], [1, 2], [1, 2, 3, 4]])
def test_another_number_of_rs_than_images_is_refused(
    model: LoadedModel, images: torch.Tensor, rs: list[int], packed: bool
) -> None:
    with pytest.raises(ValueError, match=rf"\b3\b.*\b{len(rs)}\b"):
        run_batch(model, [BatchItem(image, Outputs(1)) for image in images], rs, CPU, packed=packed)


@pytest.mark.parametrize(
    ("rs", "packed", "calls"),
    [
        (3, True, [3]),
        (3, False, [3]),
        ([3, 3, 3], True, [3]),
        ([3, 3, 3], False, [3]),
        ([5, 0, 5], True, [3]),
        ([5, 0, 5], False, [1, 2]),
        ([5, 0, 3], False, [1, 1, 1]),
    ],
)
def test_the_model_is_called_once_or_once_for_each_r(
    model: LoadedModel, images: torch.Tensor, rs: int | list[int], packed: bool, calls: list[int]
) -> None:
    batches: list[int] = []

    def merged(batch: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(batch))
        return model.merged(batch, *args, **kwargs)

    run_batch(replace(model, merged=merged), [BatchItem(image, Outputs(1)) for image in images], rs, CPU, packed=packed)
    assert batches == calls


@pytest.mark.parametrize("packed", [True, False])
def test_one_r_for_each_image_is_one_r_for_all_if_they_are_equal(
    model: LoadedModel, images: torch.Tensor, packed: bool
) -> None:
    """CUDA graphs are recorded for batches of one r, and run no others."""
    asked: list[object] = []

    def graphs(batch: torch.Tensor, r: object, **kwargs: Any) -> Any:
        asked.append(r)
        return model.merged(batch, r, **kwargs)

    batch = [BatchItem(image, Outputs(1)) for image in images]
    run_batch(replace(model, graphs=graphs), batch, [3, 3, 3], CPU, packed=packed)
    assert asked == [3]


def test_a_model_without_classes_predicts_none(model: LoadedModel, images: torch.Tensor) -> None:
    """timm gives the features in place of its logits."""
    headless = replace(model, info=replace(model.info, num_classes=0))
    [result] = run_batch(headless, [BatchItem(images[0], Outputs(top_k=5, features=True))], 0, CPU).results
    assert (result.class_ids, result.scores) == ((), ())
    assert result.features


def test_time_on_the_device_is_reported(model: LoadedModel, images: torch.Tensor) -> None:
    assert run_batch(model, [BatchItem(images[0], Outputs(1))], 0, CPU).seconds > 0


def test_no_gradients_are_kept(model: LoadedModel, images: torch.Tensor) -> None:
    seen: list[bool] = []

    def merged(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_inference_mode_enabled())
        return model.merged(*args, **kwargs)

    run_batch(replace(model, merged=merged), [BatchItem(images[0], Outputs(1))], 0, CPU)
    assert seen == [True]
