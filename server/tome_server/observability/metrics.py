"""Every metric of the server, in Prometheus base units, labelled by model."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from tome_server.observability import buckets


class Metrics:
    """One set of metrics in a registry of its own, so that two servers in one process don't share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered, by gRPC status code", "code")
        self.request_duration = self._histogram(
            "request_duration_seconds", "Arrival to answer, of requests answered with a prediction", buckets.SECONDS
        )
        self.stage_duration = self._histogram(
            "stage_duration_seconds", "Time of a request in decode, queue and compute", buckets.SECONDS, "stage"
        )
        self.pending = self._gauge("requests_pending", "Requests that have arrived and aren't answered yet")
        self.queue_depth = self._gauge("queue_depth", "Requests that wait for the device")
        self.deadline_slack = self._histogram(
            "deadline_slack_seconds", "Time left until the deadline when the answer was ready", buckets.SLACK
        )
        self.slo_met = self._counter("slo_met", "Requests answered inside their deadline")
        self.slo_missed = self._counter("slo_missed", "Requests that were not, by reason", "reason")
        self.rejected = self._counter("rejected", "Requests refused without computing them, by reason", "reason")
        self.prediction_ratio = self._histogram(
            "latency_prediction_ratio", "Time a batch took over the time it was expected to", buckets.RATIO
        )
        self.quality_ratio = self._histogram(
            "quality_ratio", "Measured quality at each image's r, as a share of that at r = 0", buckets.QUALITY
        )
        self.compute_seconds = self._counter("compute_seconds", "Time that batches took on the device")
        self.wasted_seconds = self._counter(
            "compute_wasted_seconds", "The share of it spent on requests that nobody waited for any more"
        )
        self.policy_failures = self._counter("policy_failures", "Decisions made without the policy because it failed")
        self.batch_size = self._histogram("batch_size", "Images in a batch", buckets.BATCH)
        self.merge_r = self._histogram("merge_r", "Tokens merged in each block, of each image", buckets.MERGE_R)
        self.tokens_input = self._counter("tokens_input", "Tokens that entered the first block")
        self.tokens_merged = self._counter("tokens_merged", "Tokens merged away by the last block")
        self.flops = self._counter("flops", "Floating-point operations done, those of merging included (estimated)")
        self.flops_saved = self._counter(
            "flops_saved", "Floating-point operations that the unmerged model would have done on top (estimated)"
        )
        self.model_info = Info("model", "A hosted model", ["model"], namespace="tome", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model", *labels], namespace="tome", registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ["model", *labels], namespace="tome", registry=self.registry, buckets=bounds)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, namespace="tome", registry=self.registry)
