import pickle
import socket

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from tests.client.peer import Failure, Peer, status
from tome_client import Client, FieldViolation, TomeError
from tome_client.errors import error_from_rpc, error_from_status

BAD_REQUEST = error_details_pb2.BadRequest(
    field_violations=[error_details_pb2.BadRequest.FieldViolation(field="r", description="at most 16")]
)
INFEASIBLE = error_details_pb2.ErrorInfo(reason="INFEASIBLE", domain="tome", metadata={"smallest_latency_ms": "31.5"})
RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=20_000_000))
UNKNOWN_DETAIL = error_details_pb2.DebugInfo(detail="for the server's own use")


def test_field_violations_are_read() -> None:
    error = error_from_status(status(grpc.StatusCode.INVALID_ARGUMENT, "bad r", BAD_REQUEST))
    assert error.field_violations == (FieldViolation("r", "at most 16"),)
    assert (error.reason, error.metadata, error.retry_delay) == (None, {}, None)


def test_the_reason_and_its_particulars_are_read() -> None:
    error = error_from_status(status(grpc.StatusCode.DEADLINE_EXCEEDED, "too soon", INFEASIBLE))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.reason == "INFEASIBLE"
    assert error.metadata == {"smallest_latency_ms": "31.5"}
    assert error.smallest_latency == pytest.approx(0.0315)


@pytest.mark.parametrize("metadata", [{}, {"smallest_latency_ms": "soon"}, {"stage": "queue"}])
def test_a_smallest_latency_that_is_not_said_is_none(metadata: dict[str, str]) -> None:
    assert TomeError(grpc.StatusCode.DEADLINE_EXCEEDED, "late", metadata=metadata).smallest_latency is None


def test_details_come_together_and_unknown_ones_do_not_hurt() -> None:
    full = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", UNKNOWN_DETAIL, RETRY, INFEASIBLE, BAD_REQUEST)
    error = error_from_status(full)
    assert error.retry_delay == pytest.approx(0.02)
    assert error.reason == "INFEASIBLE"
    assert len(error.field_violations) == 1


def test_a_code_of_the_future_is_unknown() -> None:
    full = status(grpc.StatusCode.INTERNAL, "new")
    full.code = 99
    assert error_from_status(full).code is grpc.StatusCode.UNKNOWN


def test_it_reads_as_code_and_message_also_after_pickling() -> None:
    error = error_from_status(status(grpc.StatusCode.INVALID_ARGUMENT, "bad r", BAD_REQUEST))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "INVALID_ARGUMENT: bad r"
    assert copy.field_violations == error.field_violations


def test_a_calls_details_are_read_from_its_trailers(peer: Peer) -> None:
    peer.failures.append(Failure(grpc.StatusCode.INVALID_ARGUMENT, "bad r", details=(BAD_REQUEST,)))
    with Client(peer.target) as client, pytest.raises(TomeError, match="bad r") as caught:
        client.predict(b"")
    assert caught.value.field_violations == (FieldViolation("r", "at most 16"),)
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize("details", [b"\xff\xff", status(grpc.StatusCode.NOT_FOUND, "another").SerializeToString()])
def test_details_that_are_broken_or_anothers_are_left_out(peer: Peer, details: bytes) -> None:
    trailers = (("grpc-status-details-bin", details),)
    peer.failures.append(Failure(grpc.StatusCode.INTERNAL, "failed", trailers=trailers))
    with Client(peer.target) as client, pytest.raises(TomeError, match="failed") as caught:
        client.predict(b"")
    assert caught.value.reason is None


def test_a_server_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        with Client(target) as client, pytest.raises(TomeError) as caught:
            client.models()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.message.startswith(f"{target} is unavailable: ")


def test_a_name_that_does_not_resolve_is_named() -> None:
    with Client("nowhere.invalid:1") as client, pytest.raises(TomeError) as caught:
        client.models(timeout=20)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.message.startswith("nowhere.invalid:1 is unavailable: ")


class RequestOutcome(grpc.RpcError):
    """A call that gRPC ended by itself."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        self._ended = code, details

    def code(self) -> grpc.StatusCode:
        return self._ended[0]

    def details(self) -> str | None:
        return self._ended[1]

    def trailing_metadata(self) -> None:
        return None


@pytest.mark.parametrize(
    ("code", "said", "message"),
    [
        ("UNAVAILABLE", "failed to connect; last error: INTERNAL: no route", "a:1 is unavailable: no route"),
        ("UNAVAILABLE", "connections failing; last error: no route", "a:1 is unavailable: no route"),
        ("UNAVAILABLE", "new words", "a:1 is unavailable: new words"),
        ("UNAVAILABLE", None, "a:1 is unavailable: no message"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "no answer from a:1 within the timeout"),
        ("DEADLINE_EXCEEDED", "new words", "no answer from a:1 within the timeout: new words"),
        ("INTERNAL", "new words", "new words"),
    ],
)
def test_what_happened_is_said_by_the_code_whatever_the_words(code: str, said: str | None, message: str) -> None:
    error = error_from_rpc(RequestOutcome(grpc.StatusCode[code], said), "a:1")
    assert (error.code.name, error.message) == (code, message)


def test_a_server_that_says_it_is_unavailable_is_named_and_quoted(peer: Peer) -> None:
    peer.failures.append(Failure(grpc.StatusCode.UNAVAILABLE, "the model is loading"))
    with Client(peer.target, retries=False) as client, pytest.raises(TomeError) as caught:
        client.predict(b"")
    assert caught.value.message == f"{peer.target} is unavailable: the model is loading"


def test_a_timeout_names_who_gave_no_answer(peer: Peer) -> None:
    peer.hold.clear()
    with Client(peer.target) as client, pytest.raises(TomeError) as caught:
        client.predict(b"", timeout=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.message == f"no answer from {peer.target} within the timeout"
