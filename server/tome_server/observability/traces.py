"""Traces: a span for each request, with one for each of its stages, sent to a collector over OTLP.

Needs the extra `tracing`. A request's span begins at its arrival, since the exemplars of metrics name the trace. The
spans of its stages are made from the times of the finished request.
"""

import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    format_trace_id,
    set_span_in_context,
)

from tome_api.targets import is_this_machine
from tome_server.observability import request_context
from tome_server.observability.logs import outcome_word
from tome_server.observability.request_outcome import Prediction, RequestOutcome
from tome_server.observability.trace_context import ParentSpan

# Seconds that a collector may take: an unreachable one must not keep a server from stopping.
EXPORT_SECONDS = 3.0
_NS = 1_000_000_000


def otlp_processor(endpoint: str) -> SpanProcessor:
    """Return a processor that sends spans to a collector from its own thread: by TLS to https, plain text to http."""
    # A proxy can't reach a collector on this machine; for any other, the environment's proxy settings hold.
    # `Any`, since the exporter types options as strings, which gRPC doesn't accept for a switch.
    here = is_this_machine(urlsplit(endpoint).hostname or "")
    options: Any = (("grpc.enable_http_proxy", 0),) if here else None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS, channel_options=options))


class Traces:
    """Makes the spans of each request. The SDK's environment variables hold, such as OTEL_TRACES_SAMPLER."""

    def __init__(self, processor: SpanProcessor) -> None:
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "tome-serving"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tome_server")

    def begin(self, since: float) -> "RequestTrace":
        """Begin the span of a request that arrived `since` seconds ago.

        If the caller sent a trace context, that decides whether the trace is recorded, else the sampler.
        """
        start = time.time_ns() - round(since * _NS)
        context = request_context.trace.get()
        parent = _within(context.parent) if context and context.parent else Context()
        span = self._tracer.start_span("predict", parent, SpanKind.SERVER, start_time=start)
        return RequestTrace(self._tracer, span, start)

    def close(self) -> None:
        """Send the remaining spans. Takes some seconds if the collector can't be reached."""
        self._provider.shutdown()


def _within(parent: ParentSpan) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    context = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(context), Context())


@dataclass(frozen=True)
class RequestTrace:
    """A request's spans."""

    tracer: Tracer
    span: Span
    start: int
    """Nanoseconds since the epoch."""

    @property
    def id(self) -> str | None:
        """The trace's id, 32 hexadecimal digits; None if it isn't recorded."""
        context = self.span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def end(self, outcome: RequestOutcome) -> None:
        """End the span, and make those of the stages if there was an answer."""
        if not self.span.is_recording():
            return
        self.span.set_attributes({"tome.model": outcome.model, "tome.outcome": outcome_word(outcome)})
        if outcome.reply:
            self._stages(outcome.reply)
        else:
            self.span.set_status(Status(StatusCode.ERROR, str(outcome.error)))
        self.span.end(self.start + round(outcome.seconds * _NS))

    def _stages(self, reply: Prediction) -> None:
        timing = reply.timing
        # Of the compute stage too, since its time depends on them.
        batch = {"tome.r": reply.r, "tome.tokens_in": reply.cost.tokens_in, "tome.batch_size": timing.batch_size}
        self.span.set_attributes(batch)
        self.span.set_attributes({"tome.tokens_out": reply.cost.tokens[-1], "tome.flops_saved": reply.flops_saved})
        if timing.slack is not None:
            self.span.set_attribute("tome.slack_seconds", timing.slack)
        within, start = set_span_in_context(self.span), self.start
        for name, seconds in (("decode", timing.decode), ("queue", timing.queue), ("compute", timing.compute)):
            stage = self.tracer.start_span(name, within, start_time=start)
            if name == "compute":
                stage.set_attributes(batch)
            start += round(seconds * _NS)
            stage.end(start)
