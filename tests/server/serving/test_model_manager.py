"""Models on their way into service, where the device has something against it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tome_server.config.server import ModelConfig, ServerConfig
from tome_server.errors import ConfigError, ModelLoadError, OutOfMemoryError, UnknownModelError
from tome_server.models.bundled import BUNDLED
from tome_server.models.preprocess import Limits
from tome_server.models.sources import find_models, model_specs
from tome_server.models.spec import ModelSpec, Outline
from tome_server.observability.metrics import Metrics
from tome_server.serving.engine import Engine
from tome_server.serving.model_manager import ModelManager


class FullDevice:
    """Stands in for a Device without memory."""

    name = "cuda"

    async def open(self, name: str) -> None:
        pass

    def __init__(self) -> None:
        self.asked: list[tuple[Limits, int]] = []

    async def outline(self, spec: ModelSpec) -> Outline:
        return Outline(spec)

    async def load(self, _key: str, _spec: object, limits: Limits, slots: int, **_: object) -> None:
        self.asked.append((limits, slots))
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


async def test_a_model_that_the_device_has_no_memory_for_is_refused_in_words() -> None:
    config, device = ServerConfig(), FullDevice()
    engine = Engine(
        device, Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1,
        names=[spec.name for spec in model_specs(config)],
    )  # fmt: skip
    with pytest.raises(
        ModelLoadError, match=r"^the device has not the memory for fashion: CUDA out of memory\. Tried to allocate"
    ):
        await ModelManager(device, engine, config).start(find_models(config))
    engine.close()


async def test_a_model_that_is_nowhere_is_refused_with_each_that_there_is_once(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    engine = Engine(
        FullDevice(), Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1, names=["dogs", "own"]
    )
    manager = ModelManager(FullDevice(), engine, ServerConfig(repository=tmp_path, models=[]))
    with pytest.raises(UnknownModelError, match=r"no model is named 'birds'; this server hosts dogs, own, cats$"):
        await manager.load("birds")
    engine.close()


@pytest.mark.parametrize(
    ("own", "limits", "slots"),
    [
        ({}, Limits(2**20, 1000), 50 + 3 + 8),
        ({"batching": {"max_batch": 2, "max_pending": 7}}, Limits(2**20, 1000), 7 + 3 + 2),
        ({"batching": {"max_batch": 32, "max_pending": 500}}, Limits(2**20, 1000), 50 + 3 + 32),
        ({"limits": {"max_image_bytes": 2**19, "max_image_pixels": 5000}}, Limits(2**19, 5000), 50 + 3 + 8),
    ],
)
async def test_a_model_is_given_room_and_limits_of_its_own_where_it_asks_for_them(
    own: dict[str, object], limits: Limits, slots: int
) -> None:
    config = ServerConfig.model_validate({
        "models": [own],
        "batching": {"max_batch": 8, "max_pending": 50},
        "limits": {"max_image_bytes": 2**20, "max_image_pixels": 1000},
    })  # fmt: skip
    device = FullDevice()
    engine = Engine(
        device, Metrics(), max_delay=0.0, max_pending=50, reply_margin=0.0, decode_threads=3, names=["fashion"]
    )
    with pytest.raises(ModelLoadError):
        await ModelManager(device, engine, config).start(find_models(config))
    engine.close()
    assert device.asked == [(limits, slots)]


class CpuDevice(FullDevice):
    """Likewise, but a CPU, whose threads are chosen."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[object] = []

    async def set_threads(self, threads: int) -> None:
        assert self.asked == []
        self.threads.append(threads)

    async def choose_threads(self, models: Sequence[tuple[ModelSpec, int]], folder: Path | None) -> None:
        assert self.asked == []
        self.threads.append(([(spec.name, max_batch) for spec, max_batch in models], folder))


@pytest.mark.parametrize(
    ("settings", "threads"),
    [({"threads": 3}, 3), ({"batching": {"max_batch": 5}}, ([("fashion", 5), ("small", 2)], Path("kept")))],
)
async def test_threads_are_chosen_or_set_before_any_model_is_loaded(
    settings: dict[str, object], threads: object
) -> None:
    models = [{}, {"name": "small", "batching": {"max_batch": 2}}]
    config = ServerConfig.model_validate({"models": models, "profiles": "kept", **settings})
    device = CpuDevice()
    names = [spec.name for spec in model_specs(config)]
    engine = Engine(device, Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1, names=names)
    with pytest.raises(ModelLoadError):
        await ModelManager(device, engine, config).start(find_models(config))
    engine.close()
    assert device.threads == [threads]
    assert len(device.asked) == 1


def test_a_model_that_takes_larger_images_than_messages_may_be_is_refused() -> None:
    config = ServerConfig(models=(ModelConfig.model_validate({"limits": {"max_image_bytes": "17MiB"}}),))
    said = "^model fashion: limits.max_image_bytes: 17,825,792 bytes is more than the server's 16,777,216, by which"
    with pytest.raises(ConfigError, match=said):
        model_specs(config)


async def test_a_policy_that_fits_no_r_of_the_model_is_refused_before_anything_is_measured() -> None:
    class Outlining(CpuDevice):
        async def outline(self, spec: ModelSpec) -> Outline:
            return Outline(spec, (0, 2, 4))

    config, device = ServerConfig(policy="fixed:99"), Outlining()
    engine = Engine(
        device, Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1, names=["fashion"]
    )
    with pytest.raises(ConfigError, match=r"^policy, for model fashion: fixed:99: the model is served at r = 0, 2, 4$"):
        await ModelManager(device, engine, config).start(find_models(config))
    engine.close()
    assert device.threads == device.asked == []


class OddDevice(CpuDevice):
    """One on which loading some models goes wrong with an error that is not expected."""

    async def load(self, _key: str, spec: ModelSpec, *_: object, **__: object) -> None:
        raise {"cats": TypeError("unexpected"), "dogs": FileNotFoundError(2, "No such file")}[spec.name]


async def test_whatever_goes_wrong_with_a_model_is_its_own_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cats", "dogs"):
        shutil.copytree(BUNDLED / "fashion", tmp_path / name)
    config = ServerConfig.model_validate({"repository": tmp_path})
    engine = Engine(
        OddDevice(), Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1, names=["cats", "dogs"]
    )
    manager = ModelManager(OddDevice(), engine, config)
    with pytest.raises(ConfigError, match=r"holds no model that can be served: see the log$"):
        await manager.start(find_models(config))
    await manager.refresh()
    for name, what in (("cats", "TypeError: unexpected"), ("dogs", "FileNotFoundError: ")):
        assert caplog.text.count(f"{name} isn't loaded: {tmp_path}/{name}: {what}") == 2
        with pytest.raises(ModelLoadError, match=f"^{tmp_path}/{name}: {what}"):
            await manager.load(name)
    assert engine.registry.names == []
    engine.close()


@pytest.mark.parametrize("name", ["fashion", "cats"])
def test_a_model_of_the_repository_that_has_a_configured_ones_name_is_left_out(name: str, tmp_path: Path) -> None:
    for folder in ("fashion", "cats"):
        shutil.copytree(BUNDLED / "fashion", tmp_path / folder)
    config = ServerConfig.model_validate({"repository": tmp_path, "models": [{"name": name}]})
    wanted = find_models(config)
    assert [spec.name for spec in wanted.specs] == [name, *({"fashion", "cats"} - {name})]
    assert wanted.configured == {name}
    assert {name: str(fault) for name, fault in wanted.faults.items()} == {
        name: f"two models are named '{name}'; give the configured one another `name`"
    }


async def test_a_configured_model_that_is_faulty_by_now_keeps_no_other_from_being_refreshed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, weights = tmp_path / "models", tmp_path / "weights.safetensors"
    shutil.copytree(BUNDLED / "fashion", models / "cats")
    named = {"source": "vit_tiny_patch16_224", "name": "named", "checkpoint": weights}
    config = ServerConfig.model_validate({"repository": models, "models": [named]})
    with pytest.raises(ConfigError, match=f"^checkpoint {weights} is no file$"):
        find_models(config)
    wanted = find_models(config, strict=False)
    assert [spec.name for spec in wanted.specs] == ["cats"]
    assert {name: str(fault) for name, fault in wanted.faults.items()} == {"named": f"checkpoint {weights} is no file"}
    engine = Engine(OddDevice(), Metrics(), max_delay=0.0, max_pending=1, reply_margin=0.0, decode_threads=1, names=[])
    await ModelManager(OddDevice(), engine, config).refresh()
    engine.close()
    assert f"named isn't loaded: checkpoint {weights} is no file" in caplog.messages
    assert any(message.startswith("cats isn't loaded: ") for message in caplog.messages)
