"""The autoscalers' queries, evaluated by Prometheus' own engine on made-up series of two pods."""

import json
from pathlib import Path

import pytest

from tests.deploy.chart import NAMESPACE, RELEASE, render, the
from tests.deploy.test_rules import promtool

SCRAPE = 15
QUERIES = {
    trigger["name"]: trigger["metadata"]["query"]
    for trigger in (the("ScaledObject", render({"autoscaling": {"kind": "keda"}}))["spec"]["triggers"])
}


def counter(name: str, per_second: float, pod: str, release: str = RELEASE, **labels: str) -> dict[str, str]:
    """Return a series that rises evenly."""
    labels |= {"namespace": NAMESPACE, "app_kubernetes_io_instance": release, "pod": pod}
    shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{shown}}}", "values": f"0+{per_second * SCRAPE}x20"}


def constant(name: str, value: float, pod: str, release: str = RELEASE, **labels: str) -> dict[str, str]:
    return counter(name, 0, pod, release, **labels) | {"values": f"{value}+0x20"}


def server(
    pod: str, *, r: float, busy: float, met: float = 2.0, release: str = RELEASE, **missed: float
) -> list[dict[str, str]]:
    """Return what a pod's server shows: model `a` at a mean r of 16, beside `b`, which always answers one at r = 0."""
    series = [
        counter("tome_merge_r_sum", r * met, pod, release, model="a"),
        counter("tome_merge_r_count", met, pod, release, model="a"),
        constant("tome_merge_r_limit", 16, pod, release, model="a"),
        counter("tome_merge_r_sum", 0, pod, release, model="b"),
        counter("tome_merge_r_count", met / 2, pod, release, model="b"),
        constant("tome_merge_r_limit", 8, pod, release, model="b"),
        counter("tome_slo_met_total", met, pod, release, model="a"),
        counter("tome_compute_seconds_total", busy, pod, release, model="a"),
        constant("tome_requests_pending", 3, pod, release),
    ]
    return series + [
        counter("tome_slo_missed_total", rate, pod, release, model="a", reason=reason)
        for reason, rate in ({"infeasible": 0.0, "queue_full": 0.0, "late": 0.0} | missed).items()
    ]


CASES = {
    "all in time at half of the dial": (
        server("p0", r=12, busy=0.75) + server("p1", r=4, busy=0.25),
        {"r-share": 0.5, "refused-share": 0, "busy": 0.5},
    ),
    "a quarter refused": (
        server("p0", r=16, busy=1, infeasible=0.5, queue_full=0.5, late=1)
        + server("p1", r=16, busy=1, infeasible=1, late=1),
        {"r-share": 1, "refused-share": 0.25, "busy": 1},
    ),
    "another release drowns, this one doesn't": (
        server("p0", r=8, busy=0.5) + server("p9", r=16, busy=1, infeasible=9, release="other"),
        {"r-share": 0.5, "refused-share": 0, "busy": 0.5},
    ),
    "nobody asks": (
        server("p0", r=0, busy=0, met=0) + server("p1", r=0, busy=0, met=0),
        {"r-share": 0, "refused-share": 0, "busy": 0},
    ),
    "a third pod still loads": (
        server("p0", r=8, busy=0.5) + server("p1", r=8, busy=1) + [constant("tome_requests_pending", 0, "p2")],
        {"r-share": 0.5, "refused-share": 0, "busy": 0.75},
    ),
    # Else pods would be taken away from servers that nobody can see.
    "nothing is scraped": (
        [constant("up", 0, "p0")],
        {"r-share": None, "refused-share": None, "busy": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_queries_give_the_figures_that_they_are_named_after(case: str, tmp_path: Path) -> None:
    series, figures = CASES[case]
    assert figures.keys() == QUERIES.keys()
    checks = [
        {
            "expr": QUERIES[name],
            "eval_time": "4m",
            "exp_samples": [] if figure is None else [{"labels": "{}", "value": figure}],
        }
        for name, figure in figures.items()
    ]
    test = {"interval": f"{SCRAPE}s", "input_series": series, "promql_expr_test": checks}
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [], "evaluation_interval": "15s", "tests": [test]}))
    promtool("test", "rules", str(file))
