"""The comparison of schedules: equal work is equal work, and what is reported is what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import pareto

from tome_server.calibration.datasets import Dataset, load_labelled
from tome_server.merging import Schedule
from tome_server.models.loaded import LoadedModel, with_schedules
from tome_server.models.loading import load
from tome_server.models.spec import bundled_spec

SAMPLES = Path(__file__).parents[2] / "server/tome_server/models/bundled/fashion/samples"
TUNED = (0, 7, 57, 0, 38, 0, 0, 21, 0, 0, 0, 14)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    plain = load(replace(bundled_spec("fashion"), quality=None), torch.device("cpu"))
    return with_schedules(plain, {14: TUNED})


@pytest.fixture(scope="module")
def images() -> Dataset:
    return load_labelled(SAMPLES).subset(range(6))


@pytest.mark.parametrize("r", [2, 8, 14])
@pytest.mark.parametrize("start", [1, 4])
def test_starting_late_takes_no_more_work(model: LoadedModel, r: int, start: int) -> None:
    schedule = pareto.starting_at(model, r, start)
    assert schedule is not None
    per_block = schedule.per_block(12)
    assert set(per_block[:start]) == {0}
    assert set(per_block[start:]) == {schedule.r}
    assert schedule.r >= r
    assert model.count(schedule).total <= model.count(r).total
    less = Schedule.constant(schedule.r - 1, start=start)
    assert model.count(less).total > model.count(r).total


def test_starting_too_late_is_no_way(model: LoadedModel) -> None:
    assert pareto.starting_at(model, 14, 11) is None


def test_every_way_is_run_at_every_r_and_tuned_where_there_is_a_schedule(model: LoadedModel) -> None:
    ways = pareto.ways_of(model, [8, 14])
    assert next(iter(ways)) == ("none", 0)
    assert [name for name, r in ways if r == 8] == ["constant", "falling", "rising", "late", "later"]
    assert [name for name, r in ways if r == 14] == ["constant", "falling", "rising", "late", "later", "tuned"]
    assert ways["tuned", 14].per_block(12) == TUNED


def test_what_is_measured_is_told_in_rows_table_and_picture(
    model: LoadedModel, images: Dataset, tmp_path: Path
) -> None:
    ways = pareto.ways_of(model, [14])
    times = {way: {1: 0.9, 8: 0.8} for way in ways}
    rows = pareto.measured(model, images, ways, times)
    none, constant, *_, tuned = rows
    assert (none.macs, none.shifted, none.agreement, none.top1) == (1.0, 0.0, 1.0, None)
    assert tuned.macs <= constant.macs < 0.6
    prepared = torch.stack([torch.from_numpy(model.info.preprocess.image(image)) for image, _ in images])
    inputs = model.input(prepared, torch.device("cpu"))
    with torch.inference_mode():
        plain, merged = (model.run(inputs, r).logits.softmax(dim=1) for r in (0, 14))
    assert tuned.shifted == pytest.approx(float((plain - merged).abs().sum() / 2 / len(images)), rel=1e-3)
    each = (merged - plain).abs().sum(dim=1) / 2
    with torch.inference_mode():
        every = (model.merged(inputs, 14).logits.softmax(dim=1) - plain).abs().sum(dim=1) / 2
    assert tuned.difference == pytest.approx(float((each - every).mean()), abs=1e-6)
    assert tuned.difference_error == pytest.approx(float((each - every).std()) / len(images) ** 0.5, rel=1e-3)
    assert (constant.difference, constant.difference_error) == (0.0, 0.0)
    printed = pareto.costs_table(rows).splitlines()
    assert len(printed) == 1 + len(rows)
    assert printed[-1].split()[:2] == ["14", "tuned"]
    pareto.draw(rows, "fashion", tmp_path / "pareto.svg")
    assert "<svg" in (tmp_path / "pareto.svg").read_text()
    labelled = [replace(row, top1=0.5) for row in rows]
    pareto.draw(labelled, "fashion", tmp_path / "labelled.svg")
    # Labels of axes are drawn as paths, with the text as a comment.
    assert "top-1, %" in (tmp_path / "labelled.svg").read_text()
    assert "top-1, %" not in (tmp_path / "pareto.svg").read_text()
