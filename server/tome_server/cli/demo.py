"""`tome-server demo`: run a real server of the bundled model and send it images over a real channel."""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tome_api.tables import table
from tome_server.cli import serve
from tome_server.cli.flags import Commands, add_json
from tome_server.models.bundled import BUNDLED

if TYPE_CHECKING:
    from tome_client import Client, PredictOptions, StreamItem

SAMPLES = BUNDLED / "fashion" / "samples"
# Seconds between reports of what the server does until it is ready.
REPORT_EVERY = 10.0
STOP_TIMEOUT = 120.0
# Seconds for one call: the demo must not fail on a machine that is busy with other work.
CALL_TIMEOUT = 120.0
# Streams send all samples this many times, so that they last about a second.
ROUNDS = 3
# The budget, in seconds, of images that are not meant to be short of time.
AMPLE_BUDGET = 60.0
# The budgets of the last part, as shares of the time of all images at r = 0: ample, tight, and not enough for all.
BUDGETS = (2.0, 0.9, 0.5)


@dataclass(frozen=True)
class Row:
    """One image at one r."""

    image: str
    label: str
    """The class of the image."""
    prediction: str
    """The class that the model predicts."""
    score: float
    r: int
    tokens_in: int
    tokens_out: int
    flops: int
    flops_saved: int
    latency_ms: float
    """The server's time, from arrival to answer."""


def add_to(commands: Commands) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo",
        help="serve the bundled model and send it its sample images",
        description="Start a server of the bundled model, send it its sample images at several r, show what came back.",
    )
    add_json(demo)
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print the results. Returns the exit status: 0 only if all of it worked."""
    from tome_client import Client, TomeError

    _tell("starting a server of the bundled model; at its first start it measures how fast the model is here")
    try:
        with _server() as ready:
            _tell(f"ready after {ready['seconds']:.1f} s; sending it its sample images")
            with Client(ready["grpc"], timeout=CALL_TIMEOUT) as client:
                grid = [level.r for level in client.model().r_grid]
                rows = list(_classify(client, _spread(grid)))
                streams = [_stream(client, r) for r in _spread(grid)]
                seconds = streams[0].images / streams[0].images_per_second
                deadlines = [_race(client, share * seconds) for share in BUDGETS]
            counters = _counters(ready["metrics"])
    except (_DemoError, TomeError, subprocess.TimeoutExpired) as error:
        print(f"tome-server demo: {error}", file=sys.stderr)
        return 1
    parts: list[Row | Throughput | Race] = [*rows, *streams, *deadlines]
    saved = sum(part.flops_saved for part in parts)
    agree = counters["tome_flops_saved_total"] == saved
    if args.json:
        report = {
            "rows": [asdict(row) for row in rows],
            "streams": [asdict(stream) for stream in streams],
            "deadlines": [asdict(deadline) for deadline in deadlines],
            "metrics": counters,
            "counters_agree": agree,
        }
        print(json.dumps(report, indent=2))
    else:
        _print(rows, streams, deadlines, counters, agree)
    return 0 if agree and rows else 1


@dataclass(frozen=True)
class Throughput:
    """All images at one r through one stream, in batches as the server forms them."""

    r: int
    images: int
    images_per_second: float
    flops_saved: int


@dataclass(frozen=True)
class Race:
    """All images at once with one latency budget, from which the server chooses r."""

    budget_ms: float
    images: int
    answered: int
    refused: int
    """Refused on arrival, or as soon as it was clear that there would not be time."""
    mean_r: float | None
    flops_saved: int


def _tell(what: str) -> None:
    """Print what the demo is doing, on standard error."""
    print(f"tome-server demo: {what}", file=sys.stderr, flush=True)


class _DemoError(Exception):
    """A step that did not work."""


@contextmanager
def _server() -> Iterator[dict[str, Any]]:
    """Run a server of the bundled model in a process of its own; yields what its ready line says."""
    # On a machine without a profile a rough one will do. In bfloat16, this small model gains little from merging.
    flags = ("--model", "bundled:fashion", "--profile-time", "2s", "--dtype", "float32")
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        with Path(log.name).open("w", encoding="utf-8") as written:
            process = serve.start(*serve.FREE_PORTS, *flags, stderr=written)
        ready = threading.Event()
        waiting = threading.Thread(target=_report, args=(ready, log), daemon=True)
        waiting.start()
        try:
            addresses = serve.when_ready(process)
            ready.set()
            waiting.join()
            if addresses is None:
                raise _DemoError(f"the server did not start: {_complaint(log)}")
            yield addresses
            process.terminate()
            status = process.wait(STOP_TIMEOUT)
            if status != 0:
                raise _DemoError(f"the server stopped with status {status}: {_complaint(log)}")
        finally:
            ready.set()
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _report(ready: threading.Event, log: IO[str]) -> None:
    """Report from time to time what the server does until it is ready."""
    began, last = time.monotonic(), "starting"
    while not ready.wait(REPORT_EVERY):
        last = next((event for _, event in reversed(_events(log))), last)
        _tell(f"waiting for the server, {time.monotonic() - began:.0f} s so far; it says: {last}")


def _events(log: IO[str]) -> list[tuple[str, str]]:
    """Return the level and the text of each line of a server's log; a line that is no log entry has no level."""
    log.seek(0)
    events = []
    for line in log.read().splitlines():
        try:
            entry = json.loads(line)
            events.append((str(entry["level"]), str(entry["event"])))
        except (ValueError, KeyError, TypeError):
            events.append(("", line))
    return events


def _complaint(log: IO[str]) -> str:
    """Return why a server ended: the lines that it printed, or else the errors in its log."""
    events = _events(log)
    printed = [event for level, event in events if not level]
    errors = [event for level, event in events if level in ("error", "critical")]
    return "\n".join(printed or errors) or "it said nothing"


def _classify(client: "Client", grid: Sequence[int]) -> Iterator[Row]:
    labels: dict[str, str] = json.loads((SAMPLES / "labels.json").read_text(encoding="utf-8"))
    for name, label in labels.items():
        for r in grid:
            result = client.predict(SAMPLES / name, r=r, top_k=1)
            best, merging = result.predictions[0], result.merging
            yield Row(
                image=name,
                label=label,
                prediction=best.label,
                score=best.score,
                r=merging.r,
                tokens_in=merging.tokens_in,
                tokens_out=merging.tokens_out,
                flops=merging.flops,
                flops_saved=merging.flops_saved,
                latency_ms=result.timing.total * 1e3,
            )


def _stream(client: "Client", r: int) -> Throughput:
    """Send every sample `ROUNDS` times at once."""
    items = _items({"r": r, "budget": AMPLE_BUDGET, "top_k": 1})
    start = time.perf_counter()
    results = [answer.result for answer in client.predict_stream(items, in_flight=len(items)) if answer.result]
    seconds = time.perf_counter() - start
    if len(results) != len(items):
        raise _DemoError(f"{len(items) - len(results)} of {len(items)} streamed images were not answered")
    return Throughput(r, len(items), len(items) / seconds, sum(result.merging.flops_saved for result in results))


def _race(client: "Client", budget: float) -> Race:
    """Send every sample `ROUNDS` times at once, with a `budget` in seconds in place of an r."""
    items = _items({"budget": budget, "top_k": 1})
    results = [answer.result for answer in client.predict_stream(items, in_flight=len(items)) if answer.result]
    return Race(
        budget_ms=budget * 1e3,
        images=len(items),
        answered=len(results),
        refused=len(items) - len(results),
        mean_r=sum(result.merging.r for result in results) / len(results) if results else None,
        flops_saved=sum(result.merging.flops_saved for result in results),
    )


def _items(options: "PredictOptions") -> "list[StreamItem]":
    from tome_client import StreamItem

    encoded = [path.read_bytes() for path in sorted(SAMPLES.glob("*.png"))] * ROUNDS
    return [StreamItem(str(i), image, options) for i, image in enumerate(encoded)]


def _spread(grid: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last r of the grid."""
    return sorted({grid[0], grid[len(grid) // 2], grid[-1]})


def _counters(url: str) -> dict[str, float]:
    """Read the counters of work done and saved from the metrics endpoint."""
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    # urllib's own opener would connect to this machine through a proxy of the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=CALL_TIMEOUT) as response:
        text = response.read().decode()
    wanted = ("tome_requests", "tome_tokens_input", "tome_tokens_merged", "tome_flops", "tome_flops_saved")
    counters: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name in wanted else ():
            if sample.name.endswith("_total"):  # requests have a sample for each code
                counters[sample.name] = counters.get(sample.name, 0.0) + sample.value
    return counters


def _print(
    rows: Sequence[Row],
    streams: Sequence[Throughput],
    deadlines: Sequence[Race],
    counters: dict[str, float],
    agree: bool,
) -> None:
    print(_images_table(rows))
    print(f"\n{_streams_table(rows, streams)}")
    print(f"\n{streams[0].images} at once, each with a latency budget, from which the server chooses r:")
    print(_deadlines_table(deadlines))
    print("\nthe server's own counters, from its metrics endpoint:")
    print(table((), [(name, f"{value:,.0f}") for name, value in counters.items()], right=[1]))
    if agree:
        command = sys.argv[0] if sys.argv[0].endswith("tome-server") else "tome-server"
        print(f"They agree with the replies: it works. For a server of your own: {command} serve")
    else:
        print("They do NOT agree with the replies.")


def _images_table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.image,
            row.label,
            f"{'✓' if row.prediction == row.label else '✗'} {row.prediction}",
            f"{row.score:.2f}",
            f"{row.r}",
            f"{row.tokens_in} → {row.tokens_out}",
            f"{_share_saved(row):.1%}",
            f"{row.latency_ms:.1f} ms",
        )
        for row in rows
    ]
    header = ("image", "label", "prediction", "score", "r", "tokens", "FLOPs saved", "latency")
    return table(header, cells, right=range(3, len(header)))


def _streams_table(rows: Sequence[Row], streams: Sequence[Throughput]) -> str:
    cells = []
    for stream in streams:
        chosen = [row for row in rows if row.r == stream.r]
        right = sum(row.prediction == row.label for row in chosen)
        latency = sorted(row.latency_ms for row in chosen)[len(chosen) // 2]
        cells.append(
            (
                f"{stream.r}",
                f"{right} of {len(chosen)}",
                f"{latency:.1f} ms",
                f"{stream.images_per_second:.0f} images/s",
                f"{_share_saved(chosen[0]):.0%}",
            )
        )
    header = ("r", "right", "one at a time", f"{streams[0].images} at once", "FLOPs saved")
    return table(header, cells, right=range(len(header)))


def _deadlines_table(deadlines: Sequence[Race]) -> str:
    cells = [
        (
            f"{race.budget_ms:.0f} ms",
            f"{race.answered}",
            f"{race.refused}",
            "-" if race.mean_r is None else f"{race.mean_r:.1f}",
        )
        for race in deadlines
    ]
    header = ("budget", "answered", "refused", "mean r")
    return table(header, cells, right=range(len(header)))


def _share_saved(row: Row) -> float:
    return row.flops_saved / (row.flops + row.flops_saved)
