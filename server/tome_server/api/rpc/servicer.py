"""The Inference service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_server.api.counting import count, counted
from tome_server.api.failures import final_status
from tome_server.api.rpc import convert
from tome_server.api.rpc.streams import Context, stream_replies
from tome_server.api.status import abort, code_name, status_of
from tome_server.errors import InvalidRequestError, RequestError
from tome_server.serving.engine import Engine


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Implements `tome_api.v1.Inference`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:  # noqa: N802
        """Classify one image."""
        try:
            return await self._predict(request, context)
        except Exception as error:
            await abort(context, final_status(error))

    async def PredictStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PredictStreamRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify a stream of images, answering in the order of completion."""
        unanswered: set[str] = set()

        async def answer(message: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
            response = pb.PredictStreamResponse(id=message.id)
            if message.id in unanswered:
                response.error.CopyFrom(status_of(InvalidRequestError("id", "is that of an unanswered request")))
                count(self._engine, message.request.model, code_name(response.error))
                return response
            unanswered.add(message.id)
            try:
                response.response.CopyFrom(await self._predict(message.request, context))
            except Exception as error:
                response.error.CopyFrom(final_status(error))
            unanswered.discard(message.id)
            return response

        try:
            async with aclosing(stream_replies(requests, answer, self._engine.draining)) as answers:
                async for response in answers:
                    yield response
        except RequestError as error:
            await abort(context, status_of(error))

    async def ListModels(  # noqa: N802
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        """List the hosted models, those still loading included."""
        registry = self._engine.registry
        summaries = [
            convert.summary_of(name, registry.models[name].model if name in registry.models else None)
            for name in registry.names
        ]
        return pb.ListModelsResponse(models=summaries)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """Describe one model."""
        try:
            return pb.GetModelResponse(model=convert.model_to(self._engine.registry.model(request.model)))
        except RequestError as error:
            await abort(context, status_of(error))

    async def _predict(self, message: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Answer one message, and count its status."""
        arrival = asyncio.get_running_loop().time()
        with counted(self._engine, message.model):
            request = convert.request_from(message, arrival, context.time_remaining())
            return convert.response_to(await self._engine.predict(request), message)
