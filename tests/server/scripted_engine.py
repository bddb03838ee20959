"""A scripted engine for tests of what is around the device."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.server.scripted import LATE, QUICK, RS, Bench, Clock, ScriptedDecoder, ScriptedDevice, profile_of, until
from tome_server.config.model_overrides import ModelOverrides
from tome_server.models.model_info import ModelInfo
from tome_server.observability.metrics import Metrics
from tome_server.serving.engine import Engine
from tome_server.serving.served import ServedModel


@pytest.fixture
async def clock() -> Clock:
    return Clock(asyncio.get_running_loop())


@pytest.fixture
async def stopped(clock: Clock) -> Clock:
    clock.stop()
    return clock


@pytest.fixture(scope="module")
def bundled() -> ModelInfo:
    # Here, for most tests need neither.
    import tome_server.merging.timm_import  # noqa: F401  isort: skip
    import torch

    from tome_server.models.loading import load
    from tome_server.models.spec import bundled_spec

    return load(bundled_spec("fashion"), torch.device("cpu")).info


@pytest.fixture
async def start(bundled: ModelInfo, clock: Clock) -> AsyncIterator[Callable[..., Bench]]:
    """Return a function that starts an engine; at the end no request may be left in any."""
    benches: list[tuple[Bench, asyncio.Task[None]]] = []

    def start(
        policy: str = "max_batch",
        unit: float = QUICK,
        *,
        max_batch: int = 8,
        max_delay: float = 0.0,
        max_pending: int = 1000,
        threads: int = 2,
        one_call: bool = True,
        second: ModelOverrides = ModelOverrides(),  # noqa: B008  (frozen)
    ) -> Bench:
        profile = profile_of(unit, max_batch, one_call=one_call)
        device, decoder = ScriptedDevice(profile), ScriptedDecoder(bundled.preprocess.settings)
        device.gate.set()
        decoder.gate.set()
        models = {
            name: ServedModel(
                replace(bundled, name=name, preprocess=decoder, default_budget=LATE),
                profile,
                policy,
                overrides=overrides,
            )
            for name, overrides in (("first", ModelOverrides()), ("second", second))
        }
        engine = Engine(
            device,
            Metrics(),
            max_delay=max_delay,
            max_pending=max_pending,
            reply_margin=0.0001,
            decode_threads=threads,
            decode_memory=1000,
            names=["first", "second", "third"],
        )
        for name, served in models.items():
            engine.registry.serve(served)
            engine.metrics.serving(name, "vit", "cpu", "float32", "price", RS, served.model.largest_r)
        benches.append((Bench(engine, device, decoder), asyncio.create_task(engine.run())))
        return benches[-1][0]

    yield start
    for bench, running in benches:
        bench.decoder.gate.set()
        bench.device.gate.set()
        assert not running.done()
        # Threads that still decode for those who have gone give back what they took once they are done.
        await until(lambda bench=bench: bench.device.running == 0 and not bench.device.slots)
        bench.assert_idle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        bench.engine.close()


@pytest.fixture
async def bench(start: Callable[..., Bench]) -> Bench:
    return start()
