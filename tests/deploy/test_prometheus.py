"""A real Prometheus watches a real server under load: what it records is what the server did and the client saw."""

import asyncio
import csv
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.chart import NAMESPACE, RELEASE, render, the
from tests.deploy.prometheus import PATIENCE, Prometheus, until, watching
from tests.deploy.test_dashboard import BOARD, NAMES, PANELS, QUERIES
from tests.deploy.test_rules import ALERTS, RECORDED
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_client import PredictOptions
from tome_client.load import LoadPlan, Renewal, event_loop, parse_budgets, read_samples, run_load
from tome_client.load.record import write_requests
from tome_server.observability import buckets

SAMPLES = Path(__file__).parents[2] / "server/tome_server/models/bundled/fashion/samples"
TRACE = "0af7651916cd43dd8448eb211c80319c"
# What a query of the same series may differ by: Prometheus adds in its own order.
EXACTLY = 1e-9
# A rate over five minutes counts up to so many scrape intervals that it didn't see, beside those between its samples.
UNSEEN = 1.1


@dataclass
class Watched:
    """A server after a load that has ended, and who watched it."""

    server: ServerProcess
    now: Prometheus
    prometheus: Prometheus
    """As it was once the end had been scraped and the rules evaluated on that, however many scrapes fail later."""
    rows: list[dict[str, str]]
    """The client's record, a row a request."""
    served: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    """The server's own account, by sample and labels."""
    began: float
    ended: float
    scrapes: float

    @property
    def extrapolated(self) -> float:
        """What a rate may be over what was counted: a busy machine's scrapes are few."""
        # The last may have been on its way when the rules were evaluated.
        return 1 + UNSEEN / (self.scrapes - 2)

    def total(self, sample: str, **labels: str) -> float:
        """Sum the server's samples of this name that have these labels."""
        return sum(
            value
            for (name, given), value in self.served.items()
            if name == sample and labels.items() <= dict(given).items()
        )

    def answered(self, column: str) -> list[float]:
        """A column of the client's record, of answered requests."""
        return [float(row[column]) for row in self.rows if row["code"] == "OK"]


def load(target: str, record: Path) -> list[dict[str, str]]:
    """Send an open loop of requests, and return the client's record."""
    plan = LoadPlan(
        read_samples(SAMPLES),
        Renewal(30),
        # Some that can't be met, some that are tight, some with all the time in the world; all are merged a little.
        parse_budgets("mix:2ms,150ms,5s"),
        duration=7,
        options=PredictOptions(min_r=2),
        # Whatever the machine does besides: a request that the client gives up is another thing to either side.
        grace=PATIENCE,
    )
    with asyncio.Runner(loop_factory=event_loop) as runner:
        write_requests(record, runner.run(run_load(target, plan)).outcomes)
    with record.open() as file:
        return list(csv.DictReader(file))


def account(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urlopen(url) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def watched(module_server: Callable[..., ServerProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    server = module_server("--threads", "1")
    folder = tmp_path_factory.mktemp("watched")
    with watching(urlsplit(server.metrics_url).netloc, folder) as now:
        until(lambda: now.query('tome_slo_met_total{model="fashion"} == 0'), "the server is watched")
        began = time.time()
        rows = load(server.target, folder / "requests.csv")
        ended = time.time()

        def times(prometheus: Prometheus, series: str) -> list[float]:
            return [*prometheus.query(f"timestamp({series})").values()]

        [scraped] = until(lambda: [at for at in times(now, "tome_requests_pending") if at > ended], "a scrape")

        def evaluated() -> tuple[Prometheus, float] | None:
            """Prometheus as it is now, and when the first rule was evaluated, if all were since that scrape."""
            present = Prometheus(now.url, time.time())
            latest = [max(times(present, rule), default=0) for rule in RECORDED]
            there = times(present, "tome_requests_pending") and min(latest) > scraped + 1
            return (present, min(latest)) if there else None

        settled, first = until(evaluated, "the rules were evaluated on that")
        scrapes = Prometheus(now.url, first).value("count_over_time(tome_requests_pending[5m])")
        yield Watched(server, now, settled, rows, account(server.metrics_url), began, ended, scrapes)


def test_prometheus_has_every_series_of_the_server_as_it_is(watched: Watched) -> None:
    scraped = {}
    for labels, value in watched.prometheus.query('{job="tome-serving", __name__=~"tome_.*"}').items():
        given = dict(labels)
        name = given.pop("__name__")
        del given["job"], given["instance"]
        scraped[name, tuple(sorted(given.items()))] = value
    served = {key: value for key, value in watched.served.items() if key[0].startswith("tome_")}
    # Of an idle server too: it goes on finding out how fast the machine is.
    drift = ("tome_latency_drift_ratio", (("model", "fashion"),))
    assert min(scraped.pop(drift), served.pop(drift)) > 0
    assert scraped == served


def test_the_server_counted_what_the_client_recorded(watched: Watched) -> None:
    rows = watched.rows
    assert len(rows) > 150
    for code, count in Counter(row["code"] for row in rows).items():
        assert watched.total("tome_requests_total", model="fashion", code=code) == count
    assert watched.total("tome_requests_total") == len(rows)
    for reason in ("infeasible", "expired"):
        count = sum(row["reason"] == reason.upper() for row in rows)
        assert watched.total("tome_slo_missed_total", model="fashion", reason=reason) == count
    assert watched.total("tome_slo_missed_total", reason="infeasible") > 20
    assert watched.total("tome_slo_met_total") == sum(slack >= 0 for slack in watched.answered("slack")) > 20
    tokens_in, tokens_out = sum(watched.answered("tokens_in")), sum(watched.answered("tokens_out"))
    assert watched.total("tome_tokens_input_total") == tokens_in
    assert watched.total("tome_tokens_merged_total") == tokens_in - tokens_out > 0
    assert watched.total("tome_flops_total") == sum(watched.answered("flops"))
    assert watched.total("tome_flops_saved_total") == sum(watched.answered("flops_saved")) > 0
    assert watched.total("tome_merge_r_sum") == sum(watched.answered("r"))


def test_the_rules_record_what_the_client_saw(watched: Watched) -> None:
    value, answered = watched.prometheus.value, watched.answered
    missed = len(watched.rows) - sum(slack >= 0 for slack in answered("slack"))
    share = missed / len(watched.rows)
    for window in ("5m", "30m", "1h", "2h", "6h", "1d", "3d"):
        assert value(f"tome:slo_missed:ratio_rate{window}") == pytest.approx(share, rel=EXACTLY)
    infeasible = sum(row["reason"] == "INFEASIBLE" for row in watched.rows)
    assert value("tome:slo_infeasible:ratio_rate5m") == pytest.approx(infeasible / len(watched.rows), rel=EXACTLY)
    assert value("tome:slo:objective") == 0.99

    mean_r = sum(answered("r")) / len(answered("r"))
    assert value("tome:merge_r:mean5m") == pytest.approx(mean_r, rel=EXACTLY)
    assert value("tome:merge_r:limit_ratio5m") == pytest.approx(mean_r / 14, rel=EXACTLY)
    done, saved = sum(answered("flops")), sum(answered("flops_saved"))
    assert value("tome:flops_saved:ratio_rate5m") == pytest.approx(saved / (saved + done), rel=EXACTLY)
    kept = sum(answered("tokens_out")) / sum(answered("tokens_in"))
    assert value("tome:tokens_merged:ratio_rate5m") == pytest.approx(1 - kept, rel=EXACTLY)

    total = sorted(answered("total"))
    for q, name in ((0.5, "p50"), (0.99, "p99")):
        # The bucket of the client's own quantile is all that a histogram can tell.
        bounds = (0.0, *buckets.SECONDS.bounds)
        true = total[math.ceil(q * len(total)) - 1]
        above = next(i for i, bound in enumerate(bounds) if bound >= true)
        assert bounds[above - 1] <= value(f"tome:request_duration_seconds:{name}_5m") <= bounds[above]


def test_the_rules_record_what_the_server_measured(watched: Watched) -> None:
    value = watched.prometheus.value

    def ratio(over: str, under: str) -> Any:
        return pytest.approx(watched.total(over) / watched.total(under), rel=EXACTLY)

    computed = watched.total("tome_compute_seconds_total")
    # The whole batch's time is in the reply of each member.
    seen = sum(c / b for c, b in zip(watched.answered("compute"), watched.answered("batch_size"), strict=True))
    wasted = watched.total("tome_compute_wasted_seconds_total")
    # The client's record is in whole microseconds.
    assert computed == pytest.approx(seen + wasted, abs=5e-7 * watched.total("tome_batch_size_count"), rel=0)
    assert value("tome:speedup:mean5m") == ratio("tome_speedup_ratio_sum", "tome_speedup_ratio_count")
    assert value("tome:compute_wasted:ratio_rate5m") == pytest.approx(wasted / computed, rel=EXACTLY)
    assert value("tome:quality:mean5m") == ratio("tome_quality_ratio_sum", "tome_quality_ratio_count")
    assert value("tome:latency_prediction:mean5m") == ratio(
        "tome_latency_prediction_ratio_sum", "tome_latency_prediction_ratio_count"
    )
    assert value("tome:batch_size:mean5m") == ratio("tome_batch_size_sum", "tome_batch_size_count")
    answered = len(watched.answered("r"))
    assert answered <= 300 * value('tome:requests:rate5m{code="OK"}') <= watched.extrapolated * answered
    assert computed <= 300 * value("instance:device_busy:rate5m") * (1 + EXACTLY) <= watched.extrapolated * computed
    assert value("instance:requests_pending:limit_ratio") == 0


def test_the_charts_autoscalers_read_what_the_client_saw(watched: Watched) -> None:
    chart = render({"autoscaling": {"kind": "keda", "window": "5m"}})
    # Outside of Kubernetes series lack the labels that PodMonitors set.
    ours = f'namespace="{NAMESPACE}",app_kubernetes_io_instance="{RELEASE}"'
    asked = {
        trigger["name"]: watched.prometheus.value(trigger["metadata"]["query"].replace(ours, 'job="tome-serving"'))
        for trigger in the("ScaledObject", chart)["spec"]["triggers"]
    }
    answered = watched.answered("r")
    assert asked["r-share"] == pytest.approx(sum(answered) / len(answered) / 14, rel=EXACTLY)
    refused = sum(row["reason"] == "INFEASIBLE" for row in watched.rows)
    assert asked["refused-share"] == pytest.approx(refused / len(watched.rows), rel=EXACTLY)
    computed = watched.total("tome_compute_seconds_total")
    assert computed <= 300 * asked["busy"] * (1 + EXACTLY) <= watched.extrapolated * computed


def test_every_rule_is_evaluated_without_an_error(watched: Watched) -> None:
    rules = [rule for group in watched.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == RECORDED.keys() | ALERTS.keys()
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.parametrize(("panel", "expression"), QUERIES, ids=NAMES)
def test_every_query_of_the_dashboard_gets_data(watched: Watched, panel: dict[str, Any], expression: str) -> None:
    for variable, chosen in {
        "$job": ".*",
        "$model": ".*",
        "$__rate_interval": "4s",
        "$__range": "5m",
        "$__interval": "1s",
    }.items():
        expression = expression.replace(variable, chosen)
    result = watched.prometheus.get(
        "query_range", query=expression, start=str(watched.began), end=str(watched.ended + 2), step="1"
    )["result"]
    assert len(PANELS) > 20
    values = [float(value) for one in result for _, value in one["values"]]
    assert any(math.isfinite(value) for value in values)


def test_every_variable_of_the_dashboard_has_something_to_choose(watched: Watched) -> None:
    for name, values in (("job", ["tome-serving"]), ("model", ["fashion"])):
        (variable,) = (one for one in BOARD["templating"]["list"] if one["name"] == name)
        series = variable["query"].removeprefix("label_values(").removesuffix(f", {name})").replace("$job", ".*")
        assert watched.prometheus.get(f"label/{name}/values", **{"match[]": series}) == values


def test_exemplars_lead_to_the_trace_of_a_request(watched: Watched) -> None:
    metadata = [("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01")]
    with grpc.insecure_channel(watched.server.target) as channel:
        request = pb.PredictRequest(image=min(SAMPLES.glob("*.png")).read_bytes())
        inference_pb2_grpc.InferenceStub(channel).Predict(request, metadata=metadata)

    def traces() -> set[str]:
        found = watched.now.get(
            "query_exemplars",
            query="tome_request_duration_seconds_bucket",
            start=str(watched.began),
            end=str(time.time()),
        )
        return {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}

    until(lambda: TRACE in traces(), "the exemplar was scraped")


def test_prometheus_notices_when_the_server_dies(watched: Watched) -> None:
    watched.server.process.kill()
    firing = 'ALERTS{alertname="TomeReplicaDown", alertstate="pending"}'
    until(lambda: watched.now.query(firing), "the alert is on its way")
    assert watched.now.value('up{job="tome-serving"}') == 0
