"""What Client and AsyncClient must both do: every test runs with each."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.client.peer import Failure, Health, Peer
from tome_client import AsyncClient, Client, PredictOptions, StreamItem, StreamResult, TomeError

_END = object()


class Threaded:
    """A Client with AsyncClient's surface, each call in a thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.client = Client(*args, **kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: asyncio.to_thread(getattr(self.client, name), *args, **kwargs)

    async def predict_stream(self, *args: Any, **kwargs: Any) -> AsyncIterator[StreamResult]:
        results = self.client.predict_stream(*args, **kwargs)
        try:
            while (result := await asyncio.to_thread(next, results, _END)) is not _END:
                yield result
        finally:
            results.close()

    async def __aenter__(self) -> Threaded:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.client.close()


@pytest.fixture(params=[Threaded, AsyncClient], ids=["sync", "asyncio"])
async def connect(request: pytest.FixtureRequest) -> type[AsyncClient]:
    return request.param


@pytest.fixture
async def client(connect: type[AsyncClient], peer: Peer) -> AsyncIterator[AsyncClient]:
    async with connect(peer.target) as connected:
        yield connected


async def ids(results: AsyncIterator[StreamResult]) -> list[str]:
    return [one.id async for one in results]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 # There is no event to wait for.
            await asyncio.sleep(0.01)


async def test_a_prediction_is_asked_for_and_read(client: AsyncClient, peer: Peer) -> None:
    result = await client.predict(b"image", model="second", budget=0.5, r=2)
    assert result.model == "second"
    assert peer.calls[0].request.image == b"image"
    assert peer.calls[0].request.latency_budget.ToMilliseconds() == 500
    assert peer.calls[0].request.r == 2


async def test_no_deadline_is_asked_for_by_none_and_left_out_is_the_models_default(
    client: AsyncClient, peer: Peer
) -> None:
    await client.predict(b"image", budget=None)
    await client.predict(b"image")
    assert [call.request.no_deadline for call in peer.calls] == [True, False]
    assert not any(call.request.HasField("latency_budget") for call in peer.calls)


async def test_items_of_a_stream_have_no_deadline_unless_they_name_a_budget(client: AsyncClient, peer: Peer) -> None:
    options = [{}, PredictOptions(budget=None), PredictOptions(budget=0.5), PredictOptions(r=2)]
    await ids(client.predict_stream([StreamItem(str(number), b"", one) for number, one in enumerate(options)]))
    assert [call.request.no_deadline for call in peer.calls] == [True, True, False, True]
    assert peer.calls[2].request.latency_budget.ToMilliseconds() == 500


async def test_a_path_is_read(client: AsyncClient, peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"encoded")
    await client.predict(tmp_path / "image.png")
    assert peer.calls[0].request.image == b"encoded"


async def test_an_image_that_cannot_be_sent_raises_what_is_wrong(client: AsyncClient) -> None:
    with pytest.raises(FileNotFoundError):
        await client.predict("nowhere.png")
    with pytest.raises(TypeError):
        await client.predict(3)
    with pytest.raises(TypeError, match="budjet"):
        await client.predict(b"", budjet=1)


async def test_without_a_timeout_there_is_no_deadline(client: AsyncClient, peer: Peer) -> None:
    await client.predict(b"", budget=0.5)
    assert (peer.calls[0].time_remaining or 1e9) > 1e6


async def test_the_timeout_is_the_grpc_deadline(connect: type[AsyncClient], peer: Peer) -> None:
    async with connect(peer.target, timeout=20) as client:
        await client.predict(b"")
        await client.predict(b"", timeout=10)
        await client.models()
    # On the wire a deadline is rounded up, by about 1 %.
    for call, timeout in zip(peer.calls, [20, 10, 20], strict=True):
        assert timeout / 2 < call.time_remaining < 1.05 * timeout


async def test_an_answer_that_is_late_is_given_up(client: AsyncClient, peer: Peer) -> None:
    peer.hold.clear()
    with pytest.raises(TomeError) as caught:
        await client.predict(b"", timeout=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_models_are_listed_and_described(client: AsyncClient) -> None:
    assert [one.name for one in await client.models()] == ["fashion"]
    assert (await client.model()).summary.architecture == "vit_tiny"


async def test_a_failed_call_raises_its_status(client: AsyncClient, peer: Peer) -> None:
    for call in (client.predict(b""), client.models(), client.model("x")):
        peer.failures.append(Failure(grpc.StatusCode.NOT_FOUND, "no such model"))
        with pytest.raises(TomeError, match="NOT_FOUND: no such model"):
            await call


async def test_a_stream_yields_in_the_order_of_completion(client: AsyncClient) -> None:
    items = [StreamItem("a", b"", PredictOptions(model="late")), StreamItem("b", b"")]
    assert await ids(client.predict_stream(items)) == ["b", "a"]


async def test_an_empty_stream_ends(client: AsyncClient) -> None:
    assert await ids(client.predict_stream([])) == []


async def test_items_may_come_from_a_generator(client: AsyncClient) -> None:
    items = (StreamItem(str(number), b"") for number in range(100))
    assert await ids(client.predict_stream(items, in_flight=3)) == [str(n) for n in range(100)]


async def test_an_item_that_fails_does_not_end_the_stream(client: AsyncClient) -> None:
    items = [
        StreamItem("refused", b"", PredictOptions(model="missing")),
        StreamItem("unreadable", "nowhere.png"),
        StreamItem("good", b""),
    ]
    results = {one.id: one async for one in client.predict_stream(items)}
    assert results["refused"].error.code is grpc.StatusCode.NOT_FOUND
    assert results["refused"].result is None
    assert results["unreadable"].error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert results["good"].result.model == "first"
    assert results["good"].error is None


async def test_an_item_that_is_too_large_does_not_end_the_stream(connect: type[AsyncClient], peer: Peer) -> None:
    async with connect(peer.target, max_send_bytes=1000) as client:
        items = [StreamItem("large", bytes(1000)), StreamItem("good", b"")]
        results = {one.id: one async for one in client.predict_stream(items)}
    assert results["large"].error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert results["good"].result


async def test_an_item_that_cannot_be_sent_is_yielded_before_the_server_answers(
    client: AsyncClient, peer: Peer
) -> None:
    peer.hold.clear()
    results = client.predict_stream([StreamItem("held", b""), StreamItem("bad", "nowhere.png")])
    assert (await anext(results)).id == "bad"
    peer.hold.set()
    assert await ids(results) == ["held"]


async def test_no_more_items_are_read_than_may_be_in_flight(client: AsyncClient, peer: Peer) -> None:
    peer.hold.clear()
    read = []

    def items() -> Iterator[StreamItem]:
        for number in range(10):
            read.append(number)
            yield StreamItem(str(number), b"")

    results = client.predict_stream(items(), in_flight=4)
    first = asyncio.create_task(anext(results))
    await until(lambda: len(read) == 4)
    await asyncio.sleep(0.1)
    assert len(read) == 4
    peer.hold.set()
    await first
    assert len(await ids(results)) == 9


async def test_a_stream_that_breaks_raises_after_what_was_answered(client: AsyncClient) -> None:
    items = [StreamItem("good", b""), StreamItem("fatal", b"", PredictOptions(model="fatal"))]
    results = client.predict_stream(items)
    assert (await anext(results)).id == "good"
    with pytest.raises(TomeError, match="INTERNAL: the stream broke"):
        await anext(results)


@pytest.mark.parametrize("answered_before", [0, 1, 5])
async def test_a_stream_that_the_server_ends_early_raises_after_what_was_answered(
    client: AsyncClient, answered_before: int
) -> None:
    items = [StreamItem(str(number), b"") for number in range(answered_before)]
    last = [StreamItem(name, b"", PredictOptions(model="end")) for name in ("unanswered", "unread")]
    results = client.predict_stream([*items, *last])
    assert [(await anext(results)).id for _ in items] == [item.id for item in items]
    # gRPC's asyncio API has words of its own if it was sending just then.
    with pytest.raises(TomeError, match=r"ended the stream before it had answered every item|Internal error from Core"):
        await anext(results)


async def test_a_broken_stream_reads_no_more_items(client: AsyncClient) -> None:
    read = []

    def items() -> Iterator[StreamItem]:
        for number in range(100):
            read.append(number)
            yield StreamItem(str(number), b"", PredictOptions(model="fatal"))

    with pytest.raises(TomeError, match="INTERNAL"):
        await ids(client.predict_stream(items(), in_flight=2))
    await asyncio.sleep(0.1)
    assert len(read) <= 3


async def test_what_the_items_raise_reaches_the_caller(client: AsyncClient) -> None:
    def items() -> Iterator[StreamItem]:
        yield StreamItem("a", b"")
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        await ids(client.predict_stream(items()))


async def test_a_stream_that_is_left_early_is_cancelled(client: AsyncClient, peer: Peer) -> None:
    def items() -> Iterator[StreamItem]:
        for number in range(1000):
            yield StreamItem(str(number), b"")

    results = client.predict_stream(items(), in_flight=4)
    await anext(results)
    await results.aclose()
    await until(peer.cancelled.is_set)
    await until(lambda: all(one.name != "tome-client-stream" for one in threading.enumerate()))


async def test_a_streams_timeout_is_its_deadline(connect: type[AsyncClient], peer: Peer) -> None:
    async with connect(peer.target, timeout=20) as client:
        await ids(client.predict_stream([StreamItem("a", b"")]))
        await ids(client.predict_stream([StreamItem("a", b"")], timeout=10))
    assert (peer.calls[0].time_remaining or 1e9) > 1e6
    assert 5 < peer.calls[1].time_remaining < 10.5


async def test_a_token_is_sent_with_every_call(connect: type[AsyncClient], peer: Peer) -> None:
    async with connect(peer.target, token="first-token", metadata=[("team", "vision")]) as client:
        await client.predict(b"")
        await client.models()
        await client.model()
        assert await ids(client.predict_stream([StreamItem("a", b"")])) == ["a"]
    assert [call.metadata["authorization"] for call in peer.calls] == ["Bearer first-token"] * 4
    assert {call.metadata["team"] for call in peer.calls} == {"vision"}


async def test_a_function_is_asked_for_the_token_at_each_call(connect: type[AsyncClient], peer: Peer) -> None:
    tokens = iter(["first-token", "second-token"])
    async with connect(peer.target, token=lambda: next(tokens)) as client:
        await client.predict(b"")
        await client.predict(b"")
    assert [call.metadata["authorization"] for call in peer.calls] == ["Bearer first-token", "Bearer second-token"]


@pytest.mark.parametrize("retries", [True, False])
async def test_a_server_that_is_not_serving_is_not_asked_until_it_is(connect: type[AsyncClient], retries: bool) -> None:
    health = Health(serving=False)
    with Peer(health=health) as peer:
        async with connect(peer.target, retries=retries, health_checks=True) as client, asyncio.timeout(60):
            with pytest.raises(TomeError) as caught:
                await client.predict(b"")
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert caught.value.message == (
                f"{peer.target} is unavailable: no server there is serving; what was reached is loading or stopping"
            )
            assert not peer.calls
            health.serving = True
            while not peer.calls:
                with contextlib.suppress(TomeError):
                    assert (await client.predict(b"")).model == "first"


async def test_of_two_servers_the_one_that_is_serving_is_asked(connect: type[AsyncClient]) -> None:
    health = Health()
    with Peer() as staying, Peer(health=health) as leaving:
        target = f"ipv4:{staying.target},{leaving.target}"
        async with connect(target, retries=False, health_checks=True) as client, asyncio.timeout(60):
            while not (staying.calls and leaving.calls):
                await client.predict(b"")
            health.serving = False
            unasked = 0
            while unasked < 10:
                before = len(leaving.calls)
                await client.predict(b"")
                unasked = unasked + 1 if len(leaving.calls) == before else 0
