"""The device's process, for real: started, called, killed."""

import asyncio
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import torch

from tome_server.calibration.profile_store import read_profile
from tome_server.device.client import Device
from tome_server.device.process import _sendable, is_usable
from tome_server.device.shared_images import Slot
from tome_server.errors import DeviceDiedError, ModelLoadError, OutOfMemoryError
from tome_server.execution.batch import BatchItem, Outputs
from tome_server.execution.cpus import available_cpus
from tome_server.execution.executor import run_batch
from tome_server.merging.cpu.packing import MAX_WORKERS
from tome_server.models.loading import load
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import Limits
from tome_server.models.spec import bundled_spec
from tome_server.scheduling.profile import Profile

pytestmark = pytest.mark.asyncio(loop_scope="module")
CPU = torch.device("cpu")
SPEC = bundled_spec("fashion", "float32")
SLOTS = 4


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def device() -> AsyncIterator[Device]:
    """A device on which the bundled model is loaded."""
    device = Device()
    await device.set_threads(1)
    await device.load("fashion", SPEC, Limits(), SLOTS)
    yield device
    await device.close()


def put(device: Device, images: torch.Tensor) -> list[BatchItem[Slot]]:
    return [
        BatchItem(device.put("fashion", image.numpy()), Outputs(top_k=3, features=True, token_map=True))
        for image in images
    ]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(
        3, *load(SPEC, CPU).info.preprocess.settings.input_size, generator=torch.Generator().manual_seed(0)
    )


def kept(folder: Path) -> Profile:
    """The one profile in a folder."""
    [file] = folder.iterdir()
    return read_profile(file)[1]


def running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def address_space(pid: int) -> int:
    """Bytes that a process has reserved, used or not."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


async def test_an_image_that_was_brought_ahead_is_run_as_it_was_then(
    device: Device, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    [work] = put(device, images[:1])
    expected = (await device.run("fashion", [work], [4], True)).results
    # What a GPU's name is to the caller; the process copies to the device that it has.
    monkeypatch.setattr(device, "name", "cuda")
    device.prefetch("fashion", work.image)
    await device.warm("fashion", max_batch=1, seconds=0)  # answered after what was sent before it was read
    device._images["fashion"].mapped.at(work.image.place)[:] = 0
    assert (await device.run("fashion", [work], [4], True)).results == expected
    assert (await device.run("fashion", [work], [4], True)).results != expected
    work.image.drop()


async def test_an_image_that_can_not_be_brought_ahead_goes_with_its_batch(
    device: Device, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    [work] = put(device, images[:1])
    expected = (await device.run("fashion", [work], [4], True)).results
    monkeypatch.setattr(device, "name", "cuda")
    monkeypatch.setitem(device._images, "another", device._images["fashion"])
    device.prefetch("another", work.image)  # a model that isn't loaded
    assert (await device.run("fashion", [work], [4], True)).results == expected
    work.image.drop()


@pytest.mark.parametrize(("rs", "packed"), [([4, 4, 4], True), ([0, 4, 4], True), ([0, 4, 4], False)])
async def test_a_batch_gives_there_what_it_gives_here(
    device: Device, images: torch.Tensor, rs: list[int], packed: bool
) -> None:
    works = put(device, images)
    there = await device.run("fashion", works, rs, packed)
    here = run_batch(load(SPEC, CPU), [work.on(image) for work, image in zip(works, images, strict=True)], rs, CPU)
    assert there.seconds > 0
    for theirs, ours in zip(there.results, here.results, strict=True):
        assert theirs.class_ids == ours.class_ids
        assert theirs.scores == pytest.approx(ours.scores, abs=1e-5)
        assert np.frombuffer(theirs.features, "<f4") == pytest.approx(np.frombuffer(ours.features, "<f4"), abs=1e-4)
        assert theirs.token_map == ours.token_map
    for work in works:
        work.image.drop()


async def test_images_as_they_are_get_there_what_they_get_here(device: Device, images: torch.Tensor) -> None:
    pixels = (255 * images).to(torch.uint8)
    works = [*put(device, pixels[:2]), *put(device, images[2:])]
    there = await device.run("fashion", works, [4, 4, 4], True)
    here = [work.on(image) for work, image in zip(works, [*pixels[:2], images[2]], strict=True)]
    expected = run_batch(load(SPEC, CPU), here, 4, CPU).results
    for theirs, ours in zip(there.results, expected, strict=True):
        assert theirs.scores == pytest.approx(ours.scores, abs=1e-5)
    for work in works:
        work.image.drop()


async def test_what_is_known_of_a_model_is_what_is_known_here(device: Device) -> None:
    there = await device.load("again", replace(SPEC, name="again"), Limits(), SLOTS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as there
    here = load(replace(SPEC, name="again"), CPU).info
    torch.set_num_threads(before)
    assert type(there) is ModelInfo
    assert there.preprocess.settings == here.preprocess.settings
    assert replace(there, preprocess=here.preprocess) == here
    await device.unload("again")
    with pytest.raises(KeyError, match="again"):
        await device.run("again", [], [0], True)


async def test_a_model_that_cannot_be_loaded_is_refused_in_words(device: Device) -> None:
    with pytest.raises(ModelLoadError, match="did you mean"):
        await device.load("other", replace(SPEC, architecture="vit_tiny_patch16_225"), Limits(), SLOTS)


async def test_a_batch_that_fails_says_why_and_where_and_the_next_one_runs(
    device: Device, images: torch.Tensor
) -> None:
    [work] = put(device, images[:1])
    with pytest.raises(ValueError, match="must be one for each of the 1 images") as caught:
        await device.run("fashion", [work], [0, 4], False)
    assert "in run_batch" in "".join(caught.value.__notes__)
    assert len((await device.run("fashion", [work], [0], True)).results) == 1
    work.image.drop()


async def test_a_batch_that_there_is_no_memory_for_says_so_and_the_next_one_runs(
    device: Device, images: torch.Tensor
) -> None:
    [work] = put(device, images[:1])
    room = address_space(device.pid) + 16 * 2**20
    unlimited = resource.prlimit(device.pid, resource.RLIMIT_AS)
    resource.prlimit(device.pid, resource.RLIMIT_AS, (room, unlimited[1]))
    try:
        # Its tokens alone take several times the room.
        with pytest.raises(OutOfMemoryError, match="DefaultCPUAllocator: can't allocate memory"):
            await device.run("fashion", [work] * 1500, [0] * 1500, True)
        assert len((await device.run("fashion", [work], [0], True)).results) == 1
    finally:
        resource.prlimit(device.pid, resource.RLIMIT_AS, unlimited)
    assert len((await device.run("fashion", [work] * 2, [0] * 2, True)).results) == 2
    work.image.drop()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), MemoryError()],
    ids=["cuda", "python"],
)
async def test_out_of_memory_is_one_error_whoever_says_it(error: Exception) -> None:
    sent = pickle.loads(pickle.dumps(_sendable(error)))
    assert type(sent) is OutOfMemoryError
    assert str(sent) in ("CUDA out of memory. Tried to allocate 2.00 GiB.", "MemoryError")


@pytest.mark.parametrize(("errors", "usable"), [(0, True), (1, True), (2, False)])
async def test_a_gpu_that_fails_at_whatever_it_is_asked_is_of_no_use(
    errors: int, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def synchronize(device: torch.device) -> None:
        asked.append(device)
        if len(asked) <= errors:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert is_usable(torch.device("cuda")) == usable


async def test_a_caller_that_leaves_does_not_disturb_the_next(device: Device, images: torch.Tensor) -> None:
    [work] = put(device, images[:1])
    leaves = asyncio.create_task(device.run("fashion", [work], [0], True))
    await asyncio.sleep(0)
    leaves.cancel()
    assert len((await device.run("fashion", [work], [4], True)).results) == 1
    assert leaves.cancelled()
    work.image.drop()


async def test_a_profile_is_measured_there_and_kept(device: Device, tmp_path: Path) -> None:
    for _ in range(2):  # measured a second time if the machine was busy
        profile = await device.profile("fashion", SPEC, max_batch=1, budget=0.1, folder=tmp_path)
        assert profile.max_batch == 1
        assert kept(tmp_path).p50[0][0] == pytest.approx(profile.p50[0][0], rel=1e-4)
    await device.warm("fashion", max_batch=1, seconds=0.1)


async def test_measuring_again_is_given_up_for_a_batch_and_for_whatever_else_is_asked_for(
    device: Device, images: torch.Tensor, tmp_path: Path
) -> None:
    await device.profile("fashion", SPEC, max_batch=8, budget=0.1, folder=tmp_path)
    [work] = put(device, images[:1])
    for call in (device.run("fashion", [work], [4], True), device.warm("fashion", max_batch=1, seconds=0.0)):
        again = asyncio.create_task(device.measure_again("fashion", budget=1000))
        await asyncio.sleep(0)  # it is asked for first
        await call
        with pytest.raises(InterruptedError):
            await again
    work.image.drop()


@pytest.fixture
def busy_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that says for what share of the time processes, started from now on, find they had to wait."""
    site, said = tmp_path / "site", tmp_path / "load"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "from pathlib import Path\n"
        "from tome_server.calibration.cpu_load import LoadMeter\n"
        f"LoadMeter.share = lambda _: float(Path({str(said)!r}).read_text())\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))

    def say(share: float) -> None:
        said.write_text(str(share))

    return say


async def test_a_model_that_was_measured_on_a_busy_machine_is_measured_again_on_a_quiet_one(
    tmp_path: Path, busy_for: Callable[[float], None]
) -> None:
    device, folder = Device(), tmp_path / "profiles"
    try:
        busy_for(0.5)
        await device.load("fashion", SPEC, Limits(), SLOTS)
        busy = await device.profile("fashion", SPEC, max_batch=2, budget=0.2, folder=folder)
        assert busy.provisional
        assert await device.measure_again("fashion", budget=0.2) is None
        busy_for(0.01)
        again = asyncio.create_task(device.measure_again("fashion", budget=0.2))
        await asyncio.sleep(0)
        await device.probe("fashion", 4)  # lets it go on
        quiet = await again
        assert quiet is not None
        assert quiet.measured is not None
        assert quiet.measured.load == 0.01
        stored = kept(folder)
        assert stored.measured is not None
        assert stored.measured.load == 0.01
        assert stored.p50[0][0] == pytest.approx(quiet.p50[0][0], rel=1e-4)
    finally:
        await device.close()


async def test_threads_are_chosen_there_before_models_are_loaded_for_them(tmp_path: Path) -> None:
    device = Device()
    try:
        # What was measured while the machine was busy is measured again.
        for _ in range(2):
            threads = await device.choose_threads([(SPEC, 2)], tmp_path)
            assert threads in (1, available_cpus())
        model = await device.load("fashion", SPEC, Limits(), SLOTS, max_batch=2, folder=tmp_path)
        assert bool(model.division) == (1 < threads <= MAX_WORKERS)
    finally:
        await device.kill()


async def test_its_log_is_the_servers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    device = Device()
    try:
        await device.load("fashion", SPEC, Limits(), SLOTS)
        await device.profile("fashion", SPEC, max_batch=1, budget=0.1, folder=tmp_path)
    finally:
        await device.kill()
    assert "measuring how fast fashion is" in caplog.text


async def test_when_it_dies_everybody_who_waits_is_told(images: torch.Tensor) -> None:
    device = Device()
    ended = asyncio.create_task(device.ended())
    waiting = asyncio.create_task(device.load("fashion", SPEC, Limits(), SLOTS))
    await asyncio.sleep(0)
    os.kill(device.pid, signal.SIGKILL)
    for task in (ended, waiting):
        with pytest.raises(DeviceDiedError, match="was ended by SIGKILL"):
            await task
    with pytest.raises(DeviceDiedError, match="was ended by SIGKILL"):
        await device.run("fashion", [], [], True)
    await device.close()


async def test_it_ends_with_the_server_even_if_that_is_killed() -> None:
    code = (
        "import asyncio\nfrom tome_server.device.client import Device\n"
        "async def main():\n    print(Device().pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert server.stdout is not None
    pid = int(await server.stdout.readline())
    server.kill()
    await server.wait()
    async with asyncio.timeout(60):
        while running(pid):  # noqa: ASYNC110  (a stranger's end is no event here)
            await asyncio.sleep(0.01)
