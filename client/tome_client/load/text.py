"""The figures of a run as text."""

from __future__ import annotations

from typing import TypeAlias

from tome_api.durations import duration_text
from tome_api.tables import table
from tome_client.load.outcome import Progress
from tome_client.load.search import Probe, SearchResult
from tome_client.load.summary import Group, LoadSummary, Percentiles
from tome_client.tables import milliseconds

_ABSENT = "-"

Rows: TypeAlias = list[tuple[str, ...]]


def summary_text(summary: LoadSummary) -> str:
    """Returns all of a run's figures."""
    parts = [table((), summary_facts(summary))]
    if len(summary.budgets) > 1:
        header, rows = budget_rows(summary)
        parts.append(table(header, rows, right=range(len(header))))
    if summary.total.answered < summary.total.sent:
        header, rows = ending_rows(summary)
        parts.append(table(header, rows, right=(2,)))
    return "\n\n".join(parts)


def summary_facts(summary: LoadSummary) -> Rows:
    """Returns the figures of all requests together, each with its name."""
    total = summary.total
    facts = [
        ("sent", f"{total.sent:,} in {summary.duration:.1f} s, {summary.rate:.1f}/s; {total.answered:,} answered"),
        ("attainment", _attainment(total)),
        ("goodput", f"{total.goodput:.1f}/s answered within their budget" if total.attainment.of else _ABSENT),
        ("latency", _percentiles(total.latency)),
    ]
    if not total.unmerged:
        facts.append(("merging", _merging(total)))
    if total.effective_accuracy is not None:
        facts.append(("accuracy", _accuracy(total)))
    return [*facts, ("send lag", _percentiles(summary.lag)), ("verdict", verdict_text(summary))]


def budget_rows(summary: LoadSummary) -> tuple[tuple[str, ...], Rows]:
    """Returns a header, and a line for each budget."""
    header = ["budget", "sent", "answered", "attainment", "p50", "p99", "mean r", "effective accuracy"]
    rows = [
        [
            duration_text(group.budget or 0.0),
            f"{group.sent:,}",
            f"{group.answered:,}",
            _share(group.attainment.share if group.attainment.of else None),
            milliseconds(group.latency.p50) if group.latency else _ABSENT,
            milliseconds(group.latency.p99) if group.latency else _ABSENT,
            _ABSENT if group.mean_r is None else f"{group.mean_r:.2f}",
            _share(group.effective_accuracy),
        ]
        for group in summary.budgets
    ]
    if summary.total.unmerged:
        column = header.index("mean r")
        for cells in (header, *rows):
            del cells[column]
    return tuple(header), [tuple(row) for row in rows]


def ending_rows(summary: LoadSummary) -> tuple[tuple[str, ...], Rows]:
    """Returns a header, and how many requests ended in which way."""
    rows: Rows = [(one.code, one.reason or "", f"{one.count:,}") for one in summary.endings]
    return ("code", "reason", "requests"), rows


def verdict_text(summary: LoadSummary) -> str:
    """Returns a line with the verdict."""
    if summary.verdict.valid:
        return "VALID: at least 99 % are in time, with 99 % confidence"
    return f"INVALID: {'; '.join(summary.verdict.reasons)}"


def lag_warning(summary: LoadSummary) -> str | None:
    """Returns a warning if the generator did not keep its schedule; None if it did."""
    if summary.kept_schedule or summary.lag is None:
        return None
    return (
        f"the load generator did not keep its schedule: 1 % of requests were sent at least "
        f"{milliseconds(summary.lag.p99)} late, and at most {milliseconds(summary.most_lag)} is allowed. The latencies "
        "include this delay. Lower the rate, or give the generator a core of its own"
    )


def progress_text(progress: Progress) -> str:
    """Returns a line about how far a run has come."""
    if progress.at < 0:
        return f"warming up, {-progress.at:.0f} s to go"
    share = f"{progress.attained / progress.judged:.1%}" if progress.judged else _ABSENT
    waiting = progress.sent - progress.ended
    so_far = f"{progress.at:.0f} of {progress.duration:.0f} s"
    return f"{so_far}: {progress.sent:,} sent, {waiting:,} waiting, {share} in time"


def probe_text(probe: Probe) -> str:
    """Returns a line about a short run of a search."""
    total = probe.summary.total
    p99 = milliseconds(total.latency.p99) if total.latency else _ABSENT
    passed = "passed" if probe.passed else "failed" if probe.summary.kept_schedule else "failed: the generator lagged"
    return f"{probe.rate:8.2f}/s  {total.sent:7,} sent  {total.attainment.share:7.2%} in time  p99 {p99:>9}  {passed}"


def search_text(result: SearchResult) -> str:
    """Returns a line about what a search found."""
    if result.rate is None:
        tried = f"; the lowest rate tried was {result.too_high:.2f}/s" if result.too_high else ""
        return f"no rate keeps {result.criterion}{tried}"
    if result.too_high is None:
        return f"{result.criterion} is kept at {result.rate:.2f}/s, and no higher rate was found that fails"
    whose = " (the generator's limit, not the server's)" if result.limited_by == "generator" else ""
    return f"{result.criterion} is kept up to {result.rate:.2f}/s; {result.too_high:.2f}/s is too much{whose}"


def _share(share: float | None) -> str:
    return _ABSENT if share is None else f"{share:.2%}"


def _attainment(group: Group) -> str:
    share = group.attainment
    if not share.of:
        return f"{_ABSENT} (no request had a deadline)" if group.sent else _ABSENT
    return f"{share.share:.2%} answered within their budget (95 % interval {share.low:.2%} to {share.high:.2%})"


def _percentiles(spread: Percentiles | None) -> str:
    if spread is None:
        return _ABSENT
    names = ("p50", "p90", "p99", "p99.9", "max")
    values = (spread.p50, spread.p90, spread.p99, spread.p999, spread.max)
    return "  ".join(f"{name} {milliseconds(value)}" for name, value in zip(names, values, strict=True))


def _merging(group: Group) -> str:
    if group.mean_r is None:
        return _ABSENT
    tokens, flops = _share(group.tokens_saved), _share(group.flops_saved)
    return f"r {group.mean_r:.2f} on average; {tokens} of tokens and {flops} of FLOPs saved"


def _accuracy(group: Group) -> str:
    return (
        f"{_share(group.effective_accuracy)} effective (late and unanswered count as wrong); "
        f"{_share(group.answered_accuracy)} of the answers are right"
    )
