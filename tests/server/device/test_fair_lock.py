"""Who waited first comes first, also before one that had it just now."""

import threading

import pytest

from tome_server.device.fair_lock import FairLock


def started(turns: FairLock, order: list[str], name: str) -> threading.Thread:
    """Return a thread that waits for its turn."""

    def run() -> None:
        with turns:
            order.append(name)

    before = turns.waiting
    thread = threading.Thread(target=run)
    thread.start()
    while turns.waiting == before:
        threading.Event().wait(0.001)
    return thread


def test_who_has_it_again_and_again_lets_those_in_who_wait() -> None:
    turns, order = FairLock(), list[str]()
    threads = []
    with turns:
        order.append("recording")
        threads.append(started(turns, order, "batch"))
        threads.append(started(turns, order, "another"))
    with turns:
        order.append("recording")
    for thread in threads:
        thread.join()
    assert order == ["recording", "batch", "another", "recording"]
    assert turns.waiting == 0


def test_it_is_free_after_an_error() -> None:
    turns = FairLock()
    with pytest.raises(RuntimeError, match="failed"), turns:
        raise RuntimeError("failed")
    with turns:
        pass


def test_one_thread_at_a_time_has_it() -> None:
    turns, inside, most = FairLock(), 0, list[int]()

    def run() -> None:
        nonlocal inside
        for _ in range(200):
            with turns:
                inside += 1
                most.append(inside)
                inside -= 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 800
