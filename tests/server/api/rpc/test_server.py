"""What the server tells gRPC."""

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from tome_client.channel import channel_options
from tome_server.api.rpc.server import RpcSettings, server_options

FULL = RpcSettings("", 2**20, max_concurrent_streams=1, max_connections=1, max_age=1.0, max_age_grace=1.0)
CHANNEL = channel_options("localhost:1", retries=True, health_checks=True, max_send_bytes=1, max_receive_bytes=1)


@pytest.mark.parametrize("name", sorted({name for name, _ in [*server_options(FULL), *CHANNEL]}))
def test_grpc_knows_every_option(name: str) -> None:
    """It takes one that it doesn't know without a word."""
    assert name.encode() in Path(cygrpc.__file__).read_bytes()
