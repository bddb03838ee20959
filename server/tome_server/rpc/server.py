"""The gRPC server: services, health, reflection, limits."""

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_server.engine import Engine
from tome_server.errors import PortInUseError
from tome_server.rpc import health
from tome_server.rpc.servicer import InferenceServicer
from tome_server.rpc.tls import TlsFiles, credentials

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
# Room for what goes with an image of the largest size, so that one somewhat above it gets our own, clearer refusal.
MESSAGE_SLACK = 2


class RpcServer:
    """A gRPC server for one engine: listening from `start`, healthy from `ready`."""

    def __init__(self, engine: Engine, address: str, max_image_bytes: int, tls: TlsFiles | None = None) -> None:
        self._engine = engine
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MESSAGE_SLACK * max_image_bytes),
                ("grpc.max_send_message_length", -1),
                # Else a second server on the same port would silently take half of the connections.
                ("grpc.so_reuseport", 0),
                # Clients may ping every 20 s, also between calls, to keep a path through a NAT or proxy open.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        self._health = health.HealthServicer(("", SERVICE))
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        host = address.rpartition(":")[0]
        try:
            self.port = self._listen(address, tls)
        except RuntimeError as error:
            raise PortInUseError(f"can't listen on {address}: is the port in use?") from error
        self.address = f"{host}:{self.port}"

    async def start(self) -> None:
        """Start to listen, NOT_SERVING."""
        await self._server.start()

    def ready(self) -> None:
        """Report SERVING."""
        self._health.ready()

    async def stop(self, grace: float) -> None:
        """Report NOT_SERVING, refuse new calls, and end once calls in flight are answered, or after `grace` seconds."""
        self._health.stop()
        self._engine.drain()
        await self._server.stop(grace)

    def _listen(self, address: str, tls: TlsFiles | None) -> int:
        if tls is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials(tls))
