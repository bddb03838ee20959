"""The server as its operator meets it: a process that starts, says what is wrong, drains and stops."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
import yaml
from cryptography import x509
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save_file

from tests.server.api.rest.wire import INFER, JSON_LENGTH, ask
from tests.server.api.rpc.wire import connected, device_held, refusal, refusal_in, refusal_of, scrape, until

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm

from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

BUNDLED = Path(__file__).parents[2] / "server/tome_server/models/bundled/fashion"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(target: str) -> int:
    with grpc.insecure_channel(target) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status


@pytest.fixture(scope="module")
def image() -> bytes:
    return (BUNDLED / "samples" / "00002_trouser.png").read_bytes()


@pytest.fixture(scope="module")
def patient(image: bytes) -> pb.PredictRequest:
    """A request that may wait."""
    return pb.PredictRequest(image=image, r=15, latency_budget=Duration(seconds=200))


# Starting


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    """An address that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def test_a_port_in_use_is_said_in_a_sentence(taken: str) -> None:
    command = [sys.executable, "-m", "tome_server", "serve", "--listen", taken, "--metrics", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"tome-server: can't listen on {taken}: Address already in use"
    assert "Traceback" not in done.stderr


# Importing torch takes most of a start that fails; this does it once for all of them.
ONE_PROCESS = """
import json, os, sys
from tome_server.cli.main import main
for argv in json.load(sys.stdin):
    try:
        main(["serve", *argv])
    except SystemExit as end:
        print(json.dumps(end.code), flush=True)
    except BaseException as error:
        print(json.dumps(repr(error)), flush=True)
"""


def test_what_cannot_be_served_is_said_in_a_sentence(taken: str, tmp_path: Path) -> None:
    def config(name: str, **settings: Any) -> str:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "metrics": None, **settings}))
        return str(tmp_path / f"{name}.yaml")

    (tmp_path / "junk.pem").write_text("junk")
    (tmp_path / "junk.key").write_text("junk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken/fashion").mkdir(parents=True)
    (tmp_path / "broken/fashion/config.yaml").write_text("description: none\n")
    base = ["--listen", "127.0.0.1:0", "--metrics", "off"]
    weights = str(BUNDLED / "weights.safetensors")
    cases = {
        f"can't serve metrics on {taken}: Address already in use": [*base[:2], "--metrics", taken],
        "typo.yaml:2: batching.max_bach is not a setting; did you mean 'max_batch'?": [
            "--config",
            config("typo", batching={"max_bach": 3}),
        ],
        "cls_token [1, 1, 128] for [1, 1, 192]": [
            *base, "--model", "vit_tiny_patch16_224", "--checkpoint", weights,
        ],
        "timm has no model named 'vit_tiny_patch16_22'; did you mean vit_tiny_patch16_224": [
            *base, "--model", "vit_tiny_patch16_22",
        ],
        "can't be built with pretrained weights from the hub: ": [*base, "--model", "vit_tiny_patch16_224"],
        "can't listen on 192.0.2.1:0: Cannot assign requested address": ["--listen", "192.0.2.1:0", "--metrics", "off"],
        "no-such.json can't be read: No such file or directory": [
            *base, "--model", "vit_tiny_patch16_224", "--dtype", "float32", "--quality", "no-such.json",
        ],
        "no-such.pem: No such file or directory": [
            "--config", config("no-tls", tls={"certificate": "no-such.pem", "key": "junk.key"}),
        ],
        "junk.key are no certificate and its key: ": [
            "--config", config("junk-tls", tls={"certificate": "junk.pem", "key": "junk.key"}),
        ],
        "--policy: 'cheapest' is no policy; there are price, fixed:R, ": [*base, "--policy", "cheapest"],
        "policy, for model fashion: fixed:3: the model is served at r = 0, 2, 4, 6, 8, 10, 12, 14": [
            *base, "--policy", "fixed:3", "--profile-time", "500ms",
        ],
        "policy.yaml:3: policy: 'cheapest' is no policy; there are price, fixed:R, ": [
            "--config", config("policy", policy="cheapest"),
        ],
        "budget.yaml:4: models.0.default_budget: ": [
            "--config", config("budget", models=[{"default_budget": "0s"}]),
        ],
        f"repository {tmp_path}/gone is no folder": [*base, "--repository", f"{tmp_path}/gone"],
        f"repository {tmp_path}/empty holds no models; tome-server models add makes one": [
            *base, "--repository", f"{tmp_path}/empty",
        ],
        "fashion/config.yaml:1: architecture: is missing": [*base, "--repository", f"{tmp_path}/broken"],
        "two models are named 'fashion'": [
            "--config", config("twice", models=[{"source": "bundled:fashion"}, {"source": "bundled:fashion"}]),
        ],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(cases), done.stderr
    for sentence, problem in zip(said, cases, strict=True):
        assert sentence.startswith("tome-server: ")
        assert problem in sentence
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [[], ["serve"], ["demo"], ["evaluate"], ["profile"], ["models"], ["models", "add"], ["models", "fit-head"]],
    ids=str,
)
def test_help_is_to_be_had_of_every_command(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tome_server", *command, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {' '.join(['tome-server', *command])}")
    assert done.stderr == ""


def test_while_a_model_loads_requests_are_told_so_and_health_waits(tmp_path: Path, image: bytes) -> None:
    """None is served before all are measured: requests would disturb that."""
    labels = tmp_path / "labels.fifo"
    os.mkfifo(labels)  # loading waits until somebody writes to it
    architecture = yaml.safe_load((BUNDLED / "config.yaml").read_text())
    loading = {
        "name": "slow",
        "source": architecture["architecture"],
        "kwargs": architecture["kwargs"],
        "data": architecture["data"],
        "checkpoint": str(BUNDLED / "weights.safetensors"),
        "labels": str(labels),
    }
    config = tmp_path / "server.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "listen": "127.0.0.1:0",
                "metrics": None,
                "profile_time": "500ms",
                # Chosen by measuring, they would have the labels read once more before.
                "threads": 1,
                "models": [{"source": "bundled:fashion"}, loading],
            }
        )
    )
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tome_server", "serve", "--config", str(config)]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            until(lambda: "listening on " in log.read_text(), "the port is open")
            target = log.read_text().partition("listening on ")[2].partition(",")[0]
            with connected(target) as stub:
                assert listed(stub) == {"fashion": False, "slow": False}
                assert health(target) == NOT_SERVING
                assert refusal(lambda: stub.Predict(pb.PredictRequest(image=image))).code is UNAVAILABLE
                request = pb.PredictRequest(model="slow", image=image)
                for refused in (
                    refusal(lambda: stub.Predict(request)),
                    refusal(lambda: stub.GetModel(pb.GetModelRequest(model="slow"))),
                    refusal_in(
                        next(stub.PredictStream(iter([pb.PredictStreamRequest(id="1", request=request)]))).error
                    ),
                ):
                    assert (refused.code, refused.message) == (UNAVAILABLE, "model slow is loading")
                labels.write_text((BUNDLED / "labels.txt").read_text())
                assert json.loads(process.stdout.readline())["ready"]["grpc"] == target
                assert health(target) == SERVING
                assert listed(stub) == {"fashion": True, "slow": True}
                for model in ("fashion", "slow"):
                    answer = stub.Predict(pb.PredictRequest(model=model, image=image))
                    assert answer.predictions[0].label == "Trouser"
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def listed(stub: Any) -> dict[str, bool]:
    """The models by name, and whether each is ready."""
    return {model.name: model.ready for model in stub.ListModels(pb.ListModelsRequest()).models}


def test_a_model_is_measured_at_its_first_start_and_again_when_the_profile_is_corrupt(
    own_server: Callable[..., ServerProcess], tmp_path: Path, image: bytes
) -> None:
    folder = tmp_path / "profiles"

    def log_of_a_start() -> str:
        server = own_server("--profiles", str(folder), "--profile-time", "500ms", "--threads", "1")
        with connected(server.target) as stub:
            assert stub.Predict(pb.PredictRequest(image=image)).predictions[0].label == "Trouser"
        assert server.terminate(60) == 0
        return server.log.read_text()

    assert "measuring how fast fashion is" in log_of_a_start()
    [file] = folder.iterdir()
    kept = file.read_text()
    file.write_text(kept[: len(kept) // 2])
    log = log_of_a_start()
    assert f"measuring how fast fashion is, for about 0 s: {file} can't be read: it is no JSON" in log
    assert json.loads(file.read_text()).keys() == json.loads(kept).keys()


def test_a_checkpoint_of_other_classes_is_served_with_those(
    own_server: Callable[..., ServerProcess], image: bytes, tmp_path: Path
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64)
    save_file(model.state_dict(), tmp_path / "tén classes.safetensors")
    flags = ["--checkpoint", str(tmp_path / "tén classes.safetensors"), "--threads", "1", "--max-batch", "1"]
    server = own_server("--model", "vit_tiny_patch16_224", *flags, "--profile-time", "300ms")
    with connected(server.target) as stub:
        described = stub.GetModel(pb.GetModelRequest()).model
        assert (described.num_classes, described.input.height) == (10, 64)
        assert len(stub.Predict(pb.PredictRequest(image=image, top_k=20), timeout=60).predictions) == 10


def test_both_ports_may_be_ipv6(own_server: Callable[..., ServerProcess], image: bytes) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    server = own_server("--listen", "[::1]:0", "--metrics", "[::1]:0")
    with connected(server.target) as stub:
        assert stub.Predict(pb.PredictRequest(image=image)).predictions
    assert scrape(server.metrics_url).total("tome_requests_total", code="OK") == 1


# Stopping


class OpenStream:
    """A stream that the client doesn't close."""

    def __init__(self, stub: Any, requests: list[pb.PredictStreamRequest], half_close: bool = False) -> None:
        self._outgoing: queue.SimpleQueue[pb.PredictStreamRequest | None] = queue.SimpleQueue()
        for message in [*requests, *([None] if half_close else [])]:
            self._outgoing.put(message)
        self.call = stub.PredictStream(iter(self._outgoing.get, None))

    def read(self) -> tuple[list[pb.PredictStreamResponse], Any]:
        """Read to the end; returns the answers and the refusal at the end, if it is one."""
        answers = []
        try:
            answers.extend(self.call)
        except grpc.RpcError as error:
            return answers, refusal_of(error)
        finally:
            self._outgoing.put(None)
        return answers, None


def watch(target: str, channel: grpc.Channel) -> Any:
    """Return a call that reports the server's health, already reported once."""
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(call).status == SERVING
    return call


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT], ids=lambda order: order.name)
def test_a_server_told_to_stop_answers_what_is_in_flight(
    own_server: Callable[..., ServerProcess], patient: pb.PredictRequest, order: signal.Signals
) -> None:
    """Nothing else holds it up: it would wait for ten minutes."""
    server = own_server("--drain-timeout", "600s")
    messages = [pb.PredictStreamRequest(id=str(i), request=patient) for i in range(4)]

    def in_flight(count: int) -> Callable[[], bool]:
        return lambda: scrape(server.metrics_url).total("tome_requests_pending") == count

    with connected(server.target) as stub, grpc.insecure_channel(server.target) as channel:
        other_watcher, watcher = watch(server.target, channel), watch(server.target, channel)
        other_watcher.cancel()
        with device_held(server):
            # First, so that its end has long arrived when the last stream's messages have.
            closed_stream = OpenStream(stub, messages, half_close=True)
            until(in_flight(4), "the first stream is in flight")
            idle = OpenStream(stub, [])
            unary = [stub.Predict.future(patient) for _ in range(4)]
            until(in_flight(8), "calls are in flight")
            open_stream = OpenStream(stub, messages)
            until(in_flight(12), "all requests are in flight")
            server.process.send_signal(order)
            assert [state.status for state in watcher] == [NOT_SERVING]
        assert all(call.result().merging.r == 15 for call in unary)
        answers, end = closed_stream.read()
        assert sorted(answer.id for answer in answers) == list("0123")
        assert all(answer.HasField("response") for answer in answers)
        assert end is None
        answers, end = open_stream.read()
        assert sorted(answer.id for answer in answers) == list("0123")
        assert all(answer.HasField("response") for answer in answers)
        assert end.code is UNAVAILABLE
        assert end.message == "the server is shutting down; what was received has been answered"
        answers, end = idle.read()
        assert (answers, end.code) == ([], UNAVAILABLE)
    assert server.process.wait(60) == 0
    log = server.log.read_text()
    last = json.loads(log.splitlines()[-1])
    assert (last["logger"], last["event"]) == ("tome_server.app", "stopped")
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_a_stream_that_sends_on_while_the_server_drains_loses_nothing(
    own_server: Callable[..., ServerProcess], image: bytes
) -> None:
    """Each message is answered with a prediction, or with UNAVAILABLE, or was not taken from the stream."""
    server = own_server()
    sent, request = 0, pb.PredictRequest(image=image, r=15, latency_budget=Duration(seconds=100))

    def endless() -> Iterator[pb.PredictStreamRequest]:
        nonlocal sent
        while True:
            sent += 1
            yield pb.PredictStreamRequest(id=str(sent), request=request)

    with connected(server.target) as stub:
        call = stub.PredictStream(endless())
        answers = [next(call) for _ in range(100)]
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            answers.extend(call)
        assert refusal_of(caught.value).code is UNAVAILABLE
    assert server.process.wait(60) == 0
    ids = sorted(int(answer.id) for answer in answers)
    assert ids == list(range(1, len(ids) + 1))
    assert len(ids) <= sent
    for answer in answers:
        assert answer.HasField("response") or refusal_in(answer.error).code is UNAVAILABLE


def test_calls_that_outlast_the_drain_timeout_are_cut(
    own_server: Callable[..., ServerProcess], patient: pb.PredictRequest
) -> None:
    server = own_server("--drain-timeout", "0s")
    with connected(server.target) as stub:
        with device_held(server):
            calls = [stub.Predict.future(patient) for _ in range(8)]
            until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 8, "all requests are in flight")
            server.process.send_signal(signal.SIGTERM)
            for call in calls:
                assert refusal(call.result).code in (UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.process.wait(60) == 0


def test_a_server_told_twice_to_stop_stops_at_once(
    own_server: Callable[..., ServerProcess], patient: pb.PredictRequest
) -> None:
    server = own_server("--drain-timeout", "600s", "--default-budget", "600s")
    (device,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    with connected(server.target) as stub, grpc.insecure_channel(server.target) as channel, device_held(server):
        watcher, unending = watch(server.target, channel), OpenStream(stub, [])
        calls = [stub.Predict.future(patient) for _ in range(32)]
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 32, "all requests are in flight")
        server.process.send_signal(signal.SIGTERM)
        assert [state.status for state in watcher] == [NOT_SERVING]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM
        ends = [call.exception() for call in calls]
        assert {end.code() for end in ends if end} == {UNAVAILABLE}
        assert unending.read()[1].code is UNAVAILABLE
    until(lambda: not Path(f"/proc/{device}").exists(), "the device's process ended too")


# TLS


def test_tls_is_served_and_nothing_else_and_its_certificate_may_be_exchanged(
    own_server: Callable[..., ServerProcess], tmp_path: Path, image: bytes
) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    days = iter((30, 90))

    def ends() -> float:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()

    def issue() -> grpc.ChannelCredentials:
        """Write a new certificate of a new authority; returns what trusts it."""
        ca = trustme.CA()
        issued = ca.issue_cert("127.0.0.1", not_after=datetime.now(UTC) + timedelta(days=next(days)))
        certificate.write_bytes(issued.cert_chain_pems[0].bytes())
        key.write_bytes(issued.private_key_pem.bytes())
        return grpc.ssl_channel_credentials(ca.cert_pem.bytes())

    first = issue()
    config = tmp_path / "tls.yaml"
    config.write_text(yaml.safe_dump({"tls": {"certificate": str(certificate), "key": str(key)}}))
    server = own_server("--config", str(config), "--dtype", "float32")
    # The other port is plain text: what may be asked there is what anybody may know.
    plain = server.metrics_url.removesuffix("/metrics")
    assert [ask(plain, path).status for path in ("/metrics", "/v2/health/ready", "/v2/models/fashion")] == [
        200,
        200,
        404,
    ]
    assert ask(plain, INFER, image, {JSON_LENGTH: "0"}).status == 404
    with connected(server.target, first) as stub:
        assert stub.Predict(pb.PredictRequest(image=image)).predictions[0].label == "Trouser"
    for stranger in (None, grpc.ssl_channel_credentials()):
        with connected(server.target, stranger) as stub:
            assert refusal(lambda stub=stub: stub.Predict(pb.PredictRequest(image=image))).code is UNAVAILABLE
    expiry = "tome_tls_certificate_expiry_timestamp_seconds"
    assert scrape(server.metrics_url).total(expiry) == ends()
    second = issue()
    assert scrape(server.metrics_url).total(expiry) == ends()
    with connected(server.target, second) as stub:
        assert stub.Predict(pb.PredictRequest(image=image)).predictions[0].label == "Trouser"
    with connected(server.target, first) as stub:
        assert refusal(lambda: stub.Predict(pb.PredictRequest(image=image))).code is UNAVAILABLE
    assert server.terminate() == 0
