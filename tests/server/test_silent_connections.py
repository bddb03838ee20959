"""A server that stops while connections have said nothing yet ends in good order, and answers what it has taken."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml
from google.protobuf.duration_pb2 import Duration

from tests.server.api.rpc.wire import connected, device_held, scrape, until
from tests.server_process import ServerProcess
from tests.silent import silent_connections
from tome_api.v1 import inference_pb2 as pb

IN_FLIGHT = 8


@pytest.fixture(params=["plain text", "TLS"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], grpc.ChannelCredentials | None]:
    """A server's settings, and what a client needs for them."""
    if request.param == "plain text":
        return {}, None
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    files = {"key": str(tmp_path / "key.pem"), "certificate": str(tmp_path / "certificate.pem")}
    return {"tls": files}, grpc.ssl_channel_credentials(authority.cert_pem.bytes())


def test_connections_that_say_nothing_cost_neither_the_stop_nor_an_answer(
    settings: tuple[dict[str, Any], grpc.ChannelCredentials | None],
    own_server: Callable[..., ServerProcess],
    samples: dict[Path, str],
    tmp_path: Path,
) -> None:
    """gRPC 1.78 died of it by SIGSEGV, in one of nine stops at the least; test_churn.py stops servers many times."""
    of_the_server, credentials = settings
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump(of_the_server))
    server = own_server("--config", str(config), "--dtype", "float32", "--drain-timeout", "600s")
    request = pb.PredictRequest(image=min(samples).read_bytes(), r=8, latency_budget=Duration(seconds=600))
    with connected(server.target, credentials) as stub, silent_connections(server.target):
        with device_held(server):
            calls = [stub.Predict.future(request) for _ in range(IN_FLIGHT)]
            until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == IN_FLIGHT, "calls are in flight")
            server.process.send_signal(signal.SIGTERM)
        assert [call.result().merging.r for call in calls] == [8] * IN_FLIGHT
        assert server.process.wait(120) == 0, server.log.read_text()
