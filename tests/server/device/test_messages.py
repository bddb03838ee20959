"""What goes over the socket to the device's process: every call can be sent, and is one that the process handles."""

import pickle
from dataclasses import is_dataclass
from typing import get_args

import pytest

from tome_server.device import messages
from tome_server.device.messages import AnyCall, Call, PrefetchImage, Returned, RunBatch
from tome_server.execution.batch import BatchItem, BatchResult, ItemResult, Outputs

CALLS = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Call)]
BATCH = [BatchItem((slot, True), Outputs(top_k=5)) for slot in range(8)]
RESULT = BatchResult(tuple(ItemResult((1, 2, 3, 4, 5), (0.5, 0.2, 0.1, 0.1, 0.1), None, None) for _ in range(8)), 0.1)


def test_every_call_is_among_those_that_mypy_holds_the_process_to_handle() -> None:
    assert set(get_args(AnyCall)) == set(CALLS) - {Call}
    assert all(is_dataclass(kind) for kind in get_args(AnyCall))


def test_a_call_is_handled_with_itself() -> None:
    call = RunBatch("fashion#1", BATCH, [8] * 8, packed=True)
    assert call.handled_by(lambda given: BatchResult((), float(given is call)))() == BatchResult((), 1.0)


@pytest.mark.parametrize(
    ("message", "most"),
    [
        ((17, RunBatch("fashion#1", BATCH, [8] * 8, packed=True)), 620),
        ((None, PrefetchImage("fashion#1", (0, True))), 120),
        (Returned(17, RESULT), 520),
    ],
)
def test_what_every_batch_sends_comes_back_as_it_was_and_stays_small(message: object, most: int) -> None:
    sent = pickle.dumps(message)
    assert pickle.loads(sent) == message
    assert len(sent) <= most
