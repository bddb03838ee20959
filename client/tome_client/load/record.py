"""A run as JSON and CSV, for files and other programs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from tome_client.load.arrivals import Renewal
from tome_client.load.outcome import LoadResult, Outcome
from tome_client.load.plan import LoadPlan
from tome_client.load.search import SearchResult
from tome_client.load.summary import LoadSummary, summarize

_COLUMNS = (
    "at", "lag", "latency", "budget", "attained", "image", "code", "reason", "right",
    "r", "tokens_in", "tokens_out", "flops", "flops_saved",
    "decode", "queue", "compute", "predicted", "total", "slack", "batch_size", "process",
)  # fmt: skip


def run_fields(result: LoadResult, summary: LoadSummary) -> dict[str, Any]:
    """Returns a run for JSON: its plan, its model and its figures. Durations are in seconds."""
    return {
        "model": result.model.summary.name,
        "policy": result.model.policy or None,
        "plan": plan_fields(result.plan),
        "summary": asdict(summary),
    }


def search_fields(found: SearchResult) -> dict[str, Any]:
    """Returns a search for JSON; `run` is the best run in full, null if no rate passed."""
    return {
        "criterion": found.criterion,
        "rate": found.rate,
        "too_high": found.too_high,
        "limited_by": found.limited_by,
        "stopped": found.stopped,
        "probes": [asdict(probe) for probe in found.probes],
        "run": run_fields(found.best, summarize(found.best)) if found.best else None,
    }


def plan_fields(plan: LoadPlan) -> dict[str, Any]:
    """Returns a plan for JSON; the budget of requests without a deadline is null."""
    arrivals = plan.arrivals
    return {
        "arrivals": asdict(arrivals)
        if isinstance(arrivals, Renewal)
        else {"trace": len(arrivals.arrivals), "rate": arrivals.rate},
        "budgets": [{"budget": _finite(one.budget), "weight": one.weight} for one in plan.budgets],
        "duration": plan.duration,
        "warmup": plan.warmup,
        "seed": plan.seed,
        "images": len(plan.samples),
        "options": {
            name: value.total_seconds() if isinstance(value, timedelta) else value
            for name, value in plan.options.items()
            if value is not None
        },
        "deadline_only": plan.deadline_only,
        "grace": plan.grace,
        "connections": plan.connections,
        "processes": plan.processes,
        "protocol": "oip" if plan.oip else "tome",
        "oip": asdict(plan.oip) if plan.oip else None,
    }


def write_requests(file: Path, outcomes: Iterable[Outcome]) -> None:
    """Writes a CSV line for each request, in the order they were meant to be sent. Durations are in seconds.

    A request without a deadline has no budget, and nothing in the column that says whether it was attained.

    Raises:
        OSError: The file cannot be written.
    """
    # Names of files may have any encoding.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, restval="", extrasaction="raise")
        writer.writeheader()
        for one in sorted(outcomes, key=lambda outcome: outcome.at):
            fields = asdict(one)
            merging, timing = fields.pop("merging") or {}, fields.pop("timing") or {}
            row = {**fields, **merging, **timing, "budget": _finite(one.budget)}
            row["attained"] = one.attained if one.has_deadline else None
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _finite(budget: float) -> float | None:
    return budget if math.isfinite(budget) else None


def _cell(value: object) -> object:
    return f"{value:.6f}" if isinstance(value, float) else value
