"""The HTTP paths, and their handlers."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from tome_server.api.counting import counted
from tome_server.api.oip.describe import server_metadata
from tome_server.api.oip.messages import shown
from tome_server.api.oip.parameters import seconds_of
from tome_server.api.oip.service import OpenInference
from tome_server.api.reading import read_aside
from tome_server.api.rest import convert
from tome_server.api.rest.access import Access
from tome_server.api.rest.body import BodyMemory, BodyShare, read_body
from tome_server.api.rest.errors import refusal
from tome_server.api.rest.failures import Failures
from tome_server.api.tokens import Tokens
from tome_server.errors import (
    ClientGoneError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from tome_server.serving.engine import RETRY_AFTER

T = TypeVar("T")

JSON_LENGTH = "Inference-Header-Content-Length"
TIMEOUT = "X-Request-Timeout-Ms"
IMAGE_TYPES = "image/"
UNSUPPORTED = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/trace/setting",
    "/v2/models/{name}/trace/setting",
    "/v2/logging",
)


class Protocol:
    """The paths of the Open Inference Protocol, and of Triton's extensions of it."""

    def __init__(self, service: OpenInference, max_bytes: int, body_memory: int) -> None:
        self._service = service
        self._max_bytes = max_bytes
        self._bodies = BodyMemory(max(body_memory, max_bytes))
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def routes(self) -> list[Route]:
        """Return the routes of all paths."""
        routes = [Route("/v2", self.server), Route("/v2/models/stats", self.statistics)]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(model, self.metadata),
                Route(f"{model}/ready", self.model_ready),
                Route(f"{model}/config", self.config),
                Route(f"{model}/stats", self.statistics),
                Route(f"{model}/infer", self.infer, methods=["POST"]),
            ]
        return [
            *routes,
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self.unload, methods=["POST"]),
            *(Route(path, self.unsupported, methods=["GET", "POST"]) for path in UNSUPPORTED),
        ]

    async def server(self, _request: Request) -> Response:
        """Describe the server."""
        return JSONResponse(server_metadata())

    async def metadata(self, request: Request) -> Response:
        """Describe a model's inputs and outputs."""
        return JSONResponse(self._service.metadata(*_model(request)))

    async def config(self, request: Request) -> Response:
        """Describe a model's settings."""
        return JSONResponse(self._service.config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        """Return the statistics of one model, or of every model."""
        return JSONResponse({"model_stats": self._service.statistics(*_model(request))})

    async def model_ready(self, request: Request) -> Response:
        """Report whether a model is ready."""
        name, version = _model(request)
        ready = self._service.model_ready(name, version)
        if not ready:
            self._service.metadata(name, version)  # raises if it is unknown
        return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)

    async def index(self, request: Request) -> Response:
        """List the models."""
        with self._bodies.holding() as share:
            body = await read_body(request, self._max_bytes, share)
        return JSONResponse(self._service.index(await read_aside(convert.ready_only, body)))

    async def load(self, request: Request) -> Response:
        """Take a model into service."""
        await _unless_gone(request.receive, self._service.load(request.path_params["name"]))
        return Response()

    async def unload(self, request: Request) -> Response:
        """Take a model out of service."""
        await _unless_gone(request.receive, self._service.unload(request.path_params["name"]))
        return Response()

    async def unsupported(self, request: Request) -> Response:
        """Refuse a part of the protocol that this server doesn't support."""
        raise UnsupportedError(f"{request.url.path[:100]} is not part of this server; see its docs")

    async def infer(self, request: Request) -> Response:
        """Run a model on the images of one request."""
        arrival = asyncio.get_running_loop().time()
        name, version = _model(request)
        self._answering += 1
        self._idle.clear()
        try:
            with counted(self._service.engine, name), self._bodies.holding() as share:
                return await self._infer(request, arrival, name, version, share)
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()

    async def drain(self, grace: float) -> None:
        """Wait until the engine drains and all requests are answered, or for `grace` seconds."""
        try:
            async with asyncio.timeout(grace):
                await self._service.engine.draining.wait()
                await self._idle.wait()
        except TimeoutError:
            pass

    def _check_room(self) -> None:
        """Refuse a request before its body is read, if the server is full or draining."""
        engine = self._service.engine
        if engine.draining.is_set():
            raise UnavailableError("the server is shutting down")
        if self._answering > engine.max_pending:
            raise OverloadedError(engine.max_pending, RETRY_AFTER)

    async def _infer(self, request: Request, arrival: float, name: str, version: str, share: BodyShare) -> Response:
        self._check_room()
        headers = request.headers
        time_remaining = _time_remaining(headers.get(TIMEOUT))
        json_length = _json_length(headers)
        body = await read_body(request, self._max_bytes, share)
        if convert.takes_long_to_read(body, json_length):
            asked = await read_aside(convert.request_from, body, json_length, name, version)
        else:
            asked = convert.request_from(body, json_length, name, version)
        response = await _unless_gone(request.receive, self._service.infer(asked, arrival, time_remaining))
        if convert.takes_long(response):
            content, json_length = await asyncio.to_thread(convert.response_to, response, asked.as_bytes)
        else:
            content, json_length = convert.response_to(response, asked.as_bytes)
        if json_length is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={JSON_LENGTH: str(json_length)}, media_type="application/octet-stream")


def application(protocol: Protocol | None, service: OpenInference, tokens: Tokens | None) -> Starlette:
    """Return the application for metrics and health, and for `protocol` unless that is None."""
    metrics = service.engine.metrics

    async def exposition(request: Request) -> Response:
        # This takes milliseconds, so it runs in a thread, which the event loop can interrupt.
        body, content_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_request: Request) -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    async def refused(_request: Request, error: Exception) -> Response:
        return refusal(error)

    async def no_such_path(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    routes = [Route("/metrics", exposition), Route("/v2/health/live", live), Route("/v2/health/ready", ready)]
    return Starlette(
        routes=routes + (protocol.routes() if protocol else []),
        middleware=[Middleware(Failures), Middleware(Access, tokens=tokens, metrics=metrics)],
        exception_handlers={RequestError: refused, HTTPException: no_such_path},
    )


def _model(request: Request) -> tuple[str, str]:
    return request.path_params.get("name", ""), request.path_params.get("version", "")


def _time_remaining(header: str | None) -> float | None:
    if header is None:
        return None
    try:
        milliseconds = float(header)
    except ValueError:
        raise InvalidRequestError(TIMEOUT, f"must be a number of milliseconds, not {shown(header)}") from None
    return seconds_of(milliseconds, TIMEOUT)


def _json_length(headers: Headers) -> int | None:
    """Return the length of the JSON in the body: None if all is JSON, 0 if the body is an image."""
    header = headers.get(JSON_LENGTH)
    if header is None:
        return 0 if headers.get("content-type", "").lower().startswith(IMAGE_TYPES) else None
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise InvalidRequestError(JSON_LENGTH, f"must be a number of bytes, not {shown(header)}")
    return int(header)


async def _unless_gone(receive: Receive, answer: Coroutine[None, None, T]) -> T:
    """Return the answer. If the client closes its connection first, cancel it and raise ClientGoneError."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGoneError
        return answering.result()
    finally:
        leaving.cancel()
        answering.cancel()
