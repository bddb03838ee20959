"""The client for asyncio."""

# A timeout here is the gRPC deadline, which the server reads; asyncio.timeout would not reach it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import Final, Self, TypeVar, Unpack

import grpc

from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_client.channel import DEFAULT_MAX_MESSAGE_BYTES, call_metadata, channel_credentials, channel_options
from tome_client.errors import TomeError, ended_early, error_from_rpc
from tome_client.inputs import Image, is_path
from tome_client.requests import PredictOptions, StreamItem, predict_request, stream_request
from tome_client.results import (
    ModelInfo,
    ModelSummary,
    PredictResult,
    StreamResult,
    model_info,
    model_summaries,
    predict_result,
    stream_result,
)

_Response = TypeVar("_Response")

_END: Final = None


class AsyncClient:
    """A connection to a tome-serving server, for one event loop.

    It has the arguments and methods of Client, as coroutines. It must be made where the loop runs. Cancelling a task
    that waits for an answer cancels its request on the server too.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: bool | grpc.ChannelCredentials = False,
        root_certificates: bytes | None = None,
        client_certificate: bytes | None = None,
        client_key: bytes | None = None,
        token: str | Callable[[], str] | None = None,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] = (),
        retries: bool = True,
        health_checks: bool = False,
        max_send_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_receive_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        credentials = channel_credentials(tls, root_certificates, client_certificate, client_key)
        options = channel_options(
            target,
            retries=retries,
            health_checks=health_checks,
            max_send_bytes=max_send_bytes,
            max_receive_bytes=max_receive_bytes,
        )
        self._channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._target = target
        self._timeout = timeout
        self._metadata = call_metadata(metadata, token)
        self._max_send_bytes = max_send_bytes

    async def predict(
        self, image: Image, *, timeout: float | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult:
        """Classifies one image; arguments and errors are those of Client.predict."""
        request = (
            await asyncio.to_thread(predict_request, image, options)
            if is_path(image)
            else predict_request(image, options)
        )
        return predict_result(await self._call(self._stub.Predict, request, timeout))

    async def predict_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        timeout: float | None = None,
        in_flight: int = 32,
    ) -> AsyncIterator[StreamResult]:
        """Classifies many images over one call; yields results in the order of completion.

        Arguments and errors are those of Client.predict_stream. `items` is read in this loop and may be asynchronous.
        """
        exchange = _Exchange(in_flight)
        requests = exchange.requests(items, self._max_send_bytes)
        call = self._stub.PredictStream(requests, timeout=timeout, metadata=self._metadata())
        receiving = asyncio.create_task(exchange.receive(call, self._target))
        try:
            while (result := await exchange.arrived.get()) is not _END:
                if isinstance(result, Exception):
                    raise result
                exchange.room.release()
                yield result
        finally:
            exchange.closed.set()
            exchange.room.release()
            call.cancel()
            receiving.cancel()

    async def models(self, *, timeout: float | None = None) -> tuple[ModelSummary, ...]:
        """Lists the hosted models; errors are those of Client.models."""
        request = inference_pb2.ListModelsRequest()
        return model_summaries(await self._call(self._stub.ListModels, request, timeout))

    async def model(self, name: str = "", *, timeout: float | None = None) -> ModelInfo:
        """Describes one model; errors are those of Client.model."""
        request = inference_pb2.GetModelRequest(model=name)
        return model_info(await self._call(self._stub.GetModel, request, timeout))

    async def close(self) -> None:
        """Closes the connection; calls still waiting are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self, method: Callable[..., Awaitable[_Response]], request: object, timeout: float | None
    ) -> _Response:
        try:
            return await method(
                request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata()
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error


async def _asynchronous(items: Iterable[StreamItem] | AsyncIterable[StreamItem]) -> AsyncIterator[StreamItem]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class _Exchange:
    """One stream: its requests, which gRPC reads, and its results, which a task queues."""

    def __init__(self, in_flight: int) -> None:
        self.arrived: asyncio.Queue[StreamResult | Exception | None] = asyncio.Queue()
        """Results; an exception that ends the stream; `_END` when there are no more."""
        self.room = asyncio.Semaphore(in_flight)
        self.closed = asyncio.Event()
        self._sent = self._answered = 0
        self._exhausted = False

    async def requests(
        self, items: Iterable[StreamItem] | AsyncIterable[StreamItem], max_bytes: int
    ) -> AsyncIterator[inference_pb2.PredictStreamRequest]:
        """Yields the messages of the items, as far as there is room."""
        waiting = aiter(_asynchronous(items))
        while await self.room.acquire() and not self.closed.is_set():
            try:
                item = await anext(waiting)
            except StopAsyncIteration:
                self._exhausted = True
                return
            except Exception as error:  # gRPC would swallow the error.
                self.arrived.put_nowait(error)
                return
            try:
                request = (
                    await asyncio.to_thread(stream_request, item, max_bytes)
                    if is_path(item.image)
                    else stream_request(item, max_bytes)
                )
            except TomeError as error:
                self.arrived.put_nowait(StreamResult(item.id, error=error))
            else:
                self._sent += 1
                yield request

    async def receive(self, call: AsyncIterable[inference_pb2.PredictStreamResponse], target: str) -> None:
        """Queues the results of a call until it ends."""
        try:
            async for response in call:
                self._answered += 1
                self.arrived.put_nowait(stream_result(response))
        except grpc.RpcError as error:
            self.arrived.put_nowait(error_from_rpc(error, target))
        else:
            complete = self._exhausted and self._answered == self._sent
            self.arrived.put_nowait(_END if complete else ended_early(target))
