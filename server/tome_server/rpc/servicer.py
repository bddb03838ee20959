"""The Inference service: convert, call the engine, convert back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError

from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_server.engine import Engine
from tome_server.errors import InvalidRequestError, RequestError, UnavailableError
from tome_server.observability.trace_context import sampled_trace_id
from tome_server.rpc import convert
from tome_server.rpc.errors import abort, code_name, status_of

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

# Messages of one stream that may be in the server at once; more are left in the transport, which slows the sender down.
STREAM_WINDOW = 64


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Answers `tome_api.v1.Inference`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:  # noqa: N802
        """Classify one image."""
        try:
            return await self._predict(request, context)
        except Exception as error:
            await abort(context, status_of(error))

    async def PredictStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PredictStreamRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify a stream of images, answering in the order of completion."""
        answers: asyncio.Queue[pb.PredictStreamResponse | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        reader = asyncio.create_task(self._read(requests, context, answers, window))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                window.release()
            await reader
        except RequestError as error:
            await abort(context, status_of(error))
        finally:
            reader.cancel()

    async def ListModels(  # noqa: N802
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        """List the hosted models, those still loading included."""
        engine = self._engine
        summaries = [
            convert.summary_of(name, engine.models[name].model if name in engine.models else None)
            for name in engine.names
        ]
        return pb.ListModelsResponse(models=summaries)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """Describe one model."""
        try:
            return pb.GetModelResponse(model=convert.model_to(self._engine.model(request.model)))
        except RequestError as error:
            await abort(context, status_of(error))

    async def _predict(self, message: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Answer one message and count how that went."""
        arrival = asyncio.get_running_loop().time()
        code = "CANCELLED"
        try:
            request = convert.request_from(message, arrival, context.time_remaining(), _trace_id(context))
            response = convert.response_to(await self._engine.predict(request))
            code = "OK"
        except Exception as error:
            code = code_name(status_of(error))
            if not isinstance(error, RequestError):
                log.exception("unexpected error")
            raise
        finally:
            self._count(message.model, code)
        return response

    async def _read(
        self,
        requests: AsyncIterator[pb.PredictStreamRequest],
        context: Context,
        answers: "asyncio.Queue[pb.PredictStreamResponse | None]",
        window: asyncio.Semaphore,
    ) -> None:
        """Start a task for each message of a stream, until the client half-closes or the server drains."""
        unanswered: set[str] = set()
        refusal: RequestError | None = None

        async def answer(message: pb.PredictStreamRequest) -> None:
            response = pb.PredictStreamResponse(id=message.id)
            try:
                response.response.CopyFrom(await self._predict(message.request, context))
            except Exception as error:
                response.error.CopyFrom(status_of(error))
            unanswered.discard(message.id)
            answers.put_nowait(response)

        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    while (message := await self._next(requests)) is not None:
                        await window.acquire()
                        if message.id in unanswered:
                            status = status_of(InvalidRequestError("id", "is that of an unanswered request"))
                            self._count(message.request.model, code_name(status))
                            answers.put_nowait(pb.PredictStreamResponse(id=message.id, error=status))
                        else:
                            unanswered.add(message.id)
                            tasks.create_task(answer(message))
                except RequestError as error:
                    refusal = error
        finally:
            answers.put_nowait(None)
        if refusal is not None:
            raise refusal

    async def _next(self, requests: AsyncIterator[pb.PredictStreamRequest]) -> pb.PredictStreamRequest | None:
        """Return the stream's next message, None at its end.

        Raises UnavailableError once the server drains, InvalidRequestError for bytes that are no message.
        """
        read = asyncio.ensure_future(anext(requests, None))
        drain = asyncio.ensure_future(self._engine.draining.wait())
        try:
            await asyncio.wait({read, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                raise UnavailableError("the server is shutting down; what was received has been answered")
            return read.result()
        except DecodeError as error:
            raise InvalidRequestError("request", "can't be read; what came before has been answered") from error
        finally:
            drain.cancel()
            read.cancel()

    def _count(self, model: str, code: str) -> None:
        """Count an answer. A model's name is the caller's text until it is known, and no label for metrics."""
        name = model or self._engine.names[0]
        self._engine.metrics.requests.labels(name if name in self._engine.names else "unknown", code).inc()


def _trace_id(context: Context) -> str | None:
    """Return the id of the trace that the call's metadata names, if it is recorded."""
    given = next((value for key, value in context.invocation_metadata() or () if key == "traceparent"), None)
    return sampled_trace_id(given) if isinstance(given, str) else None
