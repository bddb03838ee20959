import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tome_server.calibration.datasets import Dataset
from tome_server.calibration.evaluation import evaluate
from tome_server.calibration.tuning import LEAST_HELD_OUT, Kept, Tuned, divide, tune
from tome_server.cli.tables import tuning_table
from tome_server.errors import ConfigError, DatasetError
from tome_server.merging import Schedule, merge
from tome_server.models.loaded import LoadedModel, loaded_model, with_schedules
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.spec import BUNDLED
from tome_server.models.transform import ImageSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep() -> LoadedModel:
    """16 patches, 6 blocks, 4 classes, random weights."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=6, num_heads=3, num_classes=4
    )
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name not in ("cls_token", "pos_embed"):
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    image = ImageSettings((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    return loaded_model(
        merge(network.eval().requires_grad_(False)), Preprocess(image, Limits()), name="deep", architecture="vit"
    )


def noise(count: int, labels: bool = True) -> Dataset:
    def image(index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8))

    return Dataset(image, count, [i % 4 for i in range(count)] if labels else None, tuple("0123") if labels else ())


@pytest.fixture(scope="module")
def found(deep: LoadedModel) -> list[Tuned]:
    searched, held_out = divide(noise(160), None, None, 0)
    return tune(deep, searched, held_out, [1, 2], CPU, trials=16, blocks=2)


def test_each_r_gets_a_schedule_of_few_blocks_for_no_more_work(deep: LoadedModel, found: list[Tuned]) -> None:
    assert [each.r for each in found] == [2, 1]
    for each in found:
        *free, last = each.schedule
        assert sum(own > 0 for own in free) <= 2
        # The head reads the class token alone, so that merging in the last block changes nothing but what is counted.
        assert last == each.r
        assert each.macs == deep.count(Schedule.explicit(each.schedule)).total <= each.constant_macs
        assert each.constant_macs == deep.info.cost(each.r).total
        tuned, constant = deep.count(Schedule.explicit(each.schedule)), deep.info.cost(each.r)
        assert tuned.total - tuned.unread <= constant.total - constant.unread
        assert with_schedules(deep, {each.r: each.schedule}).info.schedules == {each.r: each.schedule}


def test_what_is_reported_is_of_the_images_held_out(deep: LoadedModel, found: list[Tuned]) -> None:
    _, held_out = divide(noise(160), None, None, 0)
    images = deep.input(
        torch.stack([torch.from_numpy(deep.info.preprocess.image(image)) for image, _ in held_out]), CPU
    )
    for each in found:
        with torch.inference_mode():
            plain, constant, tuned = (
                deep.merged(images, how).logits.softmax(dim=1) for how in (0, each.r, Schedule.explicit(each.schedule))
            )
        shifts = [(given - plain).abs().sum(dim=1) / 2 for given in (constant, tuned)]
        assert each.constant.shifted == pytest.approx(float(shifts[0].mean()), rel=1e-3)
        assert each.tuned.shifted == pytest.approx(float(shifts[1].mean()), rel=1e-3)
        assert each.difference == pytest.approx(each.tuned.shifted - each.constant.shifted, abs=1e-6)
        assert each.standard_error == pytest.approx(float((shifts[1] - shifts[0]).std()) / 80**0.5, rel=1e-3)
        levels = evaluate(with_schedules(deep, {each.r: each.schedule}), held_out, [each.r], CPU)
        assert (levels[each.r].agreement, levels[each.r].top1) == (each.tuned.agreement, each.tuned.top1)
        levels = evaluate(deep, held_out, [each.r], CPU)
        assert (levels[each.r].agreement, levels[each.r].top1) == (each.constant.agreement, each.constant.top1)


def test_more_trials_never_find_worse_on_what_is_searched_on(deep: LoadedModel) -> None:
    images = noise(64)
    few, many = (tune(deep, images, images, [2], CPU, trials=trials, blocks=3)[0] for trials in (1, 24))
    assert many.tuned.shifted < few.tuned.shifted


def test_the_same_images_and_seed_give_the_same(deep: LoadedModel) -> None:
    searched, held_out = divide(noise(60), None, None, 1)
    first, again = (tune(deep, searched, held_out, [2], CPU, trials=6, seed=5) for _ in range(2))
    assert first == again


def test_images_need_no_labels(deep: LoadedModel) -> None:
    images = noise(10, labels=False)
    [each] = tune(deep, images, images, [2], CPU, trials=3)
    assert each.tuned.top1 is None
    assert 0 <= each.tuned.agreement <= 1
    assert "top-1" not in tuning_table([each])


def test_an_average_pooled_model_may_change_its_last_block_too() -> None:
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=4,
        global_pool="avg", class_token=False, fc_norm=False,
    )  # fmt: skip
    image = ImageSettings((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    pooled = loaded_model(merge(network.eval()), Preprocess(image, Limits()), name="avg", architecture="vit")
    [each] = tune(pooled, noise(8), noise(8), [2], CPU, trials=8, blocks=1)
    assert sum(own > 0 for own in each.schedule) == 1


@pytest.mark.parametrize(
    ("difference", "error", "better"),
    [
        (-0.010, 0.005, True),
        (-0.010, 0.0051, False),
        (-0.001, 0.004, False),
        (0.001, 0.004, False),
        (0.010, 0.001, False),
        (-0.001, 0.0, True),
        (0.0, 0.0, False),  # what changes nothing on any image is no gain
    ],
)
def test_only_a_gain_of_two_standard_errors_is_kept(difference: float, error: float, better: bool) -> None:
    kept = Kept(0.1, 0.9, 0.8)
    each = Tuned(2, (4, 0), 90, 100, kept, kept, difference=difference, standard_error=error)
    assert each.better == each.fields()["kept"] == better
    assert f"{difference:+.5f} ± {error:.5f}" in tuning_table([each])
    assert ("left out" in tuning_table([each])) == (not better)


def test_the_bundled_model_merges_by_schedules_that_were_kept_by_this_rule() -> None:
    report = json.loads((BUNDLED / "fashion/quality.json").read_text())
    found = {level["r"]: level for level in report["tuned"]["levels"]}
    schedules = {level["r"]: level["schedule"] for level in report["levels"] if "schedule" in level}
    assert schedules == {r: level["schedule"] for r, level in found.items()} != {}
    for level in found.values():
        own = {name: value for name, value in level.items() if name != "kept"}
        assert Tuned(**own).better == level["kept"] is True


def test_of_schedules_that_are_no_better_few_are_kept() -> None:
    random = np.random.default_rng(0)
    kept = Kept(0.1, 0.9, None)
    better = 0
    for _ in range(2000):
        # Most images are hardly changed and a few change sides, as it is with schedules.
        differences = random.standard_normal(LEAST_HELD_OUT) * random.exponential(1, LEAST_HELD_OUT) ** 2
        error = float(differences.std(ddof=1)) / LEAST_HELD_OUT**0.5
        better += Tuned(2, (4, 0), 90, 100, kept, kept, float(differences.mean()), error).better
    assert better < 0.04 * 2000


@pytest.mark.parametrize(
    ("count", "limit", "held_out", "error"),
    [
        (0, None, None, "0 images to measure on are too few"),
        (59, None, 29, "29 images to measure on are too few"),
        (58, None, None, "29 images to measure on are too few"),
        (90, 58, None, "29 images to measure on are too few"),
        (60, None, 60, "60 to measure on, of 60, leave none to search on"),
        (60, 90, 90, "90 to measure on, of 60, leave none to search on"),
    ],
)
def test_too_few_images_are_refused(count: int, limit: int | None, held_out: int | None, error: str) -> None:
    with pytest.raises(DatasetError, match=error):
        divide(noise(count), limit, held_out, 0)


@pytest.mark.parametrize(
    ("limit", "held_out", "parts"),
    [(None, None, (40, 40)), (61, None, (30, 31)), (500, None, (40, 40)), (None, 60, (20, 60)), (61, 60, (1, 60))],
)
def test_what_is_searched_and_what_is_measured_on_have_no_image_in_common(
    limit: int | None, held_out: int | None, parts: tuple[int, int]
) -> None:
    images = Dataset(lambda i: Image.new("L", (1, 1), i), 80, list(range(80)), tuple(map(str, range(80))))

    def labels(seed: int) -> list[int]:
        divided = divide(images, limit, held_out, seed)
        assert tuple(map(len, divided)) == parts
        return [label for part in divided for label in part.labels or ()]

    assert len(set(labels(3))) == sum(parts)
    assert labels(3) == labels(3) != labels(4)


def test_more_images_to_measure_on_leave_the_search_as_it_was() -> None:
    images = noise(200)
    few, _ = divide(images, 80, 40, 5)
    same, _ = divide(images, 200, 160, 5)
    assert few.labels == same.labels


@pytest.mark.parametrize(
    ("rs", "blocks", "error"),
    [([0], None, r"1\.\.8 for deep, and is 0"), ([9], None, r"1\.\.8 .* 9"), ([2], 7, "6 blocks, of which 7 can't"),
     ([2], 0, "of which 0 can't")],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(deep: LoadedModel, rs: list[int], blocks: int | None, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        tune(deep, noise(4), noise(4), rs, CPU, blocks=blocks)


def test_labels_that_do_not_fit_are_refused_before_anything_is_searched(deep: LoadedModel, tmp_path: Path) -> None:
    named = Dataset(lambda _: Image.new("L", (16, 16)), 4, [0, 1, 0, 1], ("hat", "scarf"))
    with pytest.raises(DatasetError, match="no class named 'hat', 'scarf'"):
        tune(deep, named, named, [2], CPU)


def test_a_model_without_classes_is_refused(deep: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no classifier to tune by"):
        tune(replace(deep, info=replace(deep.info, num_classes=0)), noise(4), noise(4), [2], CPU)
