from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import grpc
import pytest

from tests.client.peer import MODEL, Failure, Health, Peer
from tome_api.v1 import inference_pb2
from tome_client.cli import main, wait


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, the first question is answered; a short time-out ends the command after it."""
    monkeypatch.setattr(wait, "_ANSWER", 60.0)
    monkeypatch.setattr(wait, "_PAUSE", 60.0)


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def peer(health: Health) -> Iterator[Peer]:
    with Peer(health=health) as running:
        yield running


def summary(name: str, ready: bool) -> inference_pb2.ModelSummary:
    return inference_pb2.ModelSummary(name=name, ready=ready)


def test_a_server_that_is_ready_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wait"]) == 0
    assert main(["wait", "--model", "fashion"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_server_is_waited_for_until_it_listens(peer: Peer) -> None:
    """The command starts first; the peer of its target starts once the command runs."""
    with Peer() as later:
        target = later.target
    waiting = subprocess.Popen([sys.executable, "-m", "tome_client", "wait", "--target", target, "--timeout", "none"])
    late = Peer()
    late._server.add_insecure_port(target)
    with late:
        assert waiting.wait(60) == 0
    assert late.calls


def test_a_server_is_waited_for_until_it_takes_requests_and_its_models_are_loaded(
    peer: Peer, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait, "_PAUSE", 0.01)
    health.serving = False
    peer.models = [MODEL.summary, summary("second", ready=False)]
    status: list[int] = []
    waiting = threading.Thread(target=lambda: status.append(main(["wait", "--timeout", "none"])))
    waiting.start()
    health.serving = True
    assert peer.called.wait(60)
    assert not status
    peer.models = [MODEL.summary, summary("second", ready=True)]
    waiting.join(60)
    assert status == [0]


def test_only_the_named_model_is_waited_for(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.models = [MODEL.summary, summary("second", ready=False)]
    assert main(["wait", "--model", "fashion", "--timeout", "1ms"]) == 0
    assert main(["wait", "--model", "second", "--timeout", "1ms"]) == 1
    assert main(["wait", "--timeout", "1ms"]) == 1
    assert main(["wait", "--model", "fasion", "--timeout", "1ms"]) == 1
    lines = capsys.readouterr().err.splitlines()
    start = f"tome-client: {peer.target} was not ready within 1ms: "
    assert lines == [
        f"{start}second is still loading",
        f"{start}second is still loading",
        f"{start}it has no model 'fasion', but fashion, second; did you mean 'fashion'?",
    ]


def test_a_server_that_does_not_serve_in_time_is_one_line(
    health: Health, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    health.serving = False
    assert main(["wait", "--timeout", "1ms"]) == 1
    assert main(["wait", "--timeout", "1ms", "--target", "localhost:1"]) == 1
    loading, nothing = capsys.readouterr().err.splitlines()
    assert loading.startswith(f"tome-client: {peer.target} was not ready within 1ms: UNAVAILABLE: ")
    assert loading.endswith("no server there is serving; what was reached is loading or stopping")
    assert nothing.startswith("tome-client: localhost:1 was not ready within 1ms: UNAVAILABLE: ")
    assert "is a server running there?" in nothing


def test_what_no_waiting_changes_ends_the_command_at_once(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.failures.append(Failure(grpc.StatusCode.UNAUTHENTICATED, "the token is unknown"))
    assert main(["wait", "--timeout", "none"]) == 1
    assert capsys.readouterr().err == "tome-client: UNAUTHENTICATED: the token is unknown\n"


def test_a_time_out_needs_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["wait", "--timeout", "60"])
    assert "argument --timeout: 60 needs a unit: 60ms or 60s" in capsys.readouterr().err
