"""Models on their way into service, where the device has something against it."""

import pytest

from tome_server.config import ServerConfig
from tome_server.engine import Engine
from tome_server.errors import ModelLoadError, OutOfMemoryError
from tome_server.hosting import Hosting, model_specs
from tome_server.observability.metrics import Metrics


class FullDevice:
    """Stands in for a Device without memory."""

    name = "cuda"

    async def open(self, name: str) -> None:
        pass

    async def load(self, *_: object) -> None:
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
        await Hosting(device, engine, config).start()
    engine.close()
