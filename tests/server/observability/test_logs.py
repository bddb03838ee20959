"""What operators read: real lines of the real configuration, and what they hold."""

import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tome_server.errors import ClientLimitError, InfeasibleError
from tome_server.mac_count import MacCount
from tome_server.observability import logs, request_context
from tome_server.observability.request_outcome import RequestOutcome, Timing
from tome_server.observability.trace_context import trace_context
from tome_server.serving.requests import Reply


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was found."""
    root, own = logging.getLogger(), logging.getLogger("tome_server")
    before = root.handlers[:], root.level, own.level
    yield
    root.handlers[:], root.level = before[0], before[1]
    own.setLevel(before[2])
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def answered(r: int = 4, total: float = 0.02, batch_size: int = 1, slack: float = 0.03) -> RequestOutcome:
    cost = MacCount(dense=500, merged=375, overhead=0, tokens_in=197, tokens=(173, 149))
    timing = Timing(
        decode=0.001, queue=0.002, compute=0.016, predicted=0.016, total=total, slack=slack, batch_size=batch_size
    )
    return RequestOutcome("vit", total, Reply(None, None, r, cost, timing), None)


def test_a_line_is_an_object_of_json_where_nobody_watches() -> None:
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    logging.getLogger("tome_server.app").info("listening on %s", "здесь")
    logging.getLogger("tome_server.app").debug("nobody asked")
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "logger", "event"]
    assert (line["level"], line["logger"], line["event"]) == ("info", "tome_server.app", "listening on здесь")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_line_is_json_in_whatever_letters_the_stream_has(encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding, errors="backslashreplace", write_through=True)
    logs.configure("info", "json", stream)
    logging.getLogger("tome_server.app").info("listening on %s", "здесь é 大 \udcff")
    assert json.loads(written.getvalue())["event"] == "listening on здесь é 大 \udcff"


@pytest.mark.parametrize(("form", "stream"), [("auto", Terminal()), ("text", io.StringIO())])
def test_a_line_is_text_at_a_terminal_or_where_that_is_asked_for(form: Any, stream: io.StringIO) -> None:
    logs.configure("info", form, stream)
    logging.getLogger("tome_server.app").warning("careful")
    text = stream.getvalue()
    assert "careful" in text
    assert "warning" in text
    assert ("\x1b[" in text) == isinstance(stream, Terminal)


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_errors_traceback_shows_no_values(form: Any) -> None:
    """They may be images or tokens."""
    stream = io.StringIO()
    logs.configure("info", form, stream)

    def fail(secret: str) -> None:
        raise ValueError(f"of {len(secret)}")

    hidden = "-".join(["hidden", "value"])
    try:
        fail(hidden)
    except ValueError:
        logging.getLogger("tome_server.serving.engine").exception("failed")
    text = stream.getvalue()
    assert "ValueError: of 12" in text
    assert "in fail" in text
    assert hidden not in text
    if form == "json":
        assert "Traceback" in lines(stream)[0]["exception"]


def test_libraries_say_only_what_is_wrong() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logging.getLogger("timm.models").info("loading")
    logging.getLogger("asyncio").debug("selector")
    logging.getLogger("asyncio").error("task was lost")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old habit", DeprecationWarning, stacklevel=1)
    assert [line["logger"] for line in lines(stream)] == ["asyncio", "py.warnings"]


def test_a_request_is_a_line_at_debug() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    request_context.client.set("ipv4:10.0.0.1")
    request_context.trace.set(trace_context(["00-" + "a" * 32 + "-" + "b" * 16 + "-01"]))
    logs.log_request(answered())
    logs.log_request(RequestOutcome("vit", 0.001, None, InfeasibleError(0.0492), budget=0.02))
    logs.log_request(RequestOutcome("x" * 1000, 0.001, None, asyncio.CancelledError()))
    first, second, third = lines(stream)
    assert first["event"] == "request"
    assert first["client"] == "ipv4:10.0.0.1"
    assert first["traceparent"] == f"00-{'a' * 32}-{'b' * 16}-01"
    told = {key: first[key] for key in ("outcome", "r", "tokens_in", "tokens_out", "compute_ms", "total_ms")}
    assert told == {
        "outcome": "answered", "r": 4, "tokens_in": 197, "tokens_out": 149, "compute_ms": 16.0, "total_ms": 20.0,
    }  # fmt: skip
    assert second["outcome"] == "infeasible"
    assert second["why"] == "the deadline can't be met; the smallest latency possible now is 50 ms"
    assert (second["budget_ms"], second["smallest_latency_ms"]) == (20.0, 50)
    assert third["outcome"] == "cancelled"
    assert "budget_ms" not in third
    assert len(third["model"]) == 100
    request_context.client.set("")
    request_context.trace.set(None)


def test_a_request_is_no_line_at_info() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    logs.log_request(answered())
    assert stream.getvalue() == ""


async def test_a_summary_adds_up_what_was_answered_and_what_was_not() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    summary = logs.Summary(1000)
    summary.write()
    assert stream.getvalue() == ""
    for r, total, slack in ((0, 0.010, 0.1), (4, 0.020, 0.1), (8, 0.030, -0.01)):
        summary(answered(r=r, total=total, batch_size=3, slack=slack))
    summary(answered(r=0, total=0.005))
    for error in (InfeasibleError(0.05), InfeasibleError(0.05), ClientLimitError(3, 0.1)):
        summary(RequestOutcome("vit", 0.001, None, error))
    summary.write()
    summary.write()
    (line,) = lines(stream)
    told = {key: value for key, value in line.items() if key not in ("timestamp", "level", "logger")}
    assert told == {
        "event": "served", "requests": 7, "answered": 4, "late": 1, "batches": 2, "mean_batch": 2.0, "mean_r": 3.0,
        "flops_saved_share": 0.25, "p50_ms": 10.0, "p99_ms": 30.0, "infeasible": 2, "client_limit": 1,
    }  # fmt: skip


async def test_a_summary_comes_by_itself_some_time_after_the_first_request() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    summary = logs.Summary(0.01)
    for _ in range(2):
        summary(answered())
        before = len(lines(stream))
        for _ in range(6000):
            await asyncio.sleep(0.01)
            if len(lines(stream)) > before:
                break
    assert [line["requests"] for line in lines(stream)] == [1, 1]


def test_a_server_that_cannot_start_says_so_in_plain_text() -> None:
    """It is the command that speaks, and to a person."""
    command = [sys.executable, "-m", "tome_server", "serve", "--policy", "cheapest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stderr.startswith("tome-server: --policy: 'cheapest' is no policy")


def test_a_librarys_line_that_repeats_is_written_once_a_second() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    asyncios, own = logging.getLogger("asyncio"), logging.getLogger("tome_server.own")

    def write(logger: logging.Logger, line: str, at: float) -> None:
        record = logger.makeRecord(logger.name, logging.ERROR, "", 0, line, (), None)
        record.created = at
        logger.handle(record)

    for number in range(1000):
        write(asyncios, f"socket.accept() out of system resource\nsocket: fd={number}", 100.0 + number / 1000)
        write(own, "model first failed", 100.0 + number / 1000)
    write(asyncios, "something else", 100.5)
    write(asyncios, "socket.accept() out of system resource\nsocket: fd=1", 101.0)
    events = [json.loads(line)["event"].partition("\n")[0] for line in stream.getvalue().splitlines()]
    assert events.count("socket.accept() out of system resource") == 2
    assert events.count("something else") == 1
    assert events.count("model first failed") == 1000


def test_lines_without_end_of_different_libraries_take_no_memory_without_end() -> None:
    repeated = logs.Repeated()
    for number in range(10 * logs.LINES_REMEMBERED):
        assert repeated.filter(logging.makeLogRecord({"name": "other", "msg": f"line {number}"}))
    assert len(repeated._written) <= logs.LINES_REMEMBERED
