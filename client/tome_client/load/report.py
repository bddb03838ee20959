"""A run as a web page in one file: figures, tables and pictures.

Needs matplotlib, which the plain install does not bring.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tome_api.durations import duration_text
from tome_client.json_text import json_text
from tome_client.load.outcome import LoadResult, Outcome
from tome_client.load.record import plan_fields, run_fields, write_requests
from tome_client.load.summary import LoadSummary
from tome_client.load.text import budget_rows, ending_rows, lag_warning, summary_facts, verdict_text

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError("a report needs matplotlib: pip install 'tome-serving[plots]'") from error

# The most points in a picture. More would only make the file larger.
_MOST_DOTS = 5_000

# Intervals that a run is divided into, for means over time.
_SLICES = 30

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } tr + tr { border-top: 1px solid #e3e7ec; }
.verdict { padding: .5rem .8rem; border-left: 4px solid #b3261e; background: #f7f2f2; }
.valid { border-color: #1b7f4b; }
svg { max-width: 100%; height: auto; } figcaption { color: #5a6675; font-size: .9rem; } figure { margin: 1rem 0; }
"""

_SETTINGS: dict[Any, Any] = {
    # Text stays text, which is smaller and can be searched.
    "svg.fonttype": "none",
    # With this, the same figures give the same file.
    "svg.hashsalt": "tome-client",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def write_report(folder: Path, result: LoadResult, summary: LoadSummary, target: str) -> Path:
    """Writes index.html, report.json and requests.csv into a folder, and returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json_text(run_fields(result, summary)) + "\n", encoding="utf-8")
    write_requests(folder / "requests.csv", result.outcomes)
    index = folder / "index.html"
    index.write_text(page(result, summary, target), encoding="utf-8", errors="backslashreplace")
    return index


def page(result: LoadResult, summary: LoadSummary, target: str) -> str:
    """Returns the page, which refers to no other file."""
    name = result.model.summary.name
    warning = lag_warning(summary)
    parts = [
        f"<h1>{escape(name)} at {summary.rate:.1f} requests/s</h1>",
        f'<p class="verdict{" valid" if summary.verdict.valid else ""}">{escape(verdict_text(summary))}</p>',
        f"<p>{escape(warning)}</p>" if warning else "",
        _table((), summary_facts(summary)),
    ]
    if len(summary.budgets) > 1:
        parts += ["<h2>By budget</h2>", _table(*budget_rows(summary))]
    parts += ["<h2>How requests ended</h2>", _table(*ending_rows(summary))]
    if result.outcomes:
        parts += [
            _figure(
                "Latency",
                "Share of all requests sent that were answered within each time, counted from when they were meant "
                "to be sent. Dashed: the budget.",
                lambda axes: _draw_latency(axes, result.outcomes),
            ),
            _figure(
                "In time",
                "Share of the requests of each interval, of those with a deadline, that were answered within their "
                "budget.",
                lambda axes: _draw_attainment(axes, result),
            ),
        ]
    if result.outcomes and not summary.total.unmerged:
        parts.append(
            _figure(
                "r",
                "Tokens merged in each block. Each dot is an answered request; the line is their mean.",
                lambda axes: _draw_r(axes, result),
            )
        )
    facts = [("target", target), ("model", f"{name}, {result.model.summary.architecture}")]
    facts += [("policy", result.model.policy)] if result.model.policy else []
    facts += [(key.replace("_", " "), json.dumps(value)) for key, value in plan_fields(result.plan).items()]
    parts += ["<h2>Settings of the run</h2>", _table((), facts)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{escape(name)} under load</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _draw_latency(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    end = 1.1e3 * max(one.latency for one in outcomes)
    end = max([end, *(1.1e3 * one.budget for one in outcomes if one.has_deadline)])
    for number, budget in enumerate(sorted({one.budget for one in outcomes})):
        of_it = [one for one in outcomes if one.budget == budget]
        latencies = sorted(1e3 * one.latency for one in of_it if one.answered)
        ranks = range(0, len(latencies), max(1, len(latencies) // _MOST_DOTS))
        axes.step(
            # The share stays the same up to the right edge: later answers don't exist.
            [*(latencies[rank] for rank in ranks), end],
            [*((rank + 1) / len(of_it) for rank in ranks), len(latencies) / len(of_it)],
            where="post",
            color=f"C{number}",
            label=f"budget {duration_text(budget)}" if math.isfinite(budget) else "no deadline",
        )
        if math.isfinite(budget):
            axes.axvline(1e3 * budget, color=f"C{number}", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(right=end)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("share of all sent")
    axes.legend(loc="lower right", frameon=False)


def _draw_attainment(axes: Axes, result: LoadResult) -> None:
    middles, shares = _over_time(result, lambda one: float(one.attained) if one.has_deadline else None)
    axes.plot(middles, shares, marker=".", color="C0")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("time, s")
    axes.set_ylabel("share in time")


def _draw_r(axes: Axes, result: LoadResult) -> None:
    dots = [(one.at, one.merging.r) for one in result.outcomes if one.merging]
    dots = dots[:: max(1, len(dots) // _MOST_DOTS)]
    axes.scatter([at for at, _ in dots], [r for _, r in dots], s=4, alpha=0.4, color="C1")
    axes.plot(*_over_time(result, lambda one: one.merging.r if one.merging else None), color="C0")
    axes.set_ylim(bottom=-0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("time, s")
    axes.set_ylabel("r")


def _over_time(result: LoadResult, value: Callable[[Outcome], float | None]) -> tuple[list[float], list[float]]:
    """Returns the middles of the run's intervals, and the mean of a value in each interval that has any."""
    slices: dict[int, list[float]] = {}
    width = max(one.at for one in result.outcomes) / _SLICES or 1.0
    for one in result.outcomes:
        if (number := value(one)) is not None:
            slices.setdefault(min(int(one.at / width), _SLICES - 1), []).append(number)
    return (
        [(index + 0.5) * width for index in sorted(slices)],
        [sum(slices[index]) / len(slices[index]) for index in sorted(slices)],
    )


def _figure(title: str, caption: str, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawing = file.getvalue()
    # An SVG inside HTML has no XML declaration.
    svg = drawing[drawing.index("<svg") :]
    return f"<h2>{title}</h2><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in ([head] if head else []) + lines) + "</table>"
