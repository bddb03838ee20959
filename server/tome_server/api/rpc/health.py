"""The standard health service, grpc.health.v1.

This replaces the servicer of grpcio-health-checking, which forgets all watchers when one leaves, and whose calls to
Watch never end, so that a stopping server would wait for its clients. Clients that balance by health keep one Watch
open on each connection, and call it again as soon as it ends.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The same health for all services: NOT_SERVING until `ready`, and again from `stop` on.

    Without `watched`, Watch is UNIMPLEMENTED, which clients take for healthy.
    """

    def __init__(self, services: Sequence[str], watched: bool = True) -> None:
        self._services = services
        self._watched = watched
        self.serving = False
        """Whether the reported status is SERVING."""
        self._closed = False
        self._changed = asyncio.Event()

    def ready(self) -> None:
        """Report SERVING."""
        self.serving = True
        self._notify()

    def stop(self) -> None:
        """Report NOT_SERVING."""
        self.serving = False
        self._notify()

    def close(self) -> None:
        """End every Watch. Before its connection is told to go away, a client would call Watch again at once."""
        self._closed = True
        self._notify()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Report the status once. NOT_FOUND for an unknown service."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Report the status now and at every change."""
        if not self._watched:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a connection has one stream here, and calls need it")
        reported = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != reported:
                yield health_pb2.HealthCheckResponse(status=status)
                reported = status
            elif self._closed:
                return
            else:
                await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        return int(
            health_pb2.HealthCheckResponse.SERVING if self.serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
