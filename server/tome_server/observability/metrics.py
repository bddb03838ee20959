"""Every metric of the server, in Prometheus base units, labelled by model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tome_server.observability import buckets
from tome_server.observability.buckets import Buckets

NAMESPACE = "tome"
_EXPIRY = "Unix time at which the first of the server's certificates ends; only with TLS"
# What the names of a family's series end in, by the family's type.
_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}  # fmt: skip


class Missed(StrEnum):
    """Why a request was not answered inside its deadline."""

    INFEASIBLE = "infeasible"
    EXPIRED = "expired"
    QUEUE_FULL = "queue_full"
    FAILED = "failed"
    LATE = "late"


class Rejected(StrEnum):
    """Why a request was refused before it cost anything."""

    INFEASIBLE = "infeasible"
    QUEUE_FULL = "queue_full"
    CLIENT_LIMIT = "client_limit"


class Promise(StrEnum):
    """Whether a batch took no longer than what 95 of 100 should."""

    KEPT = "kept"
    BROKEN = "broken"


class Stage(StrEnum):
    """What a request is in, from its arrival on."""

    DECODE = "decode"
    QUEUE = "queue"
    COMPUTE = "compute"
    REPLY = "reply"


@dataclass(frozen=True)
class Family:
    """What is known of a metric before a server runs."""

    name: str
    """Without the type's suffix."""
    type: str
    """counter, gauge, histogram or info"""
    labels: tuple[str, ...]
    text: str
    buckets: Buckets | None = None

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its series, as queries have them."""
        return tuple(self.name + suffix for suffix in _SUFFIXES[self.type])


class GridHistogram(Collector):
    """A histogram by model, with buckets for each model."""

    def __init__(self, name: str, text: str, default: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._default = tuple(default)
        self._models: dict[str, tuple[tuple[float, ...], Histogram]] = {}

    def declare(self, model: str, bounds: Sequence[float]) -> None:
        """Count `model` in these buckets from now on; its counts in other buckets are dropped."""
        bounds = tuple(sorted(set(bounds)))
        if model not in self._models or self._models[model][0] != bounds:
            histogram = Histogram(self._name, self._text, ["model"], registry=None, buckets=bounds)
            self._models[model] = (bounds, histogram)

    def labels(self, model: str) -> Histogram:
        """Return the histogram of a model."""
        if model not in self._models:
            self.declare(model, self._default)
        return self._models[model][1].labels(model)

    def describe(self) -> Iterator[Metric]:
        """Yield the family without samples."""
        yield Metric(self._name, self._text, "histogram")

    def collect(self) -> Iterator[Metric]:
        """Yield the family with every model's samples."""
        family = Metric(self._name, self._text, "histogram")
        for _, histogram in list(self._models.values()):
            for one in histogram.collect():
                family.samples.extend(one.samples)
        yield family


class Metrics:
    """All metrics of one server, in their own registry, so that two servers in one process don't share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families: list[Family] = []
        """In the order of docs/metrics.md."""

        self.requests = self._counter("requests", "Requests by gRPC status; CANCELLED where the client left", "code")
        self.request_duration = self._histogram(
            "request_duration_seconds", "Arrival to answer, of requests with a prediction", buckets.SECONDS
        )
        self.stage_duration = self._histogram(
            "stage_duration_seconds", "The same by stage: decode, queue, compute, reply", buckets.SECONDS, "stage"
        )
        self.slo_met = self._counter("slo_met", "Requests answered inside their deadline")
        self.slo_missed = self._counter(
            "slo_missed",
            "Requests that were not, by reason: infeasible, expired, queue_full, failed, or late for an answer after "
            "the deadline; what is wrong in itself, or given up by its client before the deadline, is no miss",
            "reason",
        )
        self.deadline_slack = self._histogram(
            "deadline_slack_seconds", "Time left until the deadline, of requests with a prediction", buckets.SLACK
        )
        self.rejected = self._counter(
            "rejected",
            "Requests refused for want of time or room, by reason: infeasible, queue_full, client_limit",
            "reason",
        )
        self.pending = self._gauge("requests_pending", "Requests in the server, not answered yet")
        self.pending_limit = self._gauge("requests_pending_limit", "At so many pending requests more are refused")
        self.device_hung = self._gauge(
            "device_hung",
            "1 while a batch takes more than ten seconds and fifty times what was promised: the server is NOT_SERVING",
        )
        self.queue_depth = self._gauge("queue_depth", "Requests that wait for the device", "model")
        self.decode_queue_depth = self._gauge("decode_queue_depth", "Requests that wait for their images to be decoded")
        self.batch_size = self._histogram("batch_size", "Images in a batch", buckets.BATCH)
        self.halved_batches = self._counter(
            "halved_batches", "Batches that the device lacked the memory for; larger ones than a half are not run again"
        )
        self.compute_seconds = self._counter("compute_seconds", "Time that batches took on the device")
        self.wasted_seconds = self._counter(
            "compute_wasted_seconds",
            "The share of compute_seconds for requests whose callers had left by the time it ended",
        )
        self.speedup_ratio = self._histogram(
            "speedup_ratio",
            "Time that a batch would have taken at r = 0, by profile and drift, over the time it took",
            buckets.SPEEDUP,
        )
        self.prediction_ratio = self._histogram(
            "latency_prediction_ratio", "Time a batch took over the time it was expected to", buckets.RATIO
        )
        self.promises = self._counter(
            "latency_promises",
            "Batches by promise: kept, if it took no longer than what 95 of 100 should, or broken",
            "promise",
        )
        self.drift = self._gauge(
            "latency_drift_ratio", "Time that batches take now over the time they were profiled at", "model"
        )
        self.policy_failures = self._counter(
            "policy_failures", "Decisions made without the policy because it raised or broke a bound"
        )
        self.merge_r = self._grid_histogram("merge_r", "r of each image answered", buckets.MERGE_R)
        self.merge_r_limit = self._gauge("merge_r_limit", "Largest r of the grid that policies choose from", "model")
        self.quality_ratio = self._histogram(
            "quality_ratio",
            "Measured quality at the r of each image answered, as a share of that at r = 0; only of r in the grid, "
            "where quality was measured",
            buckets.QUALITY,
        )
        self.tokens_input = self._counter("tokens_input", "Tokens that entered the first block")
        self.tokens_merged = self._counter("tokens_merged", "Tokens merged away by the last block")
        self.flops = self._counter("flops", "Operations done, merging's own included (estimated)")
        self.flops_saved = self._counter(
            "flops_saved",
            "Operations that the unmerged model would have done on top (estimated); none where merging cost more",
        )
        self.model_info = Info("model", "1 for each model in service", ["model"], NAMESPACE, registry=self.registry)
        labels = ("model", "architecture", "device", "dtype", "policy")
        self._family("model", "info", labels, "1 for each model in service")
        self._family("tls_certificate_expiry_timestamp_seconds", "gauge", (), _EXPIRY)
        self._models: dict[str, ModelMetrics] = {}

    def of_model(self, model: str) -> "ModelMetrics":
        """Return the metrics of one model."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def serving(
        self, model: str, architecture: str, device: str, dtype: str, policy: str, rs: Sequence[int], largest_r: int
    ) -> None:
        """Announce a model in service: its r grid becomes merge_r's buckets, and its counters start at 0.

        Prometheus sees no rise in a counter that only appears with its first event.
        """
        self.model_info.labels(model).info(
            {"architecture": architecture, "device": device, "dtype": dtype, "policy": policy}
        )
        self.merge_r.declare(model, (*rs, largest_r))
        self.merge_r_limit.labels(model).set(rs[-1])
        self.requests.labels(model, "OK")
        self._models[model] = ModelMetrics(self, model)
        self._models[model].drift.set(1)
        self._models[model].queue_depth.set(0)

    def retired(self, model: str) -> None:
        """Remove the gauges of a model that is out of service; what was counted stays."""
        self._models.pop(model, None)
        for gauge in (self.model_info, self.merge_r_limit, self.drift, self.queue_depth):
            gauge.remove(model)

    def certificate(self, expiry: Callable[[], float]) -> None:
        """Report at each scrape from now on the Unix time at which the certificate in use ends."""
        # Only with TLS: a gauge that is never set is 0, which would be a certificate that ended in 1970.
        gauge = Gauge("tls_certificate_expiry_timestamp_seconds", _EXPIRY, (), NAMESPACE, registry=self.registry)
        gauge.set_function(expiry)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the body of a scrape and its content type: OpenMetrics if the Accept header lists it.

        Only OpenMetrics has exemplars.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._family(name, "counter", ("model", *labels), text)
        return Counter(name, text, ["model", *labels], NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Buckets, *labels: str) -> Histogram:
        self._family(name, "histogram", ("model", *labels), text, bounds)
        return Histogram(name, text, ["model", *labels], NAMESPACE, registry=self.registry, buckets=bounds.bounds)

    def _grid_histogram(self, name: str, text: str, default: Buckets) -> GridHistogram:
        self._family(name, "histogram", ("model",), text, default)
        histogram = GridHistogram(f"{NAMESPACE}_{name}", text, default.bounds)
        self.registry.register(histogram)
        return histogram

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self._family(name, "gauge", labels, text)
        return Gauge(name, text, labels, NAMESPACE, registry=self.registry)

    def _family(self, name: str, kind: str, labels: Sequence[str], text: str, bounds: Buckets | None = None) -> None:
        self.families.append(Family(f"{NAMESPACE}_{name}", kind, tuple(labels), text, bounds))


class ModelMetrics:
    """The metrics of one model: the children of its label, each looked up once. All of them then stand at 0."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.request_duration = metrics.request_duration.labels(model)
        self.stage_duration = {stage: metrics.stage_duration.labels(model, stage) for stage in Stage}
        self.slo_met = metrics.slo_met.labels(model)
        self.slo_missed = {reason: metrics.slo_missed.labels(model, reason) for reason in Missed}
        self.deadline_slack = metrics.deadline_slack.labels(model)
        self.rejected = {reason: metrics.rejected.labels(model, reason) for reason in Rejected}
        self.queue_depth = metrics.queue_depth.labels(model)
        self.batch_size = metrics.batch_size.labels(model)
        self.halved_batches = metrics.halved_batches.labels(model)
        self.compute_seconds = metrics.compute_seconds.labels(model)
        self.wasted_seconds = metrics.wasted_seconds.labels(model)
        self.speedup_ratio = metrics.speedup_ratio.labels(model)
        self.prediction_ratio = metrics.prediction_ratio.labels(model)
        self.promises = {promise: metrics.promises.labels(model, promise) for promise in Promise}
        self.drift = metrics.drift.labels(model)
        self.policy_failures = metrics.policy_failures.labels(model)
        self.merge_r = metrics.merge_r.labels(model)
        self.quality_ratio = metrics.quality_ratio.labels(model)
        self.tokens_input = metrics.tokens_input.labels(model)
        self.tokens_merged = metrics.tokens_merged.labels(model)
        self.flops = metrics.flops.labels(model)
        self.flops_saved = metrics.flops_saved.labels(model)


def exemplar(trace_id: str | None) -> dict[str, str] | None:
    """Return the exemplar for an observation that belongs to a trace, if it does."""
    return {"trace_id": trace_id} if trace_id else None
