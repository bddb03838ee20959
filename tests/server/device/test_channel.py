"""Messages to and from a process that may have stopped."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tome_server.device import client
from tome_server.device.channel import BlockingChannel, Channel
from tome_server.device.client import Device

# Twenty times what the kernel buffers.
LARGE = bytes(4 * 2**20)


class Ends:
    """Both ends of a channel, and what the server's received."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.received: asyncio.Queue[Any] = asyncio.Queue()
        self.lost = asyncio.Event()
        self.channel = Channel(ours, self.received.put_nowait, self.lost.set)
        self.other = BlockingChannel(self.theirs)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    yield ends
    ends.channel.close()
    ends.other._incoming.close()
    ends.theirs.close()


async def test_messages_of_any_size_come_in_order_to_either_end(ends: Ends) -> None:
    sent = ["small", LARGE, None, ("more", 1), LARGE]
    for message in sent:
        ends.channel.send(message)
    assert [await asyncio.to_thread(ends.other.recv) for _ in sent] == sent
    sending = asyncio.create_task(asyncio.to_thread(lambda: [ends.other.send(message) for message in sent]))
    assert [await ends.received.get() for _ in sent] == sent
    await sending


async def test_what_the_other_end_does_not_read_is_held_and_stops_nothing(ends: Ends) -> None:
    """If sending waited, this test would never end."""
    for _ in range(10):
        ends.channel.send(LARGE)
    assert ends.channel.unsent > len(LARGE)
    assert [len(await asyncio.to_thread(ends.other.recv)) for _ in range(10)] == [len(LARGE)] * 10
    ends.channel.send("later")
    assert await asyncio.to_thread(ends.other.recv) == "later"
    assert ends.channel.unsent == 0


async def test_a_message_that_stops_half_way_stops_nothing(ends: Ends) -> None:
    """If reading waited for the rest, this test would never end."""
    ends.theirs.sendall(b"\0\0\0\0\0\0\1\0half")
    await asyncio.sleep(0.01)
    ends.channel.send("still here")
    assert await asyncio.to_thread(ends.other.recv) == "still here"
    assert ends.received.empty()


async def test_an_end_that_closes_is_seen_once_all_it_sent_was_received(ends: Ends) -> None:
    ends.other.send("last")
    ends.other._incoming.close()
    ends.theirs.close()
    assert await ends.received.get() == "last"
    await ends.lost.wait()
    ends.channel.close()
    ends.channel.send("to nobody")


async def test_the_other_end_sees_the_servers_close(ends: Ends) -> None:
    ends.channel.close()
    with pytest.raises(EOFError):
        ends.other.recv()


async def test_calls_to_a_process_that_has_stopped_block_nothing_and_it_is_given_up_in_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    device = Device()
    try:
        await device.set_threads(1)
        os.kill(device.pid, signal.SIGSTOP)
        # More than the socket holds.
        calls = [asyncio.ensure_future(device._call(LARGE)) for _ in range(4)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert device._channel.unsent > len(LARGE)
        device.give_up("hung")
        for call in calls:
            with pytest.raises(Exception, match="the process that runs the models hung"):
                await call
        with pytest.raises(Exception, match="the process that runs the models hung"):
            await device.ended()
        assert "the process that runs the models hung" in caplog.text
    finally:
        await device.kill()


async def test_a_process_that_has_stopped_is_ended_in_the_time_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "STOP_TIMEOUT", 1000.0)
    device = Device()
    await device.set_threads(1)
    os.kill(device.pid, signal.SIGSTOP)
    await device.close(within=0.0)
    assert device._process.returncode == -signal.SIGKILL
