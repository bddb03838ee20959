"""Prints docs/metrics.md, which `make reference` writes."""

from tome_server.observability.metrics import Family, Metrics

_HEAD = """# Metrics

*Written from the code by `make reference`; a test holds that it is current.*

At `http://<metrics address>/metrics` (setting `metrics`), in the Prometheus text format, or in OpenMetrics where the
scrape asks for it. Units are seconds, tokens and operations; ratios are of 1. A model's name that is not hosted counts
as `unknown`. What can be counted of a model stands at 0 from the moment it is served, so that its first event is a
rise.

Tokens and operations equal the sums over the replies: both are of requests answered with a prediction. Operations are
analytic estimates, 2 to a multiply-accumulate. **Speedup is measured**: what each batch took, against what the profile
says such a batch takes at r = 0, at the speed that the machine had just then. So 1 is no gain, whatever operations were
saved, and a batch that was stalled counts as slow as it was. Its mean over time is the increase of
`tome_speedup_ratio_sum` over that of `tome_speedup_ratio_count`.

In OpenMetrics, durations, slack and missed deadlines carry exemplars: the `trace_id` of a request of a recorded trace.
That came with the W3C header `traceparent`, or began here, where `traces` are sent. Prometheus keeps them if started
with `--enable-feature=exemplar-storage`.

Rules and alerts on these are in `deploy/prometheus/rules.yml`, and the dashboard in `deploy/grafana/`.
"""

_TABLE = """
| metric | type | labels | |
|---|---|---|---|
"""

_BUCKETS = """
## Buckets

Of histograms, and why these.

| metric | upper bounds | |
|---|---|---|
"""


def page() -> str:
    """Return the page: a row for each metric, and one for each set of buckets."""
    families = Metrics().families
    rows = "\n".join(map(_row, families))
    chosen: dict[tuple[float, ...], list[Family]] = {}
    for family in families:
        if family.buckets is not None:
            chosen.setdefault(family.buckets.bounds, []).append(family)
    return f"{_HEAD}{_TABLE}{rows}\n{_BUCKETS}" + "".join(map(_bucket_row, chosen.values()))


def _row(family: Family) -> str:
    name = family.name if family.type == "histogram" else family.series[0]
    labels = ", ".join(f"`{label}`" for label in family.labels) or "none"
    return f"| `{name}` | {family.type} | {labels} | {family.text} |"


def _bucket_row(families: list[Family]) -> str:
    buckets = families[0].buckets
    assert buckets is not None
    names = ", ".join(f"`{family.name}`" for family in families)
    return f"| {names} | {', '.join(f'{bound:g}' for bound in buckets.bounds)} | {buckets.reason} |\n"


if __name__ == "__main__":
    print(page(), end="")
