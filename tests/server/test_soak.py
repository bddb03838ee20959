"""A server under more load than its model could bear unmerged, for as long as one likes.

    pytest -m nightly -s tests/server/test_soak.py

TOME_SOAK_SECONDS says how long; by default ten minutes.
"""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median

import pytest

from tests.server.api.rpc.wire import scrape, until
from tests.server_process import ServerProcess
from tome_client.load import BudgetClass, LoadPlan, Outcome, Renewal, event_loop, read_samples, run_load

SECONDS = float(os.environ.get("TOME_SOAK_SECONDS", "600"))
LOAD = 1.2
# The load comes in parts, between which memory is looked at; outcomes of the whole would fill the generator's own.
PARTS = 20
# Looks at memory in each.
SAMPLES = 10
# In the first quarter allocators settle, buffers reach their size, and every slot for images is used once.
QUARTER = PARTS // 4
GROWTH = 0.01
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(SECONDS * 2 + 600)]


def resident(pids: list[int]) -> int:
    """Bytes of memory that processes hold, what they share counted once."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


async def load_and_watch(target: str, plan: LoadPlan, pids: list[int]) -> tuple[tuple[Outcome, ...], list[int]]:
    """Return what became of a plan's requests, and what the processes held meanwhile: it goes up and down."""
    held = []
    running = asyncio.create_task(run_load(target, plan))
    while not running.done():
        await asyncio.wait([running], timeout=plan.duration / SAMPLES)
        held.append(await asyncio.to_thread(resident, pids))
    return running.result().outcomes, held


def capacity(folder: Path) -> float:
    """Images per second unmerged, in batches of the best size, as the server measured it."""
    [file] = folder.iterdir()
    profile = json.loads(file.read_text())
    return max(size / row[0] for size, row in zip(profile["batch_sizes"], profile["p50_seconds"], strict=True))


def test_a_server_that_is_overloaded_for_long_answers_everybody_once_and_does_not_grow(
    own_server: Callable[..., ServerProcess], samples: dict[Path, str], tmp_path: Path
) -> None:
    profiles = tmp_path / "profiles"
    server = own_server("--profiles", str(profiles), "--profile-time", "5s", "--threads", "1")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    pids = [server.process.pid, *map(int, children.read_text().split())]
    assert len(pids) == 2
    able = capacity(profiles)
    # Enough for a few batches, so that what is too slow is the model and not the budget too small.
    budget = max(0.1, 32 / able)
    images = read_samples(next(iter(samples)).parent)
    codes: Counter[str] = Counter()
    held: list[list[int]] = []
    sent, in_time, rs = 0, 0, 0.0
    began = time.monotonic()
    for part in range(PARTS):
        plan = LoadPlan(
            images, Renewal(LOAD * able), (BudgetClass(budget),), duration=SECONDS / PARTS, seed=part, grace=30
        )
        with asyncio.Runner(loop_factory=event_loop) as runner:
            outcomes, seen = runner.run(load_and_watch(server.target, plan, pids))
        assert len(outcomes) == len(plan.schedule())
        sent += len(outcomes)
        codes.update(one.code if one.reason is None else f"{one.code} {one.reason}" for one in outcomes)
        in_time += sum(one.attained for one in outcomes)
        rs += sum(one.merging.r for one in outcomes if one.merging)
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing waits")
        held.append(seen)
    growth = median(chain(*held[-QUARTER:])) / median(chain(*held[QUARTER : 2 * QUARTER])) - 1
    print(
        f"\n{sent} requests in {time.monotonic() - began:.0f} s, {LOAD} times the {able:.0f}/s possible at r = 0: "
        f"{in_time / sent:.2%} within {budget * 1e3:.0f} ms, mean r {rs / max(1, codes['OK']):.1f}\n"
        f"{dict(codes)}\nresident MiB: {', '.join(f'{median(seen) / 2**20:.1f}' for seen in held)}; "
        f"from the second quarter to the last {growth:+.2%}"
    )
    # A status of the client's own making, for want of any answer, would have no reason.
    assert codes.keys() <= {
        "OK", "DEADLINE_EXCEEDED INFEASIBLE", "DEADLINE_EXCEEDED EXPIRED", "RESOURCE_EXHAUSTED",
    }  # fmt: skip
    metrics = scrape(server.metrics_url)
    assert metrics.total("tome_requests_total") == sent
    assert metrics.total("tome_requests_total", code="OK") == codes["OK"]
    assert rs > 0
    assert growth < GROWTH
    log = server.log.read_text()
    assert '"level": "error"' not in log
    assert "Traceback" not in log
    assert server.terminate(60) == 0
