"""What the network is asked when a call reached nothing: the advice doesn't depend on gRPC's words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
import trustme

from tests.client.peer import Peer
from tome_client.reachability import advice

NO_SERVER = "is a server running there? tome-server serve starts one, --target names another"
NO_TARGET = "--target names the server, as HOST:PORT"


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nothing else takes meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def secure_peer(**options: object) -> Iterator[Peer]:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    with Peer(grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), **options)) as peer:
        yield peer


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ipv4:127.0.0.1:{}", "dns:///localhost:{}"])
@pytest.mark.parametrize("tls", [False, True])
def test_where_nothing_listens_a_server_may_be_missing(form: str, tls: bool) -> None:
    with closed_port() as port:
        assert advice(form.format(port), tls=tls) == NO_SERVER


@pytest.mark.parametrize(
    "target",
    ["nowhere.invalid:1", "nowhere.invalid", "http://localhost:8500", "dns:///nowhere.invalid:1", "", ":1", "a b:1",
     f"{'long' * 20}.invalid:1", "localhost:99999", "ipv4:127.0.0.999:1", "127.1:1", "localhost:port"],
)  # fmt: skip
def test_what_is_no_target_is_said_to_be_none(target: str) -> None:
    assert advice(target, tls=False) == NO_TARGET


def test_a_server_that_is_there_is_not_the_reason(peer: Peer) -> None:
    assert advice(peer.target, tls=False) is None
    with closed_port() as port:
        assert advice(f"ipv4:127.0.0.1:{port},{peer.target}", tls=False) is None


def test_plain_text_is_told_from_tls(peer: Peer) -> None:
    assert advice(peer.target, tls=True) == "the server there speaks plain text: leave out --tls and --ca"


@pytest.mark.parametrize("require_client_auth", [False, True])
def test_tls_is_told_from_plain_text(require_client_auth: bool) -> None:
    with secure_peer(require_client_auth=require_client_auth) as peer:
        assert advice(peer.target, tls=False) == "the server there speaks TLS: add --tls"
        assert advice(peer.target, tls=True) is None


@pytest.mark.parametrize("tls", [False, True])
def test_of_a_server_that_closes_connections_nothing_is_said(tls: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close() -> None:
            listener.accept()[0].close()

        closing = threading.Thread(target=close)
        closing.start()
        assert advice(f"127.0.0.1:{listener.getsockname()[1]}", tls=tls) is None
        closing.join()


def test_of_one_that_says_nothing_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tome_client.reachability._TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert advice(f"127.0.0.1:{listener.getsockname()[1]}", tls=True) is None


def test_a_socket_in_the_file_system_is_not_looked_for() -> None:
    assert advice("unix:/nowhere.sock", tls=False) is None


def test_names_that_a_proxy_resolves_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert advice("nowhere.invalid:1", tls=False) is None
