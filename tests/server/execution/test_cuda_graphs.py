"""What is recorded, within which memory, and that batches get from recordings what the model itself gives.

What a recording is on CUDA can't be had on the CPU; here it is the call itself, run again from and into the same
memory. `tests/server/merging/test_cuda.py` has the real one.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tome_server.calibration.profile_key import profile_key
from tome_server.errors import OutOfMemoryError
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.cuda_graphs import GraphedModel, recorded, recorded_sizes, with_graphs
from tome_server.execution.executor import run_batch
from tome_server.merging.model import MergedOutput
from tome_server.models.loaded import LoadedModel

CPU = torch.device("cpu")
NOTHING_ELSE = nullcontext()


class Again:
    """Records by remembering the call; takes `first` bytes for each image of the first, then `each` a recording."""

    def __init__(self, first: int = 0, each: int = 0) -> None:
        self.first, self.each = first, each
        self.pool = self.graphs = self.replays = self.forgotten = 0
        self.tried: list[int] = []
        self.fail: Callable[[int], Exception | None] = lambda _: None
        self.spoil = 0.0

    def record(self, call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        output = call()
        size = len(output.logits)
        self.tried.append(size)
        if (error := self.fail(size)) is not None:
            raise error
        self.pool, self.graphs = max(self.pool, size * self.first), self.graphs + self.each

        @torch.inference_mode()
        def replay() -> None:
            self.replays += 1
            again = call()
            output.logits.copy_(again.logits + self.spoil * torch.randn_like(again.logits))
            output.features.copy_(again.features)

        return output, replay

    def taken(self) -> int:
        return 1000 + self.pool + self.graphs

    def forget(self) -> None:
        self.pool = self.graphs = 0
        self.forgotten += 1


def graphs_of(model: LoadedModel) -> GraphedModel:
    assert isinstance(model.graphs, GraphedModel)
    return model.graphs


def made(model: LoadedModel, recorder: Again, max_batch: int = 4, memory: int = 10**9) -> LoadedModel:
    return recorded(model, recorder, CPU, max_batch, memory, NOTHING_ELSE)


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 3, 4, 5, 6, 7, 8)),
        (9, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
        (32, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)),
        (35, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 35)),
    ],
)
def test_sizes_are_close_together(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert recorded_sizes(max_batch) == sizes


def test_less_than_a_fifth_of_a_batch_is_filling() -> None:
    for size in range(1, 257):
        bucket = min(recorded for recorded in recorded_sizes(256) if recorded >= size)
        assert (bucket - size) / bucket < 0.2


def test_every_size_is_recorded_at_every_r_the_largest_first_then_the_smallest(model: LoadedModel) -> None:
    recorder = Again()
    graphed = made(model, recorder)
    rs = [level.r for level in model.info.grid]
    assert graphs_of(graphed).kinds == tuple((size, r) for size in (1, 2, 3, 4) for r in rs)
    assert recorder.tried == [4] + [1] * len(rs) + [2] * len(rs) + [3] * len(rs) + [4] * (len(rs) - 1)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_batches_get_what_they_get_without_graphs(model: LoadedModel, count: int) -> None:
    recorder = Again()
    graphed = made(model, recorder)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    works = [BatchItem(image, Outputs(top_k=4, features=True, logits=True)) for image in images]
    for level in model.info.grid:
        before = recorder.replays
        given = run_batch(graphed, works, level.r, CPU).results
        assert recorder.replays == before + 1
        for one, other in zip(given, run_batch(model, works, level.r, CPU).results, strict=True):
            assert np.frombuffer(one.logits, "<f4") == pytest.approx(np.frombuffer(other.logits, "<f4"), abs=1e-5)
            assert np.frombuffer(one.features, "<f4") == pytest.approx(np.frombuffer(other.features, "<f4"), abs=1e-4)


def test_a_batch_is_filled_up_to_the_next_size_and_has_its_own_results_alone(model: LoadedModel) -> None:
    recorder = Again()
    graphed = made(model, recorder, max_batch=12)
    images = torch.rand(12, 3, 16, 16)
    full = graphed.run(images, 0)
    part = graphed.run(images[:11] * 0.5, 0)  # after which the twelfth image of before is still there
    expected = model.run(images[:11] * 0.5, 0)
    assert full.logits.shape[0] == 12
    assert part.logits.shape[0] == len(part.features) == len(part.tokens_per_block) == 11
    assert part.tokens_per_block == expected.tokens_per_block
    torch.testing.assert_close(part.logits, expected.logits)
    torch.testing.assert_close(part.features, expected.features)


def test_results_stay_what_they_are_when_the_next_batch_runs(model: LoadedModel) -> None:
    graphed = made(model, Again())
    first = graphed.run(torch.rand(2, 3, 16, 16), 0)
    before = first.logits.clone(), first.features.clone()
    graphed.run(torch.rand(2, 3, 16, 16), 0)
    assert torch.equal(first.logits, before[0])
    assert torch.equal(first.features, before[1])


@pytest.mark.parametrize(
    ("r", "options"),
    [
        ([0, 2], {}),
        (1, {}),  # not in the grid
        (0, {"return_token_map": True}),
        (0, {"return_tokens": True}),
    ],
    ids=["several r", "another r", "token map", "tokens"],
)
def test_what_is_not_recorded_runs_as_ever(model: LoadedModel, r: int | list[int], options: dict[str, Any]) -> None:
    model = replace(model, info=replace(model.info, rs=(0, 2, 4)))
    recorder = Again()
    graphed = made(model, recorder)
    images, before = torch.rand(2, 3, 16, 16), recorder.replays
    given, expected = graphed.run(images, r, **options), model.run(images, r, **options)
    assert recorder.replays == before
    torch.testing.assert_close(given.logits, expected.logits)
    for field in ("tokens", "token_map"):
        assert (getattr(given, field) is None) == (getattr(expected, field) is None)


def test_more_images_than_recorded_of_another_size_or_type_run_as_ever(model: LoadedModel) -> None:
    recorder = Again()
    graphed = graphs_of(made(model, recorder, max_batch=2))
    before = recorder.replays
    with torch.inference_mode():
        assert graphed(torch.rand(3, 3, 16, 16), 0).logits.shape[0] == 3
        with pytest.raises(ValueError, match="pixels"):
            graphed(torch.rand(1, 3, 20, 20), 0)
        with pytest.raises(RuntimeError):
            graphed(torch.rand(1, 3, 16, 16, dtype=torch.float64), 0)
    assert recorder.replays == before


def test_several_groups_of_one_r_each_run_by_graphs(model: LoadedModel) -> None:
    recorder = Again()
    graphed = made(model, recorder)
    works = [BatchItem(image, Outputs(top_k=2)) for image in torch.rand(3, 3, 16, 16)]
    last = model.info.grid[-1].r
    before = recorder.replays
    given = run_batch(graphed, works, [0, last, 0], CPU, packed=False).results
    assert recorder.replays == before + 2
    for one, other in zip(given, run_batch(model, works, [0, last, 0], CPU).results, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_memory_is_kept_to_the_smallest_batches_first(model: LoadedModel) -> None:
    rs = [level.r for level in model.info.grid]
    # Room for the pool of four images and len(rs) + 1 recordings.
    graphed = made(model, Again(first=100, each=10), max_batch=4, memory=400 + 10 * (len(rs) + 1))
    assert graphs_of(graphed).kinds == (*((1, r) for r in rs), (4, 0))


def test_where_the_largest_batch_does_not_fit_smaller_ones_are_recorded(model: LoadedModel) -> None:
    recorder = Again(first=100)
    graphed = made(model, recorder, max_batch=8, memory=350)
    assert {size for size, _ in graphs_of(graphed).kinds} == {1, 2, 3}
    assert recorder.forgotten == 5
    before = recorder.replays
    graphed.run(torch.rand(5, 3, 16, 16), 0)
    assert recorder.replays == before


def test_where_nothing_fits_the_model_stays_as_it_is(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    assert made(model, Again(first=100), memory=50) is model
    assert "runs without" in caplog.text


@pytest.mark.parametrize("error", [OutOfMemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_counts_as_too_little(model: LoadedModel, error: type[Exception]) -> None:
    recorder = Again()
    recorder.fail = lambda size: error("no") if size > 2 else None
    assert {size for size, _ in graphs_of(made(model, recorder)).kinds} == {1, 2}


def test_a_recording_that_fails_is_the_last_and_those_before_it_are_used(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Again()
    recorder.fail = lambda size: RuntimeError("operation not permitted when stream is capturing") if size == 2 else None
    graphed = made(model, recorder)
    assert {size for size, _ in graphs_of(graphed).kinds} == {1, 4}
    assert recorder.tried.count(2) == 1
    assert caplog.text.count("not permitted") == 1
    assert graphed.run(torch.rand(3, 3, 16, 16), 0).logits.shape[0] == 3


def test_memory_that_runs_out_is_told_from_other_errors_whatever_ends_the_recording(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def broken_off() -> Exception:
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    for error in (RuntimeError("CUDA error: out of memory"), broken_off()):
        recorder = Again()
        recorder.fail = lambda size, error=error: error if size > 2 else None
        assert {size for size, _ in graphs_of(made(model, recorder)).kinds} == {1, 2}
    assert not caplog.text


def test_a_device_that_fails_while_it_is_asked_for_its_memory_leaves_the_model_as_it_is(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise RuntimeError("INTERNAL ASSERT FAILED")

    for name in ("taken", "forget"):
        recorder = Again()
        recorder.fail = lambda _: RuntimeError("operation not permitted when stream is capturing")
        setattr(recorder, name, fail)
        assert made(model, recorder) is model
    assert caplog.text.count("RuntimeError: INTERNAL ASSERT FAILED") == 2


def test_a_model_that_cannot_be_recorded_runs_without_and_says_so_once(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Again()
    recorder.fail = lambda _: RuntimeError("operation not permitted when stream is capturing")
    assert made(model, recorder) is model
    assert recorder.tried == [4]
    assert caplog.text.count("not permitted") == 1


def test_a_recording_that_gives_something_else_is_never_used(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Again()
    recorder.spoil = 1.0
    assert made(model, recorder) is model
    assert "wrong" in caplog.text


def test_nothing_else_runs_while_a_graph_is_recorded(model: LoadedModel) -> None:
    lock, recorder = threading.Lock(), Again()
    record, held = recorder.record, []

    def watched(call: Callable[[], MergedOutput]) -> tuple[MergedOutput, Callable[[], None]]:
        held.append(lock.locked())
        return record(call)

    recorder.record = watched  # type: ignore[method-assign]
    recorded(model, recorder, CPU, 2, 10**9, lock)
    assert held == [True] * len(held)
    assert held
    assert not lock.locked()


def test_threads_that_run_batches_at_once_get_their_own_results(model: LoadedModel) -> None:
    graphed = made(model, Again())
    batches = [torch.full((2, 3, 16, 16), i / 8) for i in range(8)]
    expected = [model.run(batch, 0).logits for batch in batches]
    given: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        with torch.inference_mode():
            given[i] = graphed.run(batches[i], 0).logits

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in enumerate(expected):
        torch.testing.assert_close(given[i], logits)


def test_a_profile_with_graphs_is_none_without(model: LoadedModel) -> None:
    graphed = made(model, Again())
    plain, with_them = (profile_key(each, None, CPU, 4) for each in (model, graphed))
    assert with_them.device == f"{plain.device} with CUDA graphs"
    assert plain.digest != with_them.digest


def test_only_cuda_has_graphs_and_only_where_they_are_given_memory(model: LoadedModel) -> None:
    assert with_graphs(model, CPU, max_batch=4, memory=2**30) is model
    assert with_graphs(model, torch.device("cuda"), max_batch=4, memory=0) is model


def test_a_graphed_model_is_described_as_the_model_itself(model: LoadedModel) -> None:
    assert made(model, Again()).info == model.info
