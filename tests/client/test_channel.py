import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import trustme

from tests.client.peer import Failure, Health, Peer
from tome_client import Client, StreamItem, TomeError, __version__
from tome_client.channel import channel_credentials, channel_options

PAGE = Path(__file__).parents[2] / "docs/load-balancing.md"
UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE)
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


def pushback(milliseconds: int) -> tuple[tuple[str, str], ...]:
    return (("grpc-retry-pushback-ms", str(milliseconds)),)


@pytest.mark.parametrize("failure", [UNAVAILABLE, Failure(FULL), Failure(grpc.StatusCode.CANCELLED)])
def test_a_busy_or_absent_server_is_tried_five_times(peer: Peer, failure: Failure) -> None:
    peer.failures.extend([failure] * 4)
    with Client(peer.target) as client:
        assert client.predict(b"").model == "first"
    assert len(peer.calls) == 5


def test_the_sixth_time_is_not_tried(peer: Peer) -> None:
    peer.failures.extend([UNAVAILABLE] * 5)
    with Client(peer.target) as client, pytest.raises(TomeError, match=r"UNAVAILABLE: .*scripted"):
        client.predict(b"")
    assert len(peer.calls) == 5


def test_a_retry_waits_as_long_as_the_server_asks(peer: Peer) -> None:
    peer.failures.append(Failure(FULL, trailers=pushback(400)))
    with Client(peer.target) as client:
        client.predict(b"")
    first, second = peer.calls
    assert second.at - first.at >= 0.4


def test_a_server_that_asks_not_to_come_back_is_not_asked_again(peer: Peer) -> None:
    peer.failures.append(Failure(FULL, trailers=pushback(-1)))
    with Client(peer.target) as client, pytest.raises(TomeError, match="RESOURCE_EXHAUSTED"):
        client.predict(b"")
    assert len(peer.calls) == 1


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INTERNAL,
    ],
)
def test_what_would_fail_again_is_not_retried(peer: Peer, code: grpc.StatusCode) -> None:
    peer.failures.append(Failure(code))
    with Client(peer.target) as client, pytest.raises(TomeError, match=code.name):
        client.predict(b"")
    assert len(peer.calls) == 1


def test_retries_can_be_switched_off(peer: Peer) -> None:
    peer.failures.append(UNAVAILABLE)
    with Client(peer.target, retries=False) as client, pytest.raises(TomeError, match="UNAVAILABLE"):
        client.predict(b"")
    assert len(peer.calls) == 1


def test_a_large_image_is_retried_too(peer: Peer) -> None:
    image = bytes(5_000_000)
    peer.failures.append(UNAVAILABLE)
    with Client(peer.target) as client:
        client.predict(image)
    assert [call.request.image == image for call in peer.calls] == [True, True]


def test_a_stream_is_retried_from_its_start(peer: Peer) -> None:
    peer.failures.append(UNAVAILABLE)
    with Client(peer.target) as client:
        results = list(client.predict_stream([StreamItem("a", b""), StreamItem("b", b"")]))
    assert [one.id for one in results] == ["a", "b"]


def test_the_timeout_bounds_all_tries_together(peer: Peer) -> None:
    peer.failures.extend([Failure(FULL, trailers=pushback(30_000))] * 3)
    with Client(peer.target) as client, pytest.raises(TomeError, match="within the timeout"):
        client.predict(b"", timeout=0.2)
    # Or none, if the machine was busy for that long.
    assert len(peer.calls) <= 1


def test_retries_cease_while_most_calls_fail(peer: Peer) -> None:
    peer.failures.extend([Failure(FULL, trailers=pushback(1))] * 400)
    with Client(peer.target) as client:
        for _ in range(100):
            with pytest.raises(TomeError):
                client.predict(b"")
    # Four tries each until half of the hundred tokens are spent, then one each.
    assert 100 < len(peer.calls) < 150


@pytest.mark.parametrize("health_checks", [False, True])
def test_the_service_config_is_the_documented_one(health_checks: bool) -> None:
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    documented, checks = map(json.loads, blocks)
    options = dict(
        channel_options("localhost:1", retries=True, health_checks=health_checks, max_send_bytes=1, max_receive_bytes=1)
    )
    assert json.loads(options["grpc.service_config"]) == documented | (checks if health_checks else {})


def test_calls_go_round_the_servers() -> None:
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer()) for _ in range(2)]
        addresses = ",".join(one.target for one in peers)
        client = stack.enter_context(Client(f"ipv4:{addresses}"))
        client.models()
        # The second connection may take a moment longer than the first.
        end = time.monotonic() + 60
        while not all(one.calls for one in peers):
            assert time.monotonic() < end
            client.predict(b"")
        for one in peers:
            one.calls.clear()
        for _ in range(10):
            client.predict(b"")
        assert [len(one.calls) for one in peers] == [5, 5]


# Clients on one address, with health checks and without, opened and closed again and again.
TWO_CLIENTS = """
import asyncio, sys
from contextlib import suppress
from threading import Thread
from tome_client import AsyncClient, Client, TomeError

target, cycles = sys.argv[1], int(sys.argv[2])

def ask(health_checks):
    with suppress(TomeError), Client(target, health_checks=health_checks, retries=False) as client:
        client.models(timeout=20)

async def ask_both():
    for first, second in ((False, True), (True, False)):
        async with AsyncClient(target, health_checks=first) as one, AsyncClient(target, health_checks=second) as other:
            with suppress(TomeError):
                await asyncio.gather(one.models(timeout=20), other.models(timeout=20))

for cycle in range(cycles):
    both = [Thread(target=ask, args=(health_checks,)) for health_checks in (True, False)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    asyncio.run(ask_both())
print("all", cycles)
"""


def test_clients_with_and_without_health_checks_live_side_by_side_in_a_process() -> None:
    cycles = 100
    with Peer(health=Health()) as peer:
        command = [sys.executable, "-c", TWO_CLIENTS, peer.target, str(cycles)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"all {cycles}\n", "")


def test_each_client_has_a_connection_of_its_own(peer: Peer) -> None:
    """In which case gRPC shares nothing between them that two could race for."""
    with Client(peer.target) as one, Client(peer.target) as other:
        one.models()
        other.models()
    assert len({call.peer for call in peer.calls}) == 2


def test_a_server_that_is_gone_is_passed_over() -> None:
    with Peer() as gone:
        pass
    with Peer() as present, Client(f"ipv4:{gone.target},{present.target}") as client:
        for _ in range(4):
            assert client.predict(b"").model == "first"


def test_the_server_learns_who_asks(peer: Peer) -> None:
    with Client(peer.target, metadata=[("authorization", "Bearer secret")]) as client:
        client.predict(b"")
    metadata = peer.calls[0].metadata
    assert metadata["user-agent"].startswith(f"tome-client/{__version__} grpc-python/")
    assert metadata["authorization"] == "Bearer secret"


def test_messages_up_to_32_mib_are_sent_and_no_larger_ones(peer: Peer) -> None:
    with Client(peer.target) as client:
        client.predict(bytes(30_000_000))
        with pytest.raises(TomeError, match=r"RESOURCE_EXHAUSTED.*larger than max"):
            client.predict(bytes(34_000_000))
    assert Counter(len(call.request.image) for call in peer.calls) == {30_000_000: 1}


def test_limits_can_be_set(peer: Peer) -> None:
    with Client(peer.target, max_send_bytes=1000) as client, pytest.raises(TomeError, match="larger than max"):
        client.predict(bytes(1001))
    with Client(peer.target, max_receive_bytes=10) as client, pytest.raises(TomeError, match="larger than max"):
        client.predict(b"", model="a name of more than ten bytes")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", key, "-out", chain], check=True, capture_output=True)
    return key.read_bytes(), chain.read_bytes()


def test_a_server_is_trusted_by_the_root_certificates_given(certificate: tuple[bytes, bytes]) -> None:
    key, chain = certificate
    with Peer(grpc.ssl_server_credentials([(key, chain)])) as peer:
        with Client(peer.target, root_certificates=chain) as client:
            assert client.predict(b"").model == "first"
        own = grpc.ssl_channel_credentials(chain)
        with Client(peer.target, tls=own) as client:
            assert client.predict(b"").model == "first"


def test_health_is_asked_for_as_securely(certificate: tuple[bytes, bytes]) -> None:
    key, chain = certificate
    health = Health()
    with Peer(grpc.ssl_server_credentials([(key, chain)]), health) as peer:
        with Client(peer.target, root_certificates=chain, health_checks=True) as client:
            assert client.predict(b"").model == "first"
        health.serving = False
        with (
            Client(peer.target, root_certificates=chain, retries=False, health_checks=True) as client,
            pytest.raises(TomeError, match="no server there is serving"),
        ):
            client.predict(b"")


@pytest.mark.parametrize("tls", [True, False])
def test_a_server_is_not_trusted_without(certificate: tuple[bytes, bytes], tls: bool) -> None:
    with (
        Peer(grpc.ssl_server_credentials([certificate])) as peer,
        Client(peer.target, tls=tls, retries=False) as client,
        pytest.raises(TomeError, match="is unavailable"),
    ):
        client.predict(b"")


def test_root_certificates_never_mean_plain_text() -> None:
    assert channel_credentials(tls=False, root_certificates=None) is None
    assert channel_credentials(tls=False, root_certificates=b"PEM") is not None


def test_root_certificates_beside_credentials_are_refused() -> None:
    for certificates in ({"root_certificates": b"PEM"}, {"client_certificate": b"PEM", "client_key": b"PEM"}):
        with pytest.raises(ValueError, match="part of the credentials"):
            Client("localhost:1", tls=grpc.ssl_channel_credentials(), **certificates)


def test_a_server_that_asks_for_certificates_gets_the_clients() -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    server = ca.issue_cert("localhost")
    pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
    root = ca.cert_pem.bytes()
    with Peer(grpc.ssl_server_credentials([pair], root, require_client_auth=True)) as peer:
        for issuer, taken in ((ca, True), (stranger, False)):
            mine = issuer.issue_cert("client")
            with Client(
                peer.target,
                root_certificates=root,
                client_certificate=mine.cert_chain_pems[0].bytes(),
                client_key=mine.private_key_pem.bytes(),
                retries=False,
            ) as client:
                if taken:
                    assert client.predict(b"").model == "first"
                else:
                    with pytest.raises(TomeError, match="is unavailable"):
                        client.predict(b"")


@pytest.mark.parametrize("half", ["client_certificate", "client_key"])
def test_a_certificate_without_its_key_is_refused(half: str) -> None:
    with pytest.raises(ValueError, match="go together"):
        Client("localhost:1", **{half: b"PEM"})


@pytest.mark.parametrize("token", ["", "two words", "line\n", "höflich"])
def test_what_cannot_be_a_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(ValueError, match="a token is ASCII") as caught:
        Client("localhost:1", token=token)
    assert not token or token not in str(caught.value)
