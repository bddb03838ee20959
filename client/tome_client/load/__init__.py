"""An open-loop load generator: it sends requests at times fixed beforehand, and records how each ends.

from tome_client.load import LoadPlan, Renewal, event_loop, parse_budgets, read_samples, run_load, summarize

plan = LoadPlan(read_samples(folder), Renewal(rate=40), parse_budgets("100ms"), duration=30, warmup=2)
with asyncio.Runner(loop_factory=event_loop) as runner:
    summary = summarize(runner.run(run_load("localhost:8500", plan)))
print(summary.total.attainment.share, summary.verdict.valid)
"""

from tome_api.durations import BudgetClass, parse_budgets
from tome_api.traces import Arrival
from tome_client.load.arrivals import Arrivals, Renewal, Trace, parse_arrivals, read_trace
from tome_client.load.driver import event_loop, run_load
from tome_client.load.images import Sample, read_samples
from tome_client.load.outcome import LoadResult, Outcome, Progress
from tome_client.load.plan import LoadPlan, OpenInference, PlannedRequest
from tome_client.load.search import Criterion, Probe, SearchResult, parse_criterion, search_rate
from tome_client.load.summary import Group, LoadSummary, Percentiles, Share, Verdict, summarize

__all__ = [
    "Arrival",
    "Arrivals",
    "BudgetClass",
    "Criterion",
    "Group",
    "LoadPlan",
    "LoadResult",
    "LoadSummary",
    "OpenInference",
    "Outcome",
    "Percentiles",
    "PlannedRequest",
    "Probe",
    "Progress",
    "Renewal",
    "Sample",
    "SearchResult",
    "Share",
    "Trace",
    "Verdict",
    "event_loop",
    "parse_arrivals",
    "parse_budgets",
    "parse_criterion",
    "read_samples",
    "read_trace",
    "run_load",
    "search_rate",
    "summarize",
]
