"""How many requests one client may have in the server."""

from collections.abc import Iterator

import pytest

from tome_server.errors import ClientLimitError
from tome_server.observability import request_context
from tome_server.serving.client_limit import ClientLimit


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    token = request_context.client.set("")
    yield
    request_context.client.reset(token)


def test_one_request_too_many_of_a_client_is_refused_until_another_ends() -> None:
    limit = ClientLimit(2, 0.1)
    request_context.client.set("alice")
    with limit.hold():
        with limit.hold(), pytest.raises(ClientLimitError, match=r"^2 requests of this client"), limit.hold():
            pass
        with limit.hold():
            pass


def test_each_client_has_a_limit_of_its_own() -> None:
    limit = ClientLimit(1, 0.1)
    request_context.client.set("alice")
    with limit.hold():
        request_context.client.set("bob")
        with limit.hold():
            pass


@pytest.mark.parametrize(("most", "client"), [(None, "alice"), (1, "")])
def test_without_a_limit_or_a_known_client_none_is_refused(most: int | None, client: str) -> None:
    limit = ClientLimit(most, 0.1)
    request_context.client.set(client)
    with limit.hold(), limit.hold():
        pass


def test_clients_that_have_gone_are_not_remembered() -> None:
    limit = ClientLimit(1, 0.1)
    for number in range(100):
        request_context.client.set(f"client {number}")
        with limit.hold():
            pass
    assert not limit._held
