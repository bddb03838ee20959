"""HTTP proxies of the environment: none leads to this machine, and an error names the one that was used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from tests.client.peer import Failure, Peer, status
from tests.http_proxy import EXCEPTIONS, VARIABLES, HttpProxy, running_proxy
from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_client import AsyncClient, Client, TomeError
from tome_client.load import LoadPlan, Renewal, Sample, parse_budgets, run_load
from tome_client.proxy import proxy_of

ELSEWHERE = "vision.invalid:8500"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *EXCEPTIONS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=VARIABLES)
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpProxy]:
    """One that refuses, and that the environment asks for."""
    with running_proxy() as running:
        monkeypatch.setenv(request.param, f"http://{running.address}")
        yield running


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}", "dns:127.0.0.1:{}", "ipv4:127.0.0.1:{}", "0.0.0.0:{}",
     "ipv4:127.0.0.1:{},127.0.0.1:{}", "[::ffff:127.0.0.1]:{}"],
)  # fmt: skip
async def test_no_proxy_is_asked_for_this_machine(peer: Peer, proxy: HttpProxy, target: str) -> None:
    target = target.replace("{}", str(peer.port))
    with Client(target, retries=False) as client:
        assert client.models()
    async with AsyncClient(target, retries=False) as asynchronous:
        assert await asynchronous.models()
    assert not proxy.asked


async def test_the_load_generator_asks_none_either(peer: Peer, proxy: HttpProxy) -> None:
    plan = LoadPlan([Sample("a.png", b"", None)], Renewal(20, cv2=0), parse_budgets("20s"), duration=0.1)
    result = await run_load(peer.target, plan)
    assert all(one.answered for one in result.outcomes)
    assert not proxy.asked


def test_nor_does_the_command(peer: Peer, proxy: HttpProxy) -> None:
    command = [sys.executable, "-m", "tome_client", "models", "--target", peer.target]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not proxy.asked


def test_a_list_of_addresses_is_connected_to_directly_for_a_proxy_connects_to_one() -> None:
    with running_proxy() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", f"http://{proxy.address}")
        with Client("ipv6:[::1]:1,[::1]:2", retries=False) as client, pytest.raises(TomeError, match="UNAVAILABLE"):
            client.models(timeout=20)
        assert not proxy.asked


async def test_servers_elsewhere_are_asked_through_the_proxy(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy(peer.target) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
        with Client(ELSEWHERE) as client:
            assert client.models()
        async with AsyncClient(ELSEWHERE) as asynchronous:
            assert await asynchronous.models()
        assert proxy.asked == [f"CONNECT {ELSEWHERE} HTTP/1.1"] * 2


@pytest.mark.parametrize("variable", VARIABLES)
async def test_an_error_names_the_proxy_that_failed_and_the_way_out(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy() as proxy:
        monkeypatch.setenv(variable, f"http://user:secret@{proxy.address}")
        with Client(ELSEWHERE, retries=False) as client, pytest.raises(TomeError) as caught:
            client.models(timeout=20)
        async with AsyncClient(ELSEWHERE, retries=False) as asynchronous:
            with pytest.raises(TomeError) as caught_too:
                await asynchronous.models(timeout=20)
    for error in (caught.value, caught_too.value):
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.message.startswith(f"{ELSEWHERE} is unavailable: ")
        assert error.message.endswith(
            f"; it was called through the proxy {proxy.address} ({variable}): "
            "to connect directly, add vision.invalid to no_proxy"
        )
        assert "secret" not in error.message


def test_so_does_a_timeout_for_a_proxy_may_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer() as silent:
        silent.hold.clear()
        with running_proxy(silent.target) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            with Client(ELSEWHERE) as client, pytest.raises(TomeError, match="DEADLINE_EXCEEDED") as caught:
                client.models(timeout=0.5)
        silent.hold.set()
    assert f"through the proxy {proxy.address} (http_proxy)" in caught.value.message


def test_what_a_server_answered_is_not_put_on_the_proxy(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = status(grpc.StatusCode.UNAVAILABLE, "the model is loading")
    trailers = (("grpc-status-details-bin", loading.SerializeToString()),)
    peer.failures.append(Failure(grpc.StatusCode.UNAVAILABLE, loading.message, trailers))
    with running_proxy(peer.target) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        with Client(ELSEWHERE, retries=False) as client, pytest.raises(TomeError) as caught:
            client.models()
        assert proxy.asked
    assert caught.value.message == f"{ELSEWHERE} is unavailable: the model is loading"


def test_the_way_out_that_an_error_names_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        for variable in ("no_proxy", "no_grpc_proxy"):
            # gRPC's own variable, where it is set, hides the other.
            monkeypatch.setenv(variable, "example.com")
            named = proxy_of(ELSEWHERE)
            assert named is not None
            assert named.way_out == f"add vision.invalid to {variable}"
            monkeypatch.setenv(variable, "example.com,vision.invalid")
            with Client(ELSEWHERE, retries=False) as client, pytest.raises(TomeError, match="UNAVAILABLE") as caught:
                client.models(timeout=20)
            assert "proxy" not in caught.value.message
        assert not proxy.asked


@pytest.mark.parametrize(
    ("environment", "proxied"),
    [
        ({"grpc_proxy": "http://{}"}, True),
        ({"grpc_proxy": "", "https_proxy": "http://{}"}, False),
        ({"https_proxy": "", "http_proxy": "http://{}"}, False),
        ({"grpc_proxy": "http://{}", "https_proxy": ""}, True),
        ({"HTTPS_PROXY": "http://{}"}, False),
        ({"http_proxy": "{}"}, False),
        ({"http_proxy": "https://{}"}, False),
        ({"http_proxy": "socks5://{}"}, False),
        ({"http_proxy": "http://[{}"}, False),
        ({"http_proxy": "http://{}", "no_proxy": "vision.invalid"}, False),
        ({"http_proxy": "http://{}", "no_proxy": "VISION.invalid"}, False),
        ({"http_proxy": "http://{}", "no_proxy": ".invalid"}, False),
        ({"http_proxy": "http://{}", "no_proxy": "example.com, invalid"}, False),
        ({"http_proxy": "http://{}", "no_proxy": "example.com,,other.invalid,10.0.0.0/8"}, True),
        ({"http_proxy": "http://{}", "no_proxy": "vision.invalid:8500"}, True),
        ({"http_proxy": "http://{}", "no_proxy": "vision.invalid", "no_grpc_proxy": ""}, True),
        ({"http_proxy": "http://{}", "no_proxy": "example.com", "no_grpc_proxy": "invalid"}, False),
    ],
)
def test_the_environment_is_read_as_grpc_reads_it(
    environment: dict[str, str], proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy() as proxy:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.format(proxy.address))
        assert (proxy_of(ELSEWHERE) is not None) == proxied
        assert bool(asked_by_grpc(ELSEWHERE, proxy)) == proxied


@pytest.mark.parametrize(
    "exception", ["127.0.0.0/8", "127.0.0.0/30", "127.0.0.3/8", "127.0.0.1", "0.0.1", "10.0.0.0/8", "::/0", "*"]
)
def test_networks_of_no_proxy_are_read_as_grpc_reads_them(exception: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tome_client.proxy.is_this_machine", lambda _host: False)
    with running_proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        monkeypatch.setenv("no_proxy", exception)
        assert (proxy_of("127.0.0.1:1") is not None) == bool(asked_by_grpc("127.0.0.1:1", proxy))


def asked_by_grpc(target: str, proxy: HttpProxy) -> list[str]:
    """What a channel without any option of ours asks the proxy for."""
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError):
        inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest(), timeout=20)
    return proxy.asked
