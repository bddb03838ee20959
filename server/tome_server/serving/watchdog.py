"""Notices a device that hangs: a batch on it takes far longer than promised, because its process or the GPU stopped."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from tome_server.device.client import Device
from tome_server.serving.batcher import OnDevice
from tome_server.serving.engine import Engine

log = logging.getLogger(__name__)

# A batch hangs once it has taken this many seconds and this many times what was promised.
LEAST = 10.0
PROMISES = 50.0
# Seconds from one look at the device to the next.
LOOK_EVERY = 1.0


@dataclass
class Age:
    """For how long the batch on the device has run while this process ran as well.

    A machine that sleeps, or a container that is frozen, stops both processes; that time says nothing of the device.
    """

    seconds: float = 0.0
    _batch: OnDevice | None = None
    _looked: float = field(default=-math.inf, init=False)

    def look(self, now: float, batch: OnDevice | None) -> float:
        """Return the age of `batch`; 0 if none runs."""
        if batch is not self._batch:
            self._batch, self.seconds = batch, 0.0
            if batch is not None:
                self._looked = max(self._looked, batch.began)
        if batch is not None:
            self.seconds += min(now - self._looked, 2 * LOOK_EVERY)
        self._looked = now
        return self.seconds


async def watch_device(
    engine: Engine, device: Device, patience: float, *, hangs: Callable[[], None], answers: Callable[[], None]
) -> NoReturn:
    """Call `hangs` when the device begins to hang and `answers` when it answers again, until cancelled.

    Between these the engine refuses new requests. Once the device has hung for `patience` seconds, its process is
    killed. Raises DeviceDiedError then.
    """
    age = Age()
    while True:
        await asyncio.sleep(LOOK_EVERY)
        batch = engine.on_device
        seconds = age.look(_now(), batch)
        bound = 0.0 if batch is None else max(LEAST, PROMISES * batch.promised)
        if batch is not None and seconds > bound:
            if not engine.hung:
                log.error(
                    "the device hangs: a batch of %s has run for %.0f s, and %.3g s were promised; NOT_SERVING until "
                    "it ends, and in %.0f s the device's process is killed",
                    batch.model, seconds, batch.promised, patience,
                )  # fmt: skip
                engine.set_hung(True)
                hangs()
            if seconds > bound + patience:
                device.give_up(f"did not answer for {seconds:.0f} s, and was killed")
                await device.ended()
        elif engine.hung:
            log.warning("the device answers again: SERVING")
            engine.set_hung(False)
            answers()


def _now() -> float:
    return asyncio.get_running_loop().time()
