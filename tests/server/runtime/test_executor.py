import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tome_server.models.hosted import HostedModel
from tome_server.runtime.executor import BatchResult, Executor, Work, run_batch

CPU = torch.device("cpu")


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor(CPU)
    yield made
    made.close()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("r", [0, 3])
def test_each_image_gets_what_it_would_get_alone(model: HostedModel, images: torch.Tensor, r: int) -> None:
    together = run_batch(model, [Work(image, top_k=4) for image in images], r, CPU).results
    for image, result in zip(images, together, strict=True):
        [alone] = run_batch(model, [Work(image, top_k=4)], r, CPU).results
        assert result.class_ids == alone.class_ids
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)


def test_scores_are_the_probabilities_of_the_best_classes_best_first(model: HostedModel, images: torch.Tensor) -> None:
    probabilities = model.merged(images[:1], 2).logits.softmax(dim=-1)[0]
    [result] = run_batch(model, [Work(images[0], top_k=4)], 2, CPU).results
    assert list(result.class_ids) == probabilities.argsort(descending=True).tolist()
    assert result.scores == pytest.approx(sorted(probabilities.tolist(), reverse=True))
    assert sum(result.scores) == pytest.approx(1)


def test_each_image_gets_only_what_was_asked_for_it(model: HostedModel, images: torch.Tensor) -> None:
    works = [Work(images[0], 1), Work(images[1], 3, features=True), Work(images[2], 2, token_map=True)]
    plain, featured, mapped = run_batch(model, works, 2, CPU).results
    assert [len(result.class_ids) for result in (plain, featured, mapped)] == [1, 3, 2]
    assert [len(result.scores) for result in (plain, featured, mapped)] == [1, 3, 2]
    assert (plain.features, plain.token_map) == (None, None)
    assert featured.token_map is None
    assert featured.features == pytest.approx(model.merged(images[1:2], 2).features[0].tolist(), abs=1e-5)
    assert mapped.features is None
    assert mapped.token_map is not None
    assert len(mapped.token_map) == 16
    assert len(set(mapped.token_map)) == 12  # 16 patches, two merged in each of two blocks


def test_logits_are_of_all_classes_and_only_of_who_asked(model: HostedModel, images: torch.Tensor) -> None:
    plain, raw = run_batch(model, [Work(images[0], 1), Work(images[1], 1, logits=True)], 2, CPU).results
    assert plain.logits is None
    assert raw.logits == pytest.approx(model.merged(images[1:2], 2).logits[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_images_that_differ_in_r_get_what_each_would_get_alone(
    model: HostedModel, images: torch.Tensor, packed: bool
) -> None:
    works = [Work(image, top_k=i + 2, features=True, token_map=True) for i, image in enumerate(images)]
    works.append(Work(images[0], top_k=1))
    rs = [4, 0, 4, 2]
    together = run_batch(model, works, rs, CPU, packed=packed).results
    for work, r, result in zip(works, rs, together, strict=True):
        [alone] = run_batch(model, [work], r, CPU).results
        assert result.class_ids == alone.class_ids
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)
        assert result.features == (alone.features and pytest.approx(alone.features, abs=1e-4))
        assert result.token_map == alone.token_map


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rs", [[], [1, 2], [1, 2, 3, 4]])
def test_another_number_of_rs_than_images_is_refused(
    model: HostedModel, images: torch.Tensor, rs: list[int], packed: bool
) -> None:
    with pytest.raises(ValueError, match=rf"\b3\b.*\b{len(rs)}\b"):
        run_batch(model, [Work(image, 1) for image in images], rs, CPU, packed=packed)


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
    model: HostedModel, images: torch.Tensor, rs: int | list[int], packed: bool, calls: list[int]
) -> None:
    batches: list[int] = []

    def merged(batch: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(batch))
        return model.merged(batch, *args, **kwargs)

    run_batch(replace(model, merged=merged), [Work(image, 1) for image in images], rs, CPU, packed=packed)
    assert batches == calls


def test_time_on_the_device_is_reported(model: HostedModel, images: torch.Tensor) -> None:
    assert run_batch(model, [Work(images[0], 1)], 0, CPU).seconds > 0


class Recorder:
    """Stands in for a merged model: says when it starts and in which thread, and waits to be let go."""

    def __init__(self, merged: Any) -> None:
        self.merged = merged
        self.loop = asyncio.get_running_loop()
        self.started = asyncio.Event()
        self.threads: list[str] = []
        self.running = 0
        self.most_running = 0
        self.let_go = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        self.loop.call_soon_threadsafe(self.started.set)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.let_go.wait(10)
        self.running -= 1
        return self.merged(*args, **kwargs)


@pytest.fixture
async def recorder(model: HostedModel) -> Recorder:
    return Recorder(model.merged)


async def test_batches_run_one_at_a_time_in_the_devices_own_thread(
    model: HostedModel, executor: Executor, recorder: Recorder, images: torch.Tensor
) -> None:
    recorded = replace(model, merged=recorder)
    runs = [asyncio.create_task(executor.run(recorded, [Work(image, 1)], 0)) for image in images]
    recorder.let_go.set()
    done = await asyncio.gather(*runs)
    assert all(isinstance(result, BatchResult) for result in done)
    assert recorder.most_running == 1
    assert set(recorder.threads) == {"device-cpu_0"}


async def test_a_batch_that_is_split_stays_in_the_devices_thread(
    model: HostedModel, executor: Executor, recorder: Recorder, images: torch.Tensor
) -> None:
    recorder.let_go.set()
    works, recorded = [Work(image, 4) for image in images], replace(model, merged=recorder)
    split = await executor.run(recorded, works, [2, 0, 2], packed=False)
    assert recorder.threads == ["device-cpu_0"] * 2
    packed = await executor.run(recorded, works, [2, 0, 2])
    assert recorder.threads == ["device-cpu_0"] * 3
    assert [x.class_ids for x in split.results] == [x.class_ids for x in packed.results]


async def test_the_event_loop_runs_on_meanwhile(
    model: HostedModel, executor: Executor, recorder: Recorder, images: torch.Tensor
) -> None:
    run = asyncio.create_task(executor.run(replace(model, merged=recorder), [Work(images[0], 1)], 0))
    await recorder.started.wait()
    assert not run.done()
    recorder.let_go.set()
    assert len((await run).results) == 1


async def test_a_batch_that_fails_says_so_and_the_next_one_runs(
    model: HostedModel, executor: Executor, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="images must be"):
        await executor.run(model, [Work(torch.rand(3, 3), 1)], 0)
    assert len((await executor.run(model, [Work(images[0], 1)], 0)).results) == 1


async def test_a_caller_that_leaves_does_not_disturb_the_next(
    model: HostedModel, executor: Executor, recorder: Recorder, images: torch.Tensor
) -> None:
    gone = asyncio.create_task(executor.run(replace(model, merged=recorder), [Work(images[0], 1)], 0))
    await recorder.started.wait()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    recorder.let_go.set()
    assert len((await executor.run(model, [Work(images[1], 1)], 0)).results) == 1


def test_no_gradients_are_kept(model: HostedModel, images: torch.Tensor) -> None:
    seen: list[bool] = []

    def merged(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.is_inference_mode_enabled())
        return model.merged(*args, **kwargs)

    run_batch(replace(model, merged=merged), [Work(images[0], 1)], 0, CPU)
    assert seen == [True]
