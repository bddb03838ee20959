"""Servers that stop, die and come back, under clients and strangers that connect and leave all the while.

    pytest -m nightly -s tests/deploy/test_churn.py

TOME_CHURN_SECONDS says how long; by default five minutes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus import free_port, until
from tests.server_process import ServerProcess, start_server, stop_server
from tests.silent import silent_connections

SECONDS = float(os.environ.get("TOME_CHURN_SECONDS", "300"))
SERVERS = 3
CLIENTS = 2
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(SECONDS * 2 + 900)]


def descriptors(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_nothing_crashes_hangs_or_leaks_while_everything_comes_and_goes(
    cache: Path, tmp_path: Path, samples: dict[Path, str]
) -> None:
    """No process ends by a signal that wasn't sent, and every call ends in exactly one answer or status."""
    config = tmp_path / "server.yaml"
    config.write_text(yaml.safe_dump({"connections": {"max_age": "1s", "max_age_grace": "30s"}, "threads": 1}))
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(SERVERS)]
    chance = random.Random(0)
    stops: Counter[str] = Counter()

    with ExitStack() as stack:
        servers: list[ServerProcess] = []

        def start(number: int) -> ServerProcess:
            server = start_server(
                tmp_path / f"log-{number}-{stops.total()}", "--config", str(config), "--listen", addresses[number],
                "--default-budget", "60s", "--profile-time", "500ms", "--dtype", "float32", "--drain-timeout", "60s",
            )  # fmt: skip
            stack.callback(stop_server, server)
            return server

        # One after the other: those that follow find the profile of the first.
        servers.extend(map(start, range(SERVERS)))
        steady, *_ = servers
        image = min(samples)
        command = [sys.executable, str(Path(__file__).parent / "churn_client.py"), f"ipv4:{','.join(addresses)}"]

        def clients(seconds: float) -> "list[subprocess.Popen[str]]":
            started = []
            for _ in range(CLIENTS):
                process = subprocess.Popen([*command, str(image), str(seconds)], stdout=subprocess.PIPE, text=True)
                stack.callback(process.wait)
                stack.callback(process.kill)
                started.append(process)
            return started

        def stop_one() -> None:
            """Let one of the servers go, in either way, while strangers connect to it, and start it anew."""
            number = chance.randrange(1, SERVERS)
            server, order = servers[number], chance.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGKILL])
            with silent_connections(server.target):
                time.sleep(chance.random())
                server.process.send_signal(order)
                status = server.process.wait(120)
            assert status == (0 if order == signal.SIGTERM else -order), server.log.read_text()
            stop_server(server)
            stops[order.name] += 1
            servers[number] = start(number)

        # What the steady server keeps open for itself shows once clients were there.
        for process in clients(1):
            process.communicate(timeout=300)
        before = descriptors(steady)
        running = clients(SECONDS)
        with ThreadPoolExecutor(CLIENTS) as reading:
            said = [reading.submit(process.communicate, timeout=SECONDS + 400) for process in running]
            end = time.monotonic() + SECONDS
            with silent_connections(steady.target):
                while time.monotonic() < end:
                    stop_one()
            reports = [json.loads(one.result()[0] or "{}") for one in said]
        print(f"\nstops: {dict(stops)}", *reports, sep="\n")
        assert [process.returncode for process in running] == [0] * CLIENTS
        for report in reports:
            assert report["sent"] == sum(report["ended"].values())
            assert report["twice"] == []
            assert report["ended"]["OK"] > 0
            # Of a client that does not retry, or of a stream that had begun.
            assert report["ended"].keys() <= {"OK", "UNAVAILABLE", "CANCELLED"}
            first, last = report["descriptors"]
            assert last <= first
        until(lambda: descriptors(steady) <= before, "the descriptors of connections that ended are closed")
        for server in servers:
            status = server.terminate()
            assert status == 0, server.log.read_text()
            assert "Traceback" not in server.log.read_text()
    assert stops["SIGTERM"] or SECONDS < 60
