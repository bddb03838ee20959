import socket

import pytest

from tome_server.api.rest.server import _listen
from tome_server.errors import PortInUseError


def test_answers_are_sent_without_waiting_for_acknowledgements() -> None:
    with _listen("127.0.0.1", 0, "") as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_in_use_is_said_in_a_sentence() -> None:
    with _listen("127.0.0.1", 0, "") as listening:
        port = listening.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"can't serve metrics on here:{port}: Address already in use"):
            _listen("127.0.0.1", port, f"here:{port}")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_all_addresses_are_those_of_both_families() -> None:
    with _listen("::", 0, "") as listening:
        port = listening.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=10).close()
