import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.client.peer import Peer
from tome_client import AsyncClient, StreamItem


async def test_items_may_come_from_an_asynchronous_generator(peer: Peer) -> None:
    async def items() -> AsyncIterator[StreamItem]:
        for number in range(3):
            await asyncio.sleep(0)
            yield StreamItem(str(number), b"")

    async with AsyncClient(peer.target) as client:
        assert [one.id async for one in client.predict_stream(items())] == ["0", "1", "2"]


async def test_cancelling_a_task_cancels_its_request(peer: Peer) -> None:
    peer.hold.clear()
    async with AsyncClient(peer.target) as client:
        waiting = asyncio.create_task(client.predict(b""))
        assert await asyncio.to_thread(peer.called.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(peer.cancelled.wait, 60)


async def test_cancelling_a_task_cancels_its_stream(peer: Peer) -> None:
    peer.hold.clear()

    async def consume(client: AsyncClient) -> None:
        async for _ in client.predict_stream([StreamItem("a", b"")]):
            pass

    async with AsyncClient(peer.target) as client:
        waiting = asyncio.create_task(consume(client))
        assert await asyncio.to_thread(peer.called.wait, 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(peer.cancelled.wait, 60)


async def test_many_requests_wait_at_once(peer: Peer) -> None:
    async with AsyncClient(peer.target) as client:
        names = [f"model-{number}" for number in range(200)]
        answers = await asyncio.gather(*(client.predict(b"", model=name) for name in names))
    assert [one.model for one in answers] == names


async def test_a_finished_stream_leaves_no_task_behind(peer: Peer) -> None:
    async with AsyncClient(peer.target) as client:
        before = asyncio.all_tasks()
        items = [StreamItem(str(number), b"") for number in range(10)]
        assert len([one async for one in client.predict_stream(items, in_flight=2)]) == 10
        async with asyncio.timeout(60):
            while asyncio.all_tasks() != before:  # noqa: ASYNC110 # There is no event to wait for.
                await asyncio.sleep(0.01)
