"""Writes the Grafana dashboard to standard output; `make reference` keeps it in dashboards/tome-serving.json.

Built with Grafana's own Foundation SDK, whose types are generated from Grafana's schemas.
"""

import json
import re
from dataclasses import dataclass
from typing import TypeAlias

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
OBJECTIVE = "scalar(tome:slo:objective)"
WIDTH = 24
# The series of the servers and models chosen above.
CHOSEN = ('job=~"$job"', 'model=~"$model"')
SERVERS = ('job=~"$job"',)
_SERIES = re.compile(r"\b(?:tome|instance)(?:_\w+|:[\w:]+)")

Panel: TypeAlias = timeseries.Panel | stat.Panel | heatmap.Panel


@dataclass(frozen=True)
class Query:
    """An expression, and what its series are called."""

    expr: str
    legend: str = "{{model}}"
    exemplars: bool = False


def rate(series: str, *more: str, of: tuple[str, ...] = CHOSEN, window: str = "$__rate_interval") -> str:
    """Return the increase a second of a counter of the chosen models."""
    return f"rate({series}{{{', '.join((*of, *more))}}}[{window}])"


def total(expr: str, by: str = "model") -> str:
    """Return the sum over the replicas."""
    return f"sum by ({by}) ({expr})"


def share(part: str, *rest: str, window: str = "$__rate_interval", by: str = "model") -> str:
    """Return a counter's share of itself and others, by model, in a window."""
    parts = [total(rate(series, window=window), by) for series in (part, *rest)]
    return f"{parts[0]} / ({' + '.join(parts)})"


def mean(histogram: str, window: str = "$__rate_interval") -> str:
    """Return the mean of what a histogram observed, by model."""
    return quotient(f"{histogram}_sum", f"{histogram}_count", window)


def quotient(over: str, under: str, window: str = "$__rate_interval") -> str:
    """Return the ratio of two counters' increases, by model."""
    return f"{total(rate(over, window=window))} / {total(rate(under, window=window))}"


def quantile(q: float, histogram: str, by: str = "model") -> str:
    """Return a quantile of what a histogram observed."""
    return f"histogram_quantile({q}, {total(rate(f'{histogram}_bucket'), f'{by}, le')})"


def quantiles(histogram: str, *qs: float, exemplars: bool = False) -> list[Query]:
    """Return queries for quantiles by model."""
    return [Query(quantile(q, histogram), f"{{{{model}}}} p{q * 100:g}", exemplars) for q in qs]


def described(text: str, queries: list[Query]) -> str:
    """Return a panel's description, with the metrics that it reads."""
    read = dict.fromkeys(name for query in queries for name in _SERIES.findall(query.expr))
    return f"{text}\n\nReads {', '.join(f'`{name}`' for name in read)}."


def targets(panel: Panel, queries: list[Query], kind: PromQueryFormat = PromQueryFormat.TIME_SERIES) -> None:
    """Give a panel its queries, named A, B, …"""
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref).format(kind)
        target = target.datasource(SOURCE)
        target = target.exemplar(True) if query.exemplars else target
        panel.with_target(target.instant() if isinstance(panel, stat.Panel) else target.range())


def lines(
    title: str,
    text: str,
    queries: list[Query],
    unit: str = "short",
    *,
    width: int = 8,
    stacked: bool = False,
    least: float | None = 0,
    most: float | None = None,
) -> timeseries.Panel:
    """Return a panel of lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(described(text, queries))
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .line_width(1)
        .fill_opacity(30 if stacked else 5)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    targets(panel, queries)
    return panel


def figure(
    title: str, text: str, expr: str, unit: str, steps: tuple[tuple[float | None, str], ...], *, decimals: int = 1
) -> stat.Panel:
    """Return a panel of one figure for each model, over the time shown; `steps` colour it from a value on."""
    queries = [Query(expr)]
    panel = (
        stat.Panel()
        .title(title)
        .description(described(text, queries))
        .datasource(SOURCE)
        .unit(unit)
        .decimals(decimals)
        .span(4)
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .color_scheme(build.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .thresholds(
            build.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps([models.Threshold(value=value, color=colour) for value, colour in steps])
        )
    )
    targets(panel, queries)
    return panel


def heat(title: str, text: str, expr: str, *, width: int = 8) -> heatmap.Panel:
    """Return a heat map of a histogram's buckets over time."""
    queries = [Query(expr, "{{le}}")]
    panel = (
        heatmap.Panel()
        .title(title)
        .description(described(text, queries))
        .datasource(SOURCE)
        .span(width)
        .height(8)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .cell_values(heatmap.CellValues().unit("short"))
        .y_axis(heatmap.YAxisConfig().unit("short").axis_placement(common_models.AxisPlacement.LEFT))
    )
    targets(panel, queries, PromQueryFormat.HEATMAP)
    return panel


GOOD_HIGH = ((None, "red"), (0.95, "orange"), (0.99, "green"))
PLAIN = ((None, "blue"),)


def overview() -> list[Panel]:
    """What the dial did in the time shown."""
    missed = share("tome_slo_missed_total", "tome_slo_met_total", window="$__range")
    return [
        figure(
            "SLO attainment",
            "Share of requests answered inside their deadline; refused ones count as not.",
            f"1 - {missed}",
            "percentunit",
            GOOD_HIGH,
            decimals=2,
        ),
        figure(
            "Error budget left",
            "What is left of the share of requests that the objective allows to miss; below 0 it is overdrawn.",
            f"1 - ({missed}) / (1 - {OBJECTIVE})",
            "percentunit",
            ((None, "red"), (0, "orange"), (0.5, "green")),
        ),
        figure(
            "Speedup",
            "How many times as fast as unmerged the mean batch ran: measured times, not operations.",
            mean("tome_speedup_ratio", "$__range"),
            "x",
            PLAIN,
            decimals=2,
        ),
        figure(
            "FLOPs saved",
            "Share of the unmerged model's operations that were not done.",
            share("tome_flops_saved_total", "tome_flops_total", window="$__range"),
            "percentunit",
            PLAIN,
        ),
        figure(
            "Tokens merged",
            "Share of the tokens of the first block that were merged away by the last.",
            quotient("tome_tokens_merged_total", "tome_tokens_input_total", "$__range"),
            "percentunit",
            PLAIN,
        ),
        figure(
            "Quality kept",
            "Measured quality at the r that was chosen, as a share of that at r = 0: what speed was paid with. Empty "
            "for models whose quality was never measured.",
            mean("tome_quality_ratio", "$__range"),
            "percentunit",
            ((None, "red"), (0.97, "orange"), (0.99, "green")),
            decimals=2,
        ),
    ]


def merging() -> list[Panel]:
    """The dial itself."""
    limit = f"max by (model) (tome_merge_r_limit{{{', '.join(CHOSEN)}}})"
    return [
        heat(
            "r, distribution over time",
            "Images answered at each r; the rows are the model's grid. Choose one model: grids differ.",
            total(f"increase(tome_merge_r_bucket{{{', '.join(CHOSEN)}}}[$__rate_interval])", "le"),
        ),
        lines(
            "Mean r, as a share of the largest",
            "How much of the dial is used up. At 1 no further deadline can be bought with accuracy: scale before.",
            [Query(f"({mean('tome_merge_r')}) / {limit}")],
            "percentunit",
            most=1,
        ),
        lines(
            "Quality kept",
            "Mean measured quality of the answers, as a share of that at r = 0.",
            [Query(mean("tome_quality_ratio"))],
            "percentunit",
            least=None,
        ),
        lines(
            "Speedup",
            "Time that a batch would have taken unmerged over the time it took: the mean, and quantiles over batches.",
            [Query(mean("tome_speedup_ratio"), "{{model}}"), *quantiles("tome_speedup_ratio", 0.1, 0.9)],
            "x",
            least=None,
        ),
        lines(
            "FLOPs",
            "Operations a second: done, and saved by merging. Together they are what the unmerged model would take.",
            [
                Query(total(rate("tome_flops_total")), "{{model}} done"),
                Query(total(rate("tome_flops_saved_total")), "{{model}} saved"),
            ],
            "flops",
            stacked=True,
        ),
        lines(
            "Tokens",
            "Tokens a second that left the last block, and that were merged away before.",
            [
                Query(
                    f"{total(rate('tome_tokens_input_total'))} - {total(rate('tome_tokens_merged_total'))}",
                    "{{model}} left",
                ),
                Query(total(rate("tome_tokens_merged_total")), "{{model}} merged"),
            ],
            stacked=True,
        ),
    ]


def deadlines() -> list[Panel]:
    """What was promised."""
    burn = f"/ (1 - {OBJECTIVE})"
    by_model = "max by (model) (tome:slo_missed:ratio_rate{}{{" + ", ".join(CHOSEN) + "}})"
    return [
        lines(
            "SLO attainment",
            "Share of requests answered inside their deadline, and the objective.",
            [
                Query(f"1 - {share('tome_slo_missed_total', 'tome_slo_met_total')}"),
                Query("tome:slo:objective", "objective"),
            ],
            "percentunit",
            least=None,
            most=1,
        ),
        lines(
            "Error budget burn rate",
            "How many times as fast as allowed the error budget is spent. Pages at 14.4 over an hour and 6 over six.",
            [
                Query(f"{by_model.format('5m')} {burn}", "{{model}} 5 m"),
                Query(f"{by_model.format('1h')} {burn}", "{{model}} 1 h"),
                Query(f"{by_model.format('6h')} {burn}", "{{model}} 6 h"),
            ],
            "x",
        ),
        lines(
            "Missed deadlines",
            "Requests a second that were not answered in time, by reason.",
            [Query(total(rate("tome_slo_missed_total"), "model, reason"), "{{model}} {{reason}}", exemplars=True)],
            "reqps",
            stacked=True,
        ),
        lines(
            "Slack",
            "Time left until the deadline when an answer was ready: the median, and what 5 % of answers had less than.",
            quantiles("tome_deadline_slack_seconds", 0.05, 0.5),
            "s",
            least=None,
            width=12,
        ),
        lines(
            "Refused",
            "Requests a second that were refused before they cost anything, by reason.",
            [Query(total(rate("tome_rejected_total"), "model, reason"), "{{model}} {{reason}}")],
            "reqps",
            stacked=True,
            width=12,
        ),
    ]


def latency() -> list[Panel]:
    """Where the time goes."""
    stages = [
        (q, Query(quantile(q, "tome_stage_duration_seconds", "model, stage"), "{{model}} {{stage}}", exemplars=True))
        for q in (0.5, 0.99)
    ]
    return [
        lines(
            "Latency",
            "From a request's arrival to its answer, of those answered with a prediction.",
            quantiles("tome_request_duration_seconds", 0.5, 0.99, exemplars=True),
            "s",
        ),
        *(
            lines(
                f"Latency by stage, p{q * 100:g}",
                "Decode, wait for the device, run on it, and the way back. Quantiles of stages don't add up.",
                [query],
                "s",
            )
            for q, query in stages
        ),
    ]


def load() -> list[Panel]:
    """How much there is to do."""
    pending, limit = (f"{name}{{{SERVERS[0]}}}" for name in ("tome_requests_pending", "tome_requests_pending_limit"))
    busy = total(rate("tome_compute_seconds_total"), "instance")
    return [
        lines(
            "Requests",
            "Requests a second by gRPC status.",
            [Query(total(rate("tome_requests_total"), "model, code"), "{{model}} {{code}}")],
            "reqps",
            stacked=True,
        ),
        lines(
            "Queue",
            "Requests that wait for the device.",
            [Query(f"sum by (model) (tome_queue_depth{{{', '.join(CHOSEN)}}})")],
            stacked=True,
        ),
        lines(
            "Pending, as a share of what is allowed",
            "Requests in each server over max_pending: at 1 more are refused.",
            [Query(f"{pending} / {limit}", "{{instance}}")],
            "percentunit",
        ),
        lines("Batch size", "Mean images in a batch.", [Query(mean("tome_batch_size"))], width=6),
        lines(
            "Device busy",
            "Share of time in which each server's device runs batches.",
            [Query(busy, "{{instance}}")],
            "percentunit",
            width=6,
        ),
        lines(
            "Wasted compute",
            "Share of the device's time spent on requests that nobody waited for any more when it ended.",
            [Query(quotient("tome_compute_wasted_seconds_total", "tome_compute_seconds_total"))],
            "percentunit",
            width=6,
        ),
        lines(
            "Batches halved",
            "Batches that the device lacked the memory for. After one the server makes them no larger than what was "
            "left, until the model is loaded anew: lower max_batch, or look for what else fills the device.",
            [Query(total(f"increase(tome_halved_batches_total{{{', '.join(CHOSEN)}}}[$__rate_interval])"))],
            width=6,
        ),
    ]


def prediction() -> list[Panel]:
    """Whether the server knows how long its batches take: all promises rest on that."""
    promises = "tome_latency_promises_total"
    kept = total(rate(promises, 'promise="kept"')) + " / " + total(rate(promises))
    return [
        lines(
            "Promises kept",
            "Share of the batches that took no longer than was promised, which is what 95 in 100 should: lower for "
            "long, and requests that were taken miss their deadlines.",
            [Query(kept)],
            "percentunit",
            most=1,
            width=6,
        ),
        lines(
            "Prediction error",
            "Time that batches took over the time they were expected to; 1 is exact.",
            quantiles("tome_latency_prediction_ratio", 0.1, 0.5, 0.9),
            "x",
            least=None,
            width=6,
        ),
        lines(
            "Drift from the profile",
            "Time that batches take now over the time they were profiled at; 2 is a machine half as fast.",
            [Query(f"tome_latency_drift_ratio{{{', '.join(CHOSEN)}}}", "{{instance}} {{model}}")],
            "x",
            least=None,
            width=6,
        ),
        lines(
            "Decisions without the policy",
            "A second, because it raised or broke a bound; the log says why.",
            [Query(total(rate("tome_policy_failures_total")))],
            width=6,
        ),
    ]


def dashboard() -> models.Dashboard:
    """Return the whole dashboard."""
    board = (
        build.Dashboard("tome-serving")
        .uid("tome-serving")
        .description("What deadlines cost in accuracy, and what merging saved. Metrics: docs/metrics.md.")
        .tags(["tome-serving"])
        .editable()
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name, label, query in (
        ("job", "Servers", "label_values(tome_requests_pending, job)"),
        ("model", "Model", 'label_values(tome_model_info{job=~"$job"}, model)'),
    ):
        board.with_variable(
            build.QueryVariable(name)
            .label(label)
            .query(query)
            .datasource(SOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all"))
        )
    ids = iter(range(1, 1000))
    for title, panels in {
        "In the time shown": overview(),
        "Merging": merging(),
        "Deadlines": deadlines(),
        "Latency": latency(),
        "Load": load(),
        "Prediction": prediction(),
    }.items():
        board.with_row(build.Row(title).id(next(ids)))
        for panel in panels:
            board.with_panel(panel.id(next(ids)))
    return board.build()


def rendered() -> str:
    """Return the dashboard as Grafana reads it."""
    board = json.loads(json.dumps(dashboard(), cls=JSONEncoder))
    for variable in board["templating"]["list"]:
        # The SDK gives every variable what only those of intervals have.
        for name in ("auto", "auto_min", "auto_count"):
            variable.pop(name, None)
    return json.dumps(board, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(rendered(), end="")
