"""The Open Inference Protocol's gRPC service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict

from tome_api.oip import open_inference_pb2 as pb
from tome_api.oip import open_inference_pb2_grpc
from tome_server.api.counting import counted
from tome_server.api.failures import final_status
from tome_server.api.oip.describe import server_metadata
from tome_server.api.oip.service import OpenInference
from tome_server.api.reading import read_aside
from tome_server.api.rpc import oip_convert
from tome_server.api.rpc.streams import Context, stream_replies
from tome_server.api.status import abort, code_name, status_of
from tome_server.errors import RequestError, UnsupportedError

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Implements `inference.GRPCInferenceService`."""

    def __init__(self, service: OpenInference) -> None:
        self._service = service

    async def ServerLive(  # noqa: N802
        self, _request: pb.ServerLiveRequest, _context: Context
    ) -> pb.ServerLiveResponse:
        """Report that the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, _request: pb.ServerReadyRequest, _context: Context
    ) -> pb.ServerReadyResponse:
        """Report whether every model is ready."""
        return pb.ServerReadyResponse(ready=self._service.ready)

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, _context: Context
    ) -> pb.ModelReadyResponse:
        """Report whether a model is ready."""
        return pb.ModelReadyResponse(ready=self._service.model_ready(request.name, request.version))

    async def ServerMetadata(  # noqa: N802
        self, _request: pb.ServerMetadataRequest, _context: Context
    ) -> pb.ServerMetadataResponse:
        """Describe the server."""
        return ParseDict(server_metadata(), pb.ServerMetadataResponse())

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Describe a model's inputs and outputs."""
        try:
            return ParseDict(self._service.metadata(request.name, request.version), pb.ModelMetadataResponse())
        except RequestError as error:
            await abort(context, status_of(error))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:  # noqa: N802
        """Describe a model's settings."""
        try:
            config = {"config": self._service.config(request.name, request.version)}
            return ParseDict(config, pb.ModelConfigResponse())
        except RequestError as error:
            await abort(context, status_of(error))

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of one model, or of every model."""
        try:
            statistics = {"model_stats": self._service.statistics(request.name, request.version)}
            return ParseDict(statistics, pb.ModelStatisticsResponse())
        except RequestError as error:
            await abort(context, status_of(error))

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, _context: Context
    ) -> pb.RepositoryIndexResponse:
        """List the models."""
        return ParseDict({"models": self._service.index(request.ready)}, pb.RepositoryIndexResponse())

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Take a model into service."""
        try:
            await self._service.load(request.model_name)
        except RequestError as error:
            await abort(context, status_of(error))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service."""
        try:
            await self._service.unload(request.model_name)
        except RequestError as error:
            await abort(context, status_of(error))
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        """Run a model on the images of one request."""
        try:
            return await self._infer(request, context)
        except Exception as error:
            await abort(context, final_status(error))

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Run models on a stream of requests, answering in the order of completion."""

        async def answer(message: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
            try:
                return pb.ModelStreamInferResponse(infer_response=await self._infer(message, context))
            except Exception as error:
                # The protocol has no field for the code.
                status = final_status(error)
                return pb.ModelStreamInferResponse(
                    error_message=f"{code_name(status)}: {status.message}",
                    infer_response=pb.ModelInferResponse(id=message.id),
                )

        try:
            async with aclosing(stream_replies(requests, answer, self._service.engine.draining)) as answers:
                async for response in answers:
                    yield response
        except RequestError as error:
            await abort(context, status_of(error))

    async def _infer(self, message: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Answer one message, and count its status."""
        arrival = asyncio.get_running_loop().time()
        with counted(self._service.engine, message.model_name):
            if oip_convert.takes_long_to_read(message):
                request = await read_aside(oip_convert.request_from, message)
            else:
                request = oip_convert.request_from(message)
            response = await self._service.infer(request, arrival, context.time_remaining())
            raw = request.as_bytes.every
            if oip_convert.takes_long(response, raw=raw):
                return await asyncio.to_thread(oip_convert.response_to, response, raw=raw)
            return oip_convert.response_to(response, raw=raw)


class UnsupportedMethods(grpc.GenericRpcHandler):
    """Answers the unsupported methods, for shared memory and settings of traces and logs, with UNIMPLEMENTED."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return a handler for any method of this service that no other handler has."""
        service, _, method = (details.method or "").removeprefix("/").partition("/")
        if service != SERVICE:
            return None

        async def refuse(_request: bytes, context: Context) -> NoReturn:
            await abort(context, status_of(UnsupportedError(f"{method[:60]} is not part of this server; see its docs")))

        return grpc.unary_unary_rpc_method_handler(refuse)
