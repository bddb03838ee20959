"""Threads that share a batch's images, and divide blocks too or not: the same results, whatever the batch and its r."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import timm
import torch

from tests.server.merging.small_models import OTHER_KINDS
from tome_server.merging import MergedModel, Schedule, macs, merge
from tome_server.merging.cpu import packing
from tome_server.merging.cpu.data_parallel import DataParallelModel
from tome_server.merging.cpu.tensor_parallel import TensorParallelModel
from tome_server.merging.cpu.workers import shared_workers

Pack = Callable[[MergedModel], MergedModel]


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads that torch is set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["blocks divided", "images shared"])
def pack(request: pytest.FixtureRequest) -> Pack:
    """Packs a model for threads that divide its blocks, or that share images alone."""
    return partial(packing.pack, divided=request.param)


def small(**options: object) -> MergedModel:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=3, embed_dim=64, num_heads=4, num_classes=10, **options
    )
    return merge(model.eval().requires_grad_(False))


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rs", [[0], [3], [5, 0], [3, 3, 3], [0, 4, 2, 4], [1, 0, 5, 0, 3], [0, 7, 0, 7, 0, 7, 1]])
def test_results_are_those_of_the_whole_model(threads: int, pack: Pack, rs: list[int]) -> None:
    merged = small(init_values=0.3)
    packed, images = pack(merged), torch.randn(len(rs), 3, 96, 96)
    assert isinstance(packed, DataParallelModel)
    each: list[int | Sequence[int | Schedule]] = [rs, rs[0]]
    with torch.inference_mode():
        for r in each:
            found = packed(images, r, return_tokens=True, return_token_map=True)
            expected = merged(images, r, return_tokens=True, return_token_map=True)
            assert found.tokens_per_block == expected.tokens_per_block
            same(found.logits, expected.logits)
            same(found.features, expected.features)
            same(found.tokens, expected.tokens)
            same(found.sizes, expected.sizes)
            same(found.token_map, expected.token_map)
            same(packed(images, r).logits, expected.logits)  # of the last block the class token alone


def test_equal_batches_give_equal_results_on_one_thread_or_several(threads: int, pack: Pack) -> None:
    packed, images = pack(small()), torch.randn(2 * threads, 3, 96, 96)
    several = [packed(images, 4).logits for _ in range(5)]
    assert all(torch.equal(logits, several[0]) for logits in several)
    torch.set_num_threads(1)
    same(packed(images, 4).logits, several[0])


def test_a_schedule_may_be_each_images_own(threads: int, pack: Pack) -> None:
    merged, images = small(), torch.randn(4, 3, 96, 96)
    rs = [Schedule(2), Schedule(3, inflect=-1.0), 0, Schedule(2)]
    same(pack(merged)(images, rs).logits, merged(images, rs).logits)


def test_calls_from_several_threads_do_not_disturb_each_other(threads: int, pack: Pack) -> None:
    packed, images = pack(small()), torch.randn(threads + 1, 3, 96, 96)
    expected = [packed(images, r).logits for r in range(4)]
    found: dict[int, list[torch.Tensor]] = {r: [] for r in range(4)}

    def call(r: int) -> None:
        torch.set_num_threads(threads)
        found[r] += [packed(images, r).logits for _ in range(5)]

    callers = [threading.Thread(target=call, args=(r,)) for r in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for r in range(4):
        assert len(found[r]) == 5
        for logits in found[r]:
            same(logits, expected[r])


class Logits(torch.nn.Module):
    def __init__(self, merged: MergedModel) -> None:
        super().__init__()
        self.merged = merged

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.merged(images, 6).logits


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_it_can_be_exported(threads: int, pack: Pack) -> None:
    model, images, others = Logits(pack(small())), torch.randn(2, 3, 96, 96), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        same(torch.export.export(model, (images,)).module()(others), model(others))


def test_what_is_wrong_with_a_batch_is_said_as_ever(threads: int, pack: Pack) -> None:
    packed = pack(small())
    with pytest.raises(ValueError, match="images must be"):
        packed(torch.randn(3, 96, 96))
    with pytest.raises(ValueError, match="one for each of the 4"):
        packed(torch.randn(4, 3, 96, 96), [1, 2])
    for batch in (1, 5):
        with pytest.raises(ValueError, match="-1"):
            packed(torch.randn(batch, 3, 96, 96), -1)
        same(packed(torch.zeros(batch, 3, 96, 96)).logits, packed(torch.zeros(batch, 3, 96, 96)).logits)


def test_its_operations_count_as_before(threads: int, pack: Pack) -> None:
    merged = small()
    assert macs(pack(merged).model, 2) == macs(merged.model, 2)


def test_blocks_with_fewer_heads_than_threads_or_further_parts_have_their_operations_divided(threads: int) -> None:
    one_head = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=64, num_heads=1)
    for model in (one_head.eval().requires_grad_(False), small(qk_norm=True).model):
        packed = packing.pack(merge(model), divided=True)
        assert packed.division == "images and operations"
        for batch in (threads + 1, 2 * threads):
            images = torch.randn(batch, 3, *model.patch_embed.img_size)
            same(packed(images, 2).logits, merge(model)(images, 2).logits)


@pytest.mark.parametrize("name", ["DINOv3", "NaFlex", "norms after", "parallel scaling", "parallel things"])
def test_images_of_every_family_are_shared_out(name: str, threads: int, pack: Pack) -> None:
    kind = OTHER_KINDS[name]
    merged = merge(kind.build(dtype=torch.float32).eval().requires_grad_(False))
    packed, images = pack(merged), kind.images(dtype=torch.float32)
    images = torch.cat([images] * 3)[: 2 * threads]
    rs = [3, 0, 2, 3, 0, 2]
    with torch.inference_mode():
        for batch in (1, 2 * threads, threads + 1):
            found, expected = packed(images[:batch], rs[:batch]), merged(images[:batch], rs[:batch])
            assert found.tokens_per_block == expected.tokens_per_block
            assert (found.logits - expected.logits).abs().max() < 1e-4 * expected.logits.abs().max()
    assert 0 < packing.division_gain(merged) < 1000


@pytest.mark.parametrize(("gain", "divided"), [(1.0, False), (1.19, False), (1.2, True), (2.0, True)])
def test_blocks_are_divided_where_a_single_image_gains_enough(
    gain: float, divided: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "division_gain", lambda _: gain)
    assert isinstance(packing.pack(small()), TensorParallelModel) == divided


def test_what_a_single_image_gains_is_measured_and_changes_nothing(threads: int) -> None:
    merged, images = small(init_values=0.3), torch.randn(3, 3, 96, 96)
    before = merged(images, 2).logits
    assert 0 < packing.division_gain(merged) < 1000
    assert torch.equal(merged(images, 2).logits, before)
    same(packing.pack(merged)(images, 2).logits, before)


def test_workers_run_by_themselves_in_the_callers_mode() -> None:
    def seen() -> tuple[int, bool, bool]:
        return torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    before = torch.get_num_threads()
    assert shared_workers(2).each([seen, seen]) == [(1, False, True)] * 2
    with torch.no_grad():
        assert shared_workers(2).each([seen]) == [(1, False, False)]
    with torch.inference_mode():
        assert shared_workers(2).each_with_caller([seen, seen]) == [(before, True, False), (1, True, False)]
    assert torch.get_num_threads() == before


def test_what_a_worker_raises_is_raised_once_all_are_done() -> None:
    done = []

    def fails() -> None:
        raise RuntimeError("no")

    for run in (shared_workers(2).each, shared_workers(2).each_with_caller):
        for calls in ([fails, lambda: done.append(1)], [lambda: done.append(1), fails]):
            with pytest.raises(RuntimeError, match="no"):
                run(calls)
    assert len(done) == 4
    assert shared_workers(2).each([lambda: 1, lambda: 2]) == [1, 2]
