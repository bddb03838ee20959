"""Runs a server and a Prometheus that watches it, without containers: `make stack`. Ctrl-C ends both.

Other addresses: `make stack ARGS='--listen 127.0.0.1:9500 --metrics 127.0.0.1:9501 --prometheus 127.0.0.1:9502'`.

Prometheus reads deploy/prometheus/, as it does in a container; only the addresses are this machine's.
"""

import argparse
import errno
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tome_server.cli import serve

CONFIGURATION = Path(__file__).parent / "prometheus"
INSTALL = "apt-get install -y --no-install-recommends prometheus"
# Seconds; longer than the server's own drain timeout.
STOP_TIMEOUT = 40.0
# urllib's own opener would connect to this machine through a proxy of the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> int:
    """Run the stack until one of the two ends or a signal comes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:8500", metavar="HOST:PORT", help="gRPC (default: %(default)s)")
    parser.add_argument("--metrics", default="127.0.0.1:8501", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--prometheus", default="127.0.0.1:9090", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("serve", nargs="*", metavar="FLAG", help="after --: flags of tome-server serve")
    args = parser.parse_args()
    program = shutil.which("prometheus")
    if program is None:
        sys.exit(f"stack: there is no Prometheus: {INSTALL}")
    if taken := [
        f"{flag} {address}"
        for flag, address in (("--listen", args.listen), ("--metrics", args.metrics), ("--prometheus", args.prometheus))
        if in_use(address)
    ]:
        sys.exit(f"stack: in use already: {', '.join(taken)}; name other ports, as --help says")

    stopping = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stopping.set())
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="tome-stack-") as folder:
        try:
            print("starting the server; the first start measures the model for some seconds …", flush=True)
            # In sessions of their own, Ctrl-C reaches neither of the two programs: each gets one signal, from this one.
            flags = ("--listen", args.listen, "--metrics", args.metrics, *args.serve)
            running.append(serve.start(*flags, start_new_session=True))
            ready = when_ready(running[0], stopping)
            if ready is None:
                return 0 if stopping.is_set() else 1
            configure(Path(folder), urlsplit(ready["metrics"]).netloc)
            command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
            command += [f"--web.listen-address={args.prometheus}", "--enable-feature=exemplar-storage"]
            command += ["--log.level=error"]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True, start_new_session=True))
            url = f"http://{args.prometheus}"
            while not answers(f"{url}/-/ready") and running[1].poll() is None and not stopping.is_set():
                time.sleep(0.1)
            if running[1].poll() is None and not stopping.is_set():
                print(summary(ready, url), flush=True)
            while not stopping.wait(0.2):
                for name, process in zip(("the server", "Prometheus"), running, strict=True):
                    if process.poll() is not None:
                        print(f"stack: {name} ended with {process.returncode}", file=sys.stderr)
                        return 1
        finally:
            stop(running)
    print("ended", flush=True)
    return 0


def in_use(address: str) -> bool:
    """Whether another program listens at an address, host:port; False for one that is wrong."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(found[0][4])
    except (ValueError, socket.gaierror):
        return False
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def when_ready(server: "subprocess.Popen[str]", stopping: threading.Event) -> dict[str, str] | None:
    """Wait until the server is ready; returns its addresses, or None if it ends before, or `stopping` is set."""
    ready: list[dict[str, str] | None] = []
    reader = threading.Thread(target=lambda: ready.append(serve.when_ready(server)), daemon=True)
    reader.start()
    while reader.is_alive() and not stopping.is_set():
        reader.join(0.1)
    return ready[0] if ready else None


def configure(folder: Path, metrics: str) -> None:
    """Copy Prometheus's files to `folder`, with this server as the one to scrape."""
    for name in ("prometheus.yml", "rules.yml"):
        shutil.copy(CONFIGURATION / name, folder)
    (folder / "targets.yml").write_text(json.dumps([{"targets": [metrics]}]))


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with DIRECT.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def summary(ready: dict[str, str], url: str) -> str:
    """Return the addresses of the stack, and what to try, as text for the operator."""
    return f"""
gRPC         {ready["grpc"]}
metrics      {ready["metrics"]}
Prometheus   {url}/targets
rules        {url}/rules
alerts       {url}/alerts
speedup      {url}/graph?g0.expr=tome%3Aspeedup%3Amean5m&g0.tab=0&g0.range_input=15m
dashboard    deploy/grafana/dashboards/tome-serving.json, for a Grafana with {url} as its data source

some load    tome-client load --target {ready["grpc"]} --images server/tome_server/models/bundled/fashion/samples \\
               --rate 40 --budget mix:50ms,300ms --duration 60s

Ctrl-C ends both.
"""


def stop(running: "list[subprocess.Popen[str]]") -> None:
    """End what runs, the server first, so that Prometheus watches it while it answers requests in flight."""
    for process in running:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    sys.exit(main())
