"""Replies to the streams of all services."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc

from tome_server.errors import InvalidRequestError, RequestError, UnavailableError

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
M = TypeVar("M")
A = TypeVar("A")

# Messages of one stream in the server at once. The transport holds back more, which slows the sender down.
STREAM_WINDOW = 64


async def stream_replies(
    requests: AsyncIterator[M], answer: Callable[[M], Awaitable[A]], draining: asyncio.Event
) -> AsyncGenerator[A, None]:
    """Yield the answer to each message of a stream, in order of completion, until the client half-closes.

    `answer` must not raise. Raises UnavailableError once the server drains, and InvalidRequestError or TooLargeError
    for a message that can't be read, both after the messages before it were answered. Closing the generator cancels
    the messages that are unanswered.
    """
    answers: asyncio.Queue[A | None] = asyncio.Queue()
    window = asyncio.Semaphore(STREAM_WINDOW)
    reader = asyncio.create_task(_read(requests, answer, draining, answers, window))
    try:
        while (ready := await answers.get()) is not None:
            yield ready
            window.release()
        await reader
    finally:
        reader.cancel()


async def _read(
    requests: AsyncIterator[M],
    answer: Callable[[M], Awaitable[A]],
    draining: asyncio.Event,
    answers: "asyncio.Queue[A | None]",
    window: asyncio.Semaphore,
) -> None:
    """Start a task for each message of a stream. None at the end of the queue marks the end of the answers."""
    refusal: RequestError | None = None

    async def put_answer(message: M) -> None:
        answers.put_nowait(await answer(message))

    try:
        async with asyncio.TaskGroup() as tasks:
            try:
                while (message := await _next(requests, draining)) is not None:
                    await window.acquire()
                    tasks.create_task(put_answer(message))
            except RequestError as error:
                refusal = error
    finally:
        answers.put_nowait(None)
    if refusal is not None:
        raise refusal


async def _next(requests: AsyncIterator[M], draining: asyncio.Event) -> M | None:
    """Return the stream's next message, None at its end."""
    read = asyncio.ensure_future(anext(requests, None))
    drain = asyncio.ensure_future(draining.wait())
    try:
        await asyncio.wait({read, drain}, return_when=asyncio.FIRST_COMPLETED)
        if not read.done():
            raise UnavailableError("the server is shutting down; what was received has been answered")
        return read.result()
    except InvalidRequestError as error:
        raise InvalidRequestError(error.field, f"{error.description}; what came before has been answered") from error
    finally:
        drain.cancel()
        read.cancel()
