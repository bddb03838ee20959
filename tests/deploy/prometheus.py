"""A Prometheus of our own: Debian's, with the repository's configuration."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGURATION = Path(__file__).parents[2] / "deploy/prometheus"
INSTALL = "apt-get install -y --no-install-recommends prometheus"
PATIENCE = 120.0


# Ports that are ours until the tests end.
_reserved: list[socket.socket] = []


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody is given any more who asks for any free one.

    Bound, and never listened on: programs that, as servers do, set SO_REUSEADDR may listen there all the same.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", 0))
    _reserved.append(taken)
    return int(taken.getsockname()[1])


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition` holds, and return what it gives."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.1)
    return found


class Prometheus:
    """What its HTTP API answers, of now or of the time `at` in Unix seconds."""

    def __init__(self, url: str, at: float | None = None) -> None:
        self.url = url
        self.at = at

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=PATIENCE) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=PATIENCE) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Evaluate an expression: values by labels."""
        at = {} if self.at is None else {"time": repr(self.at)}
        result = self.get("query", query=expression, **at)["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in result}

    def value(self, expression: str) -> float:
        """Evaluate an expression that has one value then."""
        (value,) = self.query(expression).values()
        return value


@contextmanager
def watching(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes `target`, host:port, every second by the repository's rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip(f"needs Prometheus: {INSTALL}")
    # The same configuration, but that nobody waits for it.
    config = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    rules = yaml.safe_load((CONFIGURATION / "rules.yml").read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
    targets = yaml.safe_load((CONFIGURATION / "targets.yml").read_text())
    targets[0]["targets"] = [target]
    for name, content in (("prometheus", config), ("rules", rules), ("targets", targets)):
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content))
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--enable-feature=exemplar-storage"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        until(lambda: process.poll() is not None or prometheus.ready(), "Prometheus is ready")
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield prometheus
    finally:
        process.kill()
        process.wait()
