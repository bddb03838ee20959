"""The client for threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Self, TypeVar, Unpack

import grpc

from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_client.channel import DEFAULT_MAX_MESSAGE_BYTES, call_metadata, channel_credentials, channel_options
from tome_client.errors import TomeError, ended_early, error_from_rpc
from tome_client.inputs import Image
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
# A cancelled call ends at once, so that its thread is waited for no longer than this.
_JOIN_SECONDS = 1.0


class Client:
    """A connection to a tome-serving server. Any number of threads may share one.

    A call that fails with UNAVAILABLE or RESOURCE_EXHAUSTED, or that the server cancels, is tried
    up to five times in all. Between tries it waits as long as the server says, or else longer each time. The call's
    timeout bounds all tries together.

    Args:
        target: "host:port", or any gRPC target. Calls take turns between the addresses that it resolves to.
        tls: True for TLS with the system's root certificates, or credentials of your own.
        root_certificates: PEM certificates to trust instead of the system's; implies TLS.
        client_certificate: PEM certificate chain to show to the server (mTLS); implies TLS, and
            needs `client_key`, its PEM private key.
        token: Bearer token to send with every call, or a function that returns the present one. The function is
            called before each call, and must not block. Without TLS the network can read the token.
        timeout: Seconds that a call may take if it names no timeout itself; None: no limit. It is the gRPC deadline,
            which the server sees too. It does not apply to streams.
        metadata: Sent with every call.
        retries: False to try every call once.
        health_checks: True to send no call to servers that report that they are loading or draining. For targets that
            resolve to the servers themselves: behind a proxy, the health of one server would stand for all.
        max_send_bytes: The largest request that can be sent.
        max_receive_bytes: The largest answer that is accepted.

    Raises:
        ValueError: Certificates are given beside credentials of your own, or a certificate without its key, or the
            token is not valid.
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
            grpc.insecure_channel(target, options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options)
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._target = target
        self._timeout = timeout
        self._metadata = call_metadata(metadata, token)
        self._max_send_bytes = max_send_bytes

    def predict(
        self, image: Image, *, timeout: float | None = None, **options: Unpack[PredictOptions]
    ) -> PredictResult:
        """Classifies one image.

        Args:
            image: A path, the bytes of an encoded image, a Pillow image, or an array: uint8
                [height, width, 3] RGB, or float32 [channels, height, width] as the model wants it.
            timeout: Seconds until the call is given up.
            **options: `model`, `budget` (seconds, a timedelta, or None for no deadline), `r`, `min_r`, `max_r`,
                `min_quality`, `top_k`, `features`, `patch_features`, `normalize`, `float16` and `token_map`; see
                PredictOptions.

        Raises:
            TomeError: The server refused or failed, or could not be reached.
            OSError: The image's file cannot be read.
            TypeError: `image` is no image, or there is no such option.
            ValueError: An array or an option's value cannot be sent.
        """
        request = predict_request(image, options)
        return predict_result(self._call(self._stub.Predict, request, timeout))

    def predict_stream(
        self, items: Iterable[StreamItem], *, timeout: float | None = None, in_flight: int = 32
    ) -> Iterator[StreamResult]:
        """Classifies many images over one call; yields results in the order of completion.

        A stream is for bulk work: an item whose options name no `budget` has no deadline. It runs when the device has
        room, after requests that have deadlines, and is never refused for time.

        An item that fails, or cannot be sent, yields its error, and the others go on. The call starts when the first
        result is read, and ends early if the iterator is closed. `items` is read by another thread.

        Args:
            items: The images, each with an id.
            timeout: Seconds until the whole stream is given up; every item's deadline ends with it.
            in_flight: The most items that are sent and not yet yielded. A long `items` is read only as fast as the
                server answers and the caller takes the answers.

        Raises:
            TomeError: The stream as a whole failed.
            Exception: Whatever `items` raises.
        """
        exchange = _Exchange(in_flight)
        requests = exchange.requests(items, self._max_send_bytes)
        call = self._stub.PredictStream(requests, timeout=timeout, metadata=self._metadata())
        # Reading in a thread of its own lets errors of items that are not sent overtake the server's answers.
        receiving = threading.Thread(
            target=exchange.receive, args=(call, self._target), name="tome-client-stream", daemon=True
        )
        receiving.start()
        try:
            while (result := exchange.arrived.get()) is not _END:
                if isinstance(result, Exception):
                    raise result
                exchange.room.release()
                yield result
        finally:
            exchange.closed.set()
            exchange.room.release()
            call.cancel()
            # A thread that still reads the call when Python exits holds a lock that the call's own end then waits for.
            if receiving is not threading.current_thread():  # the garbage collector may run this on any thread
                receiving.join(_JOIN_SECONDS)

    def models(self, *, timeout: float | None = None) -> tuple[ModelSummary, ...]:
        """Lists the hosted models.

        Raises:
            TomeError: The server failed or could not be reached.
        """
        request = inference_pb2.ListModelsRequest()
        return model_summaries(self._call(self._stub.ListModels, request, timeout))

    def model(self, name: str = "", *, timeout: float | None = None) -> ModelInfo:
        """Describes one model, the server's first unless named.

        Raises:
            TomeError: No model has this name (NOT_FOUND), or the server failed or could not be reached.
        """
        request = inference_pb2.GetModelRequest(model=name)
        return model_info(self._call(self._stub.GetModel, request, timeout))

    def close(self) -> None:
        """Closes the connection; calls still waiting end with CANCELLED."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., _Response], request: object, timeout: float | None) -> _Response:
        try:
            return method(request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata())
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error


class _Exchange:
    """One stream: its requests, which gRPC's thread reads, and its results, which another thread queues."""

    def __init__(self, in_flight: int) -> None:
        self.arrived: SimpleQueue[StreamResult | Exception | None] = SimpleQueue()
        """Results; an exception that ends the stream; `_END` when there are no more."""
        self.room = threading.Semaphore(in_flight)
        self.closed = threading.Event()
        self._sent = self._answered = 0
        self._exhausted = False

    def requests(self, items: Iterable[StreamItem], max_bytes: int) -> Iterator[inference_pb2.PredictStreamRequest]:
        """Yields the messages of the items, as far as there is room."""
        waiting = iter(items)
        while self.room.acquire() and not self.closed.is_set():
            try:
                item = next(waiting)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:  # gRPC's thread would swallow the error.
                self.arrived.put(error)
                return
            try:
                request = stream_request(item, max_bytes)
            except TomeError as error:
                self.arrived.put(StreamResult(item.id, error=error))
            else:
                self._sent += 1
                yield request

    def receive(self, call: Iterable[inference_pb2.PredictStreamResponse], target: str) -> None:
        """Queues the results of a call until it ends."""
        try:
            for response in call:
                self._answered += 1
                self.arrived.put(stream_result(response))
        except grpc.RpcError as error:
            self.arrived.put(error_from_rpc(error, target))
        else:
            complete = self._exhausted and self._answered == self._sent
            self.arrived.put(_END if complete else ended_early(target))
