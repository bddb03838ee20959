"""Profiles that were measured on a busy machine are measured again while the server is idle."""

import asyncio
import logging
from collections import Counter

from tome_server.device.client import Device
from tome_server.errors import DeviceDiedError
from tome_server.scheduling.profile import Latency
from tome_server.serving.batcher import Served
from tome_server.serving.engine import Engine

log = logging.getLogger(__name__)

# Seconds for which empty images are run before a new profile is used.
OBSERVED_FOR = 2.0
# Seconds from one look at the profiles to the next.
LOOK_EVERY = 30.0
# Seconds without a request after which the server counts as idle.
QUIET_FOR = 5.0
# Each time that a model's profile stays provisional, twice as many looks pass before the next measurement, which takes
# twice as long: up to this many looks, and this many times as long.
MOST_LOOKS = 16


async def remeasure(device: Device, engine: Engine, seconds: float) -> None:
    """Measure provisional profiles of the models in service again until cancelled, `seconds` or more each.

    A better profile takes effect between two decisions. Raises DeviceDiedError if there is no device any more.
    """
    looks, tried = Counter[str](), Counter[str]()
    while True:
        await asyncio.sleep(LOOK_EVERY)
        for served in list(engine.registry.models.values()):
            looks[served.key] += 1
            pause = min(2 ** tried[served.key], MOST_LOOKS)
            quiet = _now() - engine.idle_since >= QUIET_FOR and not engine.draining.is_set()
            due = served.profile.provisional and looks[served.key] >= pause
            if not quiet or not due or not _is_served(engine, served):
                continue
            try:
                await _measure_again(device, engine, served, seconds * pause)
            except DeviceDiedError:
                raise
            except InterruptedError:
                log.debug("%s isn't measured again: a request came meanwhile", served.model.name)
                continue
            except Exception:
                if _is_served(engine, served):
                    log.warning("%s can't be measured again", served.model.name, exc_info=True)
            looks[served.key] = 0
            tried[served.key] += 1


async def _measure_again(device: Device, engine: Engine, served: Served, seconds: float) -> None:
    profile = await device.measure_again(served.key, budget=seconds)
    if profile is None:
        return
    latency = Latency(profile)
    await observed(device, served.key, latency)
    if not _is_served(engine, served):
        return
    served.adopt(profile, latency)
    engine.metrics.of_model(served.model.name).drift.set(latency.drift)


async def observed(device: Device, key: str, latency: Latency) -> None:
    """Let predictions start from what batches take now, rather than when the profile was measured."""
    level, end = latency.levels - 1, _now() + OBSERVED_FOR
    while not latency.observed and _now() < end:
        seconds = await device.probe(key, latency.profile.rs[level])
        latency.observe([level], seconds, _now())


def _is_served(engine: Engine, served: Served) -> bool:
    """Return whether a model is still in service: neither replaced nor retired meanwhile."""
    return engine.registry.models.get(served.model.name) is served


def _now() -> float:
    return asyncio.get_running_loop().time()
