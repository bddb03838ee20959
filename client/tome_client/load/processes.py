"""Runs a load in several processes, which share its requests, its start and its report.

A Python process sends a few thousand requests a second. The schedule is that of one process: of N processes, each
computes it from the plan's seed and sends every Nth request.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tome_client.load.frames import Failed, Job, Message, Ready, Start, Stop, frame, receive
from tome_client.load.outcome import LoadResult, Progress
from tome_client.load.plan import LoadPlan
from tome_client.load.sending import PROGRESS_INTERVAL, RUN_UP, Sent, Server, load_result, unless
from tome_client.load.wire import Wire


@dataclass(slots=True)
class _Worker:
    """One process, as the one that started it sees it."""

    name: str
    process: Process
    progress: Progress | None = field(default=None)
    """The last that it reported."""

    async def send(self, message: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(message)
            await self.process.stdin.drain()
        except ConnectionError:
            raise await self._ended() from None

    async def receive(self) -> Message:
        """Returns its next message.

        Raises:
            ChildProcessError: It has ended.
            TomeError: It could not begin; so do ImportError and ValueError.
        """
        assert self.process.stdout is not None
        try:
            message: Message = await receive(self.process.stdout)
        except EOFError:
            raise await self._ended() from None
        if isinstance(message, Failed):
            raise message.error
        return message

    async def _ended(self) -> ChildProcessError:
        """Returns the error of a process that has ended too early."""
        status = await self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        return ChildProcessError(
            f"{self.name} of the load generator {how} before its requests ended; without them the run has no figures"
        )


async def run_in_processes(
    server: Server, plan: LoadPlan, progress: Callable[[Progress], None] | None, stop: asyncio.Event | None
) -> LoadResult:
    """Runs a plan in as many processes as it says; see `run_load`."""
    if not isinstance(server.tls, bool):
        raise ValueError(  # noqa: TRY004 # The type is right for one process.
            "credentials made by gRPC can't be handed to other processes: give the certificates instead, or use one "
            "process"
        )
    workers: list[_Worker] = []
    try:
        wire = await unless(stop, _prepare(server, plan, workers, progress=progress is not None))
        start = time.perf_counter() + RUN_UP + plan.warmup
        await asyncio.gather(*(worker.send(frame(Start(start))) for worker in workers))
        besides = [asyncio.create_task(_stop_all(workers, stop))] if stop else []
        besides += [asyncio.create_task(_report(workers, start, plan, progress))] if progress else []
        try:
            parts = await asyncio.gather(*map(_finish, workers))
        finally:
            for task in besides:
                task.cancel()
            await asyncio.gather(*besides, return_exceptions=True)
    finally:
        for worker in workers:
            if worker.process.returncode is None:
                worker.process.kill()
        await asyncio.gather(*(worker.process.wait() for worker in workers))
    return load_result(plan, wire, parts)


async def _prepare(server: Server, plan: LoadPlan, workers: list[_Worker], *, progress: bool) -> Wire:
    """Starts the processes, adds each to `workers`, and waits until all are ready to send."""
    # They find modules where this process does; an empty entry stands for the current folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
    for index in range(plan.processes):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tome_client.load.worker", str(index)),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            # A terminal sends Ctrl-C to all processes of a session. This process alone decides how a run ends.
            start_new_session=True,
        )
        workers.append(_Worker(f"process {index + 1} of {plan.processes}", process))
    job = frame(Job(server, plan, progress))
    await asyncio.gather(*(worker.send(job) for worker in workers))
    first, *_ = await asyncio.gather(*(worker.receive() for worker in workers))
    assert isinstance(first, Ready)
    return first.wire


async def _stop_all(workers: Sequence[_Worker], stop: asyncio.Event) -> None:
    await stop.wait()
    await asyncio.gather(*(worker.send(frame(Stop())) for worker in workers), return_exceptions=True)


async def _finish(worker: _Worker) -> Sent:
    """Returns what a process has sent, and keeps its progress until then."""
    while True:
        message = await worker.receive()
        if isinstance(message, Sent):
            return message
        assert isinstance(message, Progress)
        worker.progress = message


async def _report(
    workers: Sequence[_Worker], start: float, plan: LoadPlan, progress: Callable[[Progress], None]
) -> None:
    while True:
        parts = [one.progress for one in workers if one.progress]
        progress(
            Progress(
                time.perf_counter() - start,
                plan.duration,
                sent=sum(one.sent for one in parts),
                ended=sum(one.ended for one in parts),
                judged=sum(one.judged for one in parts),
                attained=sum(one.attained for one in parts),
            )
        )
        await asyncio.sleep(PROGRESS_INTERVAL)
