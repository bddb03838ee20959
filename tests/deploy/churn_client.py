"""Clients that come and go: run by test_churn.py, in a process of its own, whose end shows whether it was a crash.

    python churn_client.py TARGET IMAGE SECONDS

Prints, as JSON, how many calls and items of streams were sent, how each ended, and its open descriptors over time.
"""

import asyncio
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tome_client import AsyncClient, Client, StreamItem, TomeError

THREADS = 3
CALLS = 5
ITEMS = 4
# Nothing here takes as long unless it hangs.
TIMEOUT = 60.0


class Tally:
    """What was sent, and how it ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent = 0
        self.ended: Counter[str] = Counter()
        self.twice: list[str] = []

    def send(self, count: int) -> None:
        with self.lock:
            self.sent += count

    def end(self, how: str, count: int = 1) -> None:
        with self.lock:
            self.ended[how] += count

    def end_stream(self, results: list[Any], failure: TomeError | None) -> None:
        """Count each item once: by its own result, or by what ended the whole stream."""
        for name, count in Counter(result.id for result in results).items():
            if count > 1:
                self.twice.append(name)
        for result in results:
            self.end("OK" if result.error is None else result.error.code.name)
        if missing := ITEMS - len(results):
            self.end("no answer" if failure is None else failure.code.name, missing)


def options(chance: random.Random) -> dict[str, bool]:
    return {"health_checks": chance.random() < 0.5, "retries": chance.random() < 0.7}


def items(image: bytes) -> list[StreamItem]:
    return [StreamItem(str(number), image) for number in range(ITEMS)]


def threaded(target: str, image: bytes, end: float, tally: Tally, seed: int) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        with Client(target, **options(chance)) as client:
            for _ in range(CALLS):
                tally.send(1)
                try:
                    client.predict(image, timeout=TIMEOUT)
                    tally.end("OK")
                except TomeError as error:
                    tally.end(error.code.name)
            tally.send(ITEMS)
            results, failure = [], None
            try:
                results.extend(client.predict_stream(items(image), timeout=TIMEOUT))
            except TomeError as error:
                failure = error
            tally.end_stream(results, failure)


async def asynchronous(target: str, image: bytes, end: float, tally: Tally, seed: int) -> None:
    chance = random.Random(seed)

    async def ask(client: AsyncClient) -> None:
        tally.send(1)
        try:
            await client.predict(image, timeout=TIMEOUT)
            tally.end("OK")
        except TomeError as error:
            tally.end(error.code.name)

    async def stream(client: AsyncClient) -> None:
        tally.send(ITEMS)
        results, failure = [], None
        try:
            async for result in client.predict_stream(items(image), timeout=TIMEOUT):
                results.append(result)  # noqa: PERF401
        except TomeError as error:
            failure = error
        tally.end_stream(results, failure)

    while time.monotonic() < end:
        # Side by side: one that checks health beside one that doesn't.
        async with AsyncClient(target, **options(chance)) as one, AsyncClient(target, **options(chance)) as other:
            await asyncio.gather(*(ask(client) for client in (one, other) for _ in range(CALLS)))
            await asyncio.gather(stream(one), stream(other))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def run(target: str, image: bytes, seconds: float, tally: Tally) -> None:
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=threaded, args=(target, image, end, tally, seed)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    asyncio.run(asynchronous(target, image, end, tally, THREADS))
    for thread in threads:
        thread.join()


def main(target: str, image: str, seconds: str) -> None:
    tally = Tally()
    encoded = Path(image).read_bytes()
    # The first round's descriptors are gRPC's own, which stay.
    run(target, encoded, 1, tally)
    before = descriptors()
    run(target, encoded, float(seconds), tally)
    patience = time.monotonic() + TIMEOUT
    while descriptors() > before and time.monotonic() < patience:
        time.sleep(0.1)
    print(
        json.dumps(
            {"sent": tally.sent, "ended": tally.ended, "twice": tally.twice, "descriptors": [before, descriptors()]}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
