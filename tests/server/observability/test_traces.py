"""Spans of finished requests, to memory, and over OTLP to a collector on a port."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.http_proxy import EXCEPTIONS, running_proxy
from tests.server.api.rpc.collector import collecting
from tome_server.errors import InfeasibleError
from tome_server.mac_count import MacCount
from tome_server.observability import request_context
from tome_server.observability.request_outcome import RequestOutcome, Timing
from tome_server.observability.trace_context import trace_context
from tome_server.observability.traces import Traces, otlp_processor
from tome_server.serving.requests import Reply

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COST = MacCount(dense=500, merged=375, overhead=0, tokens_in=197, tokens=(173, 149))
TIMING = Timing(decode=0.001, queue=0.002, compute=0.016, predicted=0.016, total=0.0195, slack=0.03, batch_size=3)
ENDED = RequestOutcome("vit", 0.02, Reply(None, None, 4, COST, TIMING), None)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Iterator[Traces]:
    traces = Traces(SimpleSpanProcessor(exporter))
    yield traces
    traces.close()


@pytest.fixture
def called_with() -> Iterator[Any]:
    """Returns what sets the present call's traceparent."""
    token = request_context.trace.set(None)
    yield lambda traceparent: request_context.trace.set(trace_context([traceparent]))
    request_context.trace.reset(token)


def record(traces: Traces, ended: RequestOutcome = ENDED) -> str | None:
    """Trace a request from its arrival to its end, and return the trace's id if it is recorded."""
    trace = traces.begin(0.0)
    trace.end(ended)
    return trace.id


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_requests_span_begins_when_it_arrived(traces: Traces, exporter: InMemorySpanExporter) -> None:
    before = time.time_ns()
    traces.begin(60.0).end(ENDED)
    began = by_name(exporter)["predict"].start_time + 60 * 10**9
    assert before <= began <= time.time_ns()


def test_a_request_is_a_span_with_its_stages_one_after_the_other(
    traces: Traces, exporter: InMemorySpanExporter
) -> None:
    trace = record(traces)
    spans = by_name(exporter)
    assert trace == format(spans["predict"].context.trace_id, "032x")
    assert spans.keys() == {"predict", "decode", "queue", "compute"}
    whole = spans["predict"]
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is None
    assert whole.resource.attributes["service.name"] == "tome-serving"
    assert whole.end_time - whole.start_time == 20_000_000
    assert whole.attributes == {
        "tome.model": "vit", "tome.outcome": "answered", "tome.r": 4, "tome.tokens_in": 197, "tome.tokens_out": 149,
        "tome.flops_saved": 250, "tome.batch_size": 3, "tome.slack_seconds": 0.03,
    }  # fmt: skip
    assert spans["compute"].attributes == {"tome.r": 4, "tome.tokens_in": 197, "tome.batch_size": 3}
    at = whole.start_time
    for name, took in (("decode", 1_000_000), ("queue", 2_000_000), ("compute", 16_000_000)):
        assert spans[name].parent.span_id == whole.context.span_id
        assert (spans[name].start_time, spans[name].end_time) == (at, at + took)
        at += took
    assert at <= whole.end_time


def test_a_request_without_an_answer_is_a_span_that_says_why(traces: Traces, exporter: InMemorySpanExporter) -> None:
    record(traces, RequestOutcome("vit", 0.001, None, InfeasibleError(0.05)))
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the deadline can't be met; the smallest latency possible now is 50 ms"
    assert span.attributes == {"tome.model": "vit", "tome.outcome": "infeasible"}


def test_a_request_belongs_to_its_callers_trace(
    traces: Traces, exporter: InMemorySpanExporter, called_with: Any
) -> None:
    called_with(f"00-{TRACE}-{PARENT}-01")
    assert record(traces) == TRACE
    spans = by_name(exporter)
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {TRACE}
    assert format(spans["predict"].parent.span_id, "016x") == PARENT


def test_what_the_caller_does_not_record_is_not_recorded(
    traces: Traces, exporter: InMemorySpanExporter, called_with: Any
) -> None:
    called_with(f"00-{TRACE}-{PARENT}-00")
    assert record(traces) is None
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("header", ["", "junk", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
def test_a_malformed_traceparent_begins_a_trace_anew(
    traces: Traces, exporter: InMemorySpanExporter, called_with: Any, header: str
) -> None:
    called_with(header)
    record(traces)
    assert by_name(exporter)["predict"].parent is None


def test_the_sdks_variables_hold(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vision")
    traces = Traces(SimpleSpanProcessor(exporter))
    record(traces)
    assert by_name(exporter)["predict"].resource.attributes["service.name"] == "vision"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    exporter.clear()
    record(Traces(SimpleSpanProcessor(exporter)))
    assert exporter.get_finished_spans() == ()


def test_a_collector_gets_the_spans() -> None:
    with collecting() as collector:
        traces = Traces(otlp_processor(collector.endpoint))
        for _ in range(10):
            record(traces)
        traces.close()
    assert sorted(span.name for span in collector.spans) == sorted(["predict", "decode", "queue", "compute"] * 10)
    compute = next(span for span in collector.spans if span.name == "compute")
    assert {one.key: one.value.int_value for one in compute.attributes}["tome.r"] == 4


@pytest.mark.parametrize("here", [True, False])
def test_a_proxy_of_the_environment_is_asked_for_a_collector_elsewhere_alone(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector, running_proxy(collector.endpoint.removeprefix("http://")) as proxy:
        for name in EXCEPTIONS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        traces = Traces(otlp_processor(collector.endpoint if here else "http://collector.invalid:4317"))
        record(traces)
        traces.close()
    assert len(collector.spans) == 4
    assert proxy.asked == ([] if here else ["CONNECT collector.invalid:4317 HTTP/1.1"])


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    program = "import sys, tome_server.app; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "[]\n"
