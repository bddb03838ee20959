from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.client.peer import Peer
from tome_client import Client, StreamItem, TomeError


def test_threads_share_a_client_and_get_their_own_answers(peer: Peer) -> None:
    with Client(peer.target) as client, ThreadPoolExecutor(8) as threads:
        names = [f"model-{number}" for number in range(200)]
        answered = threads.map(lambda name: client.predict(b"", model=name).model, names)
        assert list(answered) == names


def test_threads_stream_over_one_client_at_once(peer: Peer) -> None:
    def stream(prefix: str) -> list[str]:
        items = [StreamItem(f"{prefix}{number}", b"") for number in range(50)]
        return [one.id for one in client.predict_stream(items, in_flight=5)]

    with Client(peer.target) as client, ThreadPoolExecutor(4) as threads:
        for prefix, ids in zip("abcd", threads.map(stream, "abcd"), strict=True):
            assert ids == [f"{prefix}{number}" for number in range(50)]


def test_closing_ends_the_calls_that_wait(peer: Peer) -> None:
    peer.hold.clear()
    client = Client(peer.target)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.predict, b"")
        assert peer.called.wait(60)
        client.close()
        with pytest.raises(TomeError) as caught:
            waiting.result(timeout=60)
    assert caught.value.code is grpc.StatusCode.CANCELLED
