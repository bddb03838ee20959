"""One of several processes of the load generator: `python -m tome_client.load.worker INDEX`.

It takes its job from standard input, sends its share of the requests, and writes what it measured to standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import BinaryIO

from tome_client.errors import TomeError
from tome_client.load.driver import event_loop
from tome_client.load.frames import Failed, Job, Message, Ready, Start, frame, receive
from tome_client.load.sending import connected


def main() -> None:
    """Runs the process."""
    # What a library prints must not come between the messages.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The other process is gone if a pipe is closed: nothing is left to do then.
    with contextlib.suppress(EOFError, BrokenPipeError), messages, asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(_work(int(sys.argv[1]), messages))


async def _work(process: int, messages: BinaryIO) -> None:
    def send(message: Message) -> None:
        messages.write(frame(message))
        messages.flush()

    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), os.fdopen(0, "rb", buffering=0, closefd=False)
    )
    job: Job = await receive(orders)
    stop = asyncio.Event()
    try:
        async with connected(job.server, job.plan, process) as sender:
            send(Ready(sender.wire))
            start: Start = await receive(orders)
            stopping = asyncio.create_task(_stop_on_order(orders, stop))
            sent = await sender.run(start.at, send if job.progress else None, stop)
            stopping.cancel()
            send(sent)
    except (TomeError, ImportError, ValueError) as error:
        send(Failed(error))


async def _stop_on_order(orders: asyncio.StreamReader, stop: asyncio.Event) -> None:
    """Sets `stop` when the order comes, or when the process that gives orders has ended."""
    with contextlib.suppress(EOFError):
        await receive(orders)
    stop.set()


if __name__ == "__main__":
    main()
