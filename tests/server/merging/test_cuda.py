"""The merged model on a CUDA device. `make gpu` runs these; elsewhere they are deselected."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.server.merging.outputs import assert_close, equal
from tests.server.merging.small_models import OTHER_KINDS
from tome_server.calibration.choose_dtype import load_chosen
from tome_server.config.dtypes import Dtype, DtypeSetting
from tome_server.device.client import Device
from tome_server.device.prefetch import Prefetcher
from tome_server.device.shared_images import SharedImages
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.choose_device import choose_device
from tome_server.execution.cuda_graphs import CudaRecorder, GraphedModel, recorded_sizes, with_graphs
from tome_server.execution.executor import run_batch
from tome_server.merging import merge
from tome_server.merging.attention import attention, size_bias, size_column
from tome_server.merging.families.eva import fix_positions
from tome_server.merging.model import MergedOutput
from tome_server.models.bundled import BUNDLED
from tome_server.models.loaded import loaded_model
from tome_server.models.loading import load
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.spec import bundled_spec
from tome_server.models.transform import ImageSettings

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_served() -> None:
    choose_device("cuda")


@pytest.mark.parametrize("tokens_across", [8, 12, 14, 16])
@pytest.mark.parametrize("r", [0, 3, 8])
def test_float64_gives_what_the_cpu_gives(tokens_across: int, r: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16 * tokens_across, depth=4).eval().double()
    images = torch.randn(4, 3, 16 * tokens_across, 16 * tokens_across, dtype=torch.float64)
    with torch.inference_mode():
        expected = merge(model)(images, r, return_token_map=True)
        given = merge(model.to(CUDA))(images.to(CUDA), r, return_token_map=True)
    torch.testing.assert_close(given.logits.cpu(), expected.logits, rtol=1e-8, atol=1e-8)
    assert torch.equal(given.token_map.cpu(), expected.token_map)


@pytest.mark.parametrize("map_pool", [False, True])
def test_images_that_differ_in_r_get_what_the_cpu_gives(map_pool: bool) -> None:
    torch.manual_seed(0)
    options = {"global_pool": "map", "class_token": False} if map_pool else {}
    model = timm.create_model("vit_tiny_patch16_224", depth=4, **options).eval().double()
    images, rs = torch.randn(5, 3, 224, 224, dtype=torch.float64), [8, 0, 13, 8, 3]
    with torch.inference_mode():
        expected = merge(model)(images, rs, return_tokens=True, return_token_map=True)
        given = merge(model.to(CUDA))(images.to(CUDA), rs, return_tokens=True, return_token_map=True)
    assert_close(given, expected, 1e-8)


OF_EACH_FAMILY = (
    "parallel scaling",
    "parallel things",
    "norms after",
    "DINOv3",
    "EVA-02, norms inside",
    "RoPE, mixed",
    "Sapiens2, shared keys",
    "NaFlex, axial",
)


# timm makes positions on the host, in every call, unless they are fixed.
FROM_THE_HOST = ("DINOv3", "Sapiens2, shared keys")
# timm makes positions on the device, and in float32 also where all else is float64.
IN_FLOAT32 = ("RoPE, mixed", "NaFlex, axial")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_every_family_gives_what_the_cpu_gives(name: str) -> None:
    kind = OTHER_KINDS[name]
    model, images, rs = kind.build(), kind.images(4), [9, 0, 5, 9]
    with torch.inference_mode():
        expected = merge(model)(images, rs, return_tokens=True, return_token_map=True)
        given = merge(model.to(CUDA))(images.to(CUDA), rs, return_tokens=True, return_token_map=True)
    assert_close(given, expected, 1e-5 if name in IN_FLOAT32 else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [176, 208, 224])
def test_half_precision_agrees_with_float32_where_no_token_is_merged(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=size).eval().to(CUDA)
    images = torch.randn(4, 3, size, size, device=CUDA)
    with torch.inference_mode():
        expected = merge(model)(images).logits
        half = merge(model.to(dtype))
        given, merged = half(images.to(dtype)).logits, half(images.to(dtype), 8).logits
    assert (given.float() - expected).norm() / expected.norm() < 3e-2
    assert merged.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_batch_gives_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = merge(timm.create_model("vit_tiny_patch16_224").eval().to(CUDA, dtype))
    images = torch.randn(8, 3, 224, 224).to(CUDA, dtype)
    for r in (13, [0, 13, 8, 13, 0, 4, 4, 8]):
        with torch.inference_mode():
            first = model(images, r, return_tokens=True, return_token_map=True)
            for _ in range(5):
                again = model(images, r, return_tokens=True, return_token_map=True)
                assert equal(again, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [129, 161, 197])
def test_folded_sizes_go_through_flash_attention_and_give_what_a_mask_gives(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 6, tokens, 64, device=CUDA, dtype=dtype) for _ in range(3))
    sizes = torch.randint(1, 20, (4, tokens), device=CUDA).float()
    masked = attention(q, k, v, size_bias(sizes, dtype), dropout=0.0, scale=0.125)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        folded = attention(q, k, v, size_column(sizes, dtype), dropout=0.0, scale=0.125)
    exact = attention(
        q.double(), k.double(), v.double(), size_bias(sizes.double(), torch.float64), dropout=0.0, scale=0.125
    )
    for given in (masked, folded):
        assert (given.double() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("name", [name for name in OF_EACH_FAMILY if name not in FROM_THE_HOST])
def test_a_forward_pass_has_the_host_wait_for_nothing(name: str) -> None:
    kind = OTHER_KINDS[name]
    model, images = merge(kind.build(dtype=torch.float32).to(CUDA)), kind.images(4, dtype=torch.float32).to(CUDA)
    check_no_waiting(lambda: model(images, [9, 0, 5, 9], return_tokens=True, return_token_map=True))


@pytest.mark.parametrize("name", FROM_THE_HOST)
def test_with_fixed_positions_the_host_waits_for_nothing(name: str) -> None:
    kind = OTHER_KINDS[name]
    model, images = merge(kind.build(dtype=torch.float32).to(CUDA)), kind.images(4, dtype=torch.float32).to(CUDA)
    fix_positions(model.model, (8, 8))
    check_no_waiting(lambda: model(images, 9))


def check_no_waiting(call: Callable[[], object]) -> None:
    with torch.inference_mode():
        call()  # what is made at first use may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_what_the_model_gives_to_the_last_bit(dtype: Dtype) -> None:
    plain = load(bundled_spec("fashion", dtype), CUDA)
    graphed = with_graphs(plain, CUDA, max_batch=10, memory=2**30)
    assert isinstance(graphed.graphs, GraphedModel)
    assert graphed.graphs.kinds == tuple((size, r) for size in recorded_sizes(10) for r in plain.info.rs)
    generator = torch.Generator(CUDA).manual_seed(0)
    shape = plain.info.preprocess.settings.input_size
    with torch.inference_mode():
        for size, r in graphed.graphs.kinds:
            images = torch.randn(size, *shape, generator=generator, device=CUDA).to(getattr(torch, dtype))
            given, expected = graphed.run(images, r), plain.run(images, r)
            assert torch.equal(given.logits, expected.logits)
            assert torch.equal(given.features, expected.features)
        # Nine images run in the place of ten.
        filled, alone = graphed.run(images[:9], 0), plain.run(images[:9], 0)
    assert filled.logits.shape == alone.logits.shape
    torch.testing.assert_close(filled.logits, alone.logits, rtol=5e-2, atol=5e-2)


def test_graphs_keep_to_their_memory() -> None:
    plain = load(bundled_spec("fashion"), CUDA)
    recorder = CudaRecorder(CUDA)
    before, most = recorder.taken(), 64 * 2**20
    graphed = with_graphs(plain, CUDA, max_batch=64, memory=most)
    assert recorder.taken() - before <= 1.25 * most
    assert graphed is plain or graphed.graphs is not None


def test_a_dinov3_runs_by_graphs() -> None:
    torch.manual_seed(0)
    name = "vit_small_patch16_dinov3"
    model = timm.create_model(name, num_classes=10, depth=2).eval().requires_grad_(False).to(CUDA)
    settings = ImageSettings((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    loaded = loaded_model(merge(model), Preprocess(settings, Limits()), name="dino", architecture=name)
    fix_positions(model, loaded.info.patch_grid)
    graphed = with_graphs(loaded, CUDA, max_batch=2, memory=2**30)
    assert isinstance(graphed.graphs, GraphedModel)
    images = torch.randn(2, 3, 64, 64, device=CUDA)
    with torch.inference_mode():
        assert torch.equal(graphed.run(images, 0).logits, loaded.run(images, 0).logits)


def test_a_model_that_waits_is_not_recorded_and_the_next_one_is() -> None:
    plain = load(bundled_spec("fashion"), CUDA)
    recorder, images = CudaRecorder(CUDA), torch.zeros(2, *plain.info.preprocess.settings.input_size, device=CUDA)

    def waits() -> MergedOutput:
        output = plain.run(images, 0)
        output.logits.sum().item()
        return output

    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="synchronizing"):
            recorder.record(waits)
        assert torch.cuda.get_sync_debug_mode() == 0
        output, replay = recorder.record(lambda: plain.run(images, 0))
        replay()
        assert torch.equal(output.logits, plain.run(images, 0).logits)


def test_a_recording_that_is_broken_off_leaves_torch_as_it_was() -> None:
    plain = load(bundled_spec("fashion"), CUDA)
    recorder, images = CudaRecorder(CUDA), torch.zeros(2, *plain.info.preprocess.settings.input_size, device=CUDA)
    before = torch.cuda.current_stream(CUDA)

    def breaks_off() -> MergedOutput:
        if torch.cuda.is_current_stream_capturing():
            torch.ones(1, device=CUDA).item()
        return plain.run(images, 0)

    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            recorder.record(breaks_off)
        assert torch.cuda.current_stream(CUDA) == before
        recorder.forget()
        torch.cuda.empty_cache()  # which torch's allocator refuses while it believes that something is recorded
        output, replay = recorder.record(lambda: plain.run(images, 0))
        replay()
        assert torch.equal(output.logits, plain.run(images, 0).logits)


def test_memory_that_runs_out_while_recording_is_found_to_be_that() -> None:
    plain = load(bundled_spec("fashion"), CUDA)

    def greedy(images: torch.Tensor, r: int = 0, **options: bool) -> MergedOutput:
        if len(images) > 2 and torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device=CUDA)
        return plain.run(images, r, **options)

    images = torch.zeros(4, *plain.info.preprocess.settings.input_size, device=CUDA)
    graphs = GraphedModel(greedy, images, CudaRecorder(CUDA))
    graphs.record([1, 2, 3, 4], [0], 2**30, nullcontext())
    assert graphs.kinds == ((1, 0), (2, 0))


def test_images_can_be_brought_while_a_graph_is_recorded() -> None:
    plain = load(bundled_spec("fashion"), CUDA)
    shape = plain.info.preprocess.settings.input_size
    shared = SharedImages(shape, 16)
    prefetcher, stop, brought = Prefetcher(shared.mapped, CUDA), threading.Event(), []
    slots = [shared.put(torch.full(shape, i, dtype=torch.uint8).numpy()) for i in range(16)]

    def prefetch() -> None:
        while not stop.is_set():
            for slot in slots:
                prefetcher.prefetch(slot.place)
            brought.append(len(slots))

    with ThreadPoolExecutor(1) as thread:
        prefetching = thread.submit(prefetch)
        try:
            graphed = with_graphs(plain, CUDA, max_batch=8, memory=2**30)
        finally:
            stop.set()
        prefetching.result()
    assert isinstance(graphed.graphs, GraphedModel)
    assert graphed.graphs.kinds == tuple((size, r) for size in recorded_sizes(8) for r in plain.info.rs)
    assert brought
    for i, slot in enumerate(slots):
        assert torch.equal(prefetcher.take(slot.place).cpu(), torch.full(shape, i, dtype=torch.uint8))


def test_an_image_is_brought_to_memory_that_nothing_reads_any_more() -> None:
    shape = (3, 224, 224)
    shared = SharedImages(shape, 1)
    slot = shared.put(torch.full(shape, 255, dtype=torch.uint8).numpy())
    prefetcher = Prefetcher(shared.mapped, CUDA)
    freed = torch.zeros(shape, dtype=torch.uint8, device=CUDA)
    torch.cuda._sleep(200_000_000)  # cycles: what follows waits for some 0.1 s
    read = freed.clone()
    del freed
    prefetcher.prefetch(slot.place)
    assert int(read.max()) == 0
    assert int(prefetcher.take(slot.place).min()) == 255


def test_the_mask_of_sizes_is_not_copied_to_be_aligned() -> None:
    sizes = torch.randint(1, 20, (4, 197), device=CUDA).float()
    for dtype in (torch.float32, torch.bfloat16):
        bias = size_bias(sizes, dtype)
        assert bias.shape == (4, 1, 1, 197)
        assert bias.stride(3) == 1
        assert not any(bias.stride(dim) % 8 for dim in range(3))


def test_the_bundled_model_classifies_its_samples_as_on_the_cpu() -> None:
    spec = bundled_spec("fashion")
    on_cpu, on_cuda = load(spec, torch.device("cpu")), load(spec, CUDA)
    samples = sorted((BUNDLED / "fashion" / "samples").glob("*.png"))
    works = [
        BatchItem(torch.from_numpy(on_cpu.info.preprocess.encoded(path.read_bytes())), Outputs(top_k=1))
        for path in samples
    ]
    for r in (0, on_cpu.info.grid[-1].r):
        expected = run_batch(on_cpu, works, r, torch.device("cpu"))
        given = run_batch(on_cuda, works, r, CUDA)
        assert [x.class_ids for x in given.results] == [x.class_ids for x in expected.results]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_process_of_a_gpu_loads_records_measures_and_runs(dtype: DtypeSetting, tmp_path: Path) -> None:
    spec, on_cpu = bundled_spec("fashion", dtype), load(bundled_spec("fashion", "float32"), torch.device("cpu"))
    samples = sorted((BUNDLED / "fashion" / "samples").glob("*.png"))
    images = [on_cpu.info.preprocess.encoded(path.read_bytes()) for path in samples]
    rs = [on_cpu.info.rs[i % len(on_cpu.info.rs)] for i in range(len(images))]

    async def run() -> list[tuple[int, ...]]:
        device, most = Device(), len(images)
        try:
            await device.open("cuda")
            await device.load("fashion", spec, Limits(), most, max_batch=most, folder=tmp_path)
            await device.record("fashion", max_batch=most, memory=2**30)
            profile = await device.profile("fashion", spec, max_batch=most, budget=1.0, folder=tmp_path)
            assert profile.max_batch == most
            await device.warm("fashion", max_batch=most, seconds=1.0)
            works = [BatchItem(device.put("fashion", image), Outputs(top_k=1)) for image in images]
            for work in works:
                device.prefetch("fashion", work.image)
            alike = await device.run("fashion", works, [rs[0]] * most, True)
            mixed = [await device.run("fashion", works, rs, packed) for packed in (True, False)]
            with pytest.raises(ValueError, match="must be one for each"):
                await device.run("fashion", works, rs[1:], False)
            again = await device.run("fashion", works, [rs[0]] * most, True)
            assert again.results == alike.results
            return [result.class_ids for each in (alike, *mixed) for result in each.results]
        finally:
            await device.close()

    works = [BatchItem(torch.from_numpy(image), Outputs(top_k=1)) for image in images]
    alike, mixed = (run_batch(on_cpu, works, each, torch.device("cpu")).results for each in (rs[0], rs))
    given, expected = asyncio.run(run()), [result.class_ids for result in (*alike, *mixed, *mixed)]
    # One may be classified otherwise: it takes but the last bit to have another token merged.
    assert sum(one != other for one, other in zip(given, expected, strict=True)) <= 1


def test_dtypes_are_compared_by_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    loaded = load_chosen(bundled_spec("fashion"), CUDA, max_batch=8, folder=tmp_path)
    assert loaded.graphs is None
    for dtype in ("float32", "bfloat16"):
        assert f"1 of 1 CUDA graphs of fashion in {dtype}, up to 8 images" in caplog.text


def test_images_brought_ahead_give_what_those_give_that_go_with_their_batch() -> None:
    model = load(bundled_spec("fashion"), CUDA)
    shape = model.info.preprocess.settings.input_size
    shared = SharedImages(shape, 3)
    prefetcher = Prefetcher(shared.mapped, CUDA)
    for seed in range(20):
        pixels = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        slots = [shared.put(image.numpy()) for image in pixels]
        for slot in slots:
            prefetcher.prefetch(slot.place)
        given = run_batch(model, [BatchItem(prefetcher.take(slot.place), Outputs(top_k=3)) for slot in slots], 4, CUDA)
        # Once more: none of them lies on the device any more, as far as `take` knows, and then one of three does.
        prefetcher.prefetch(slots[1].place)
        mixed = run_batch(model, [BatchItem(prefetcher.take(slot.place), Outputs(top_k=3)) for slot in slots], 4, CUDA)
        expected = run_batch(model, [BatchItem(image, Outputs(top_k=3)) for image in pixels], 4, CUDA)
        assert given.results == expected.results
        assert mixed.results == expected.results
        for slot in slots:
            slot.drop()
