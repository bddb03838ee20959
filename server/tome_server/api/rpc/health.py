"""The standard health service, grpc.health.v1.

Not the servicer of grpcio-health-checking: when one watcher leaves it forgets the others, and its calls to Watch never
end, so that a server told to stop would wait for its clients. Clients that balance by health keep one Watch open on
each connection, and call it anew as soon as it ends.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One health for all services: NOT_SERVING at first and from `stop` on.

    Without `watched`, Watch is UNIMPLEMENTED, which such clients take for health.
    """

    def __init__(self, services: Sequence[str], watched: bool = True) -> None:
        self._services = services
        self._watched = watched
        self.serving = False
        """Whether that is what it reports."""
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
        """End every Watch. On a connection that still takes calls each would come back at once, and again."""
        self._closed = True
        self._notify()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Report once. NOT_FOUND for a service that isn't here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Report now and at every change."""
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
