"""Finds the highest rate that a server keeps up with, by short runs."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from tome_client.load.arrivals import Renewal
from tome_client.load.outcome import LoadResult
from tome_client.load.plan import LoadPlan
from tome_client.load.summary import LoadSummary, percentile, summarize

# Enough to double the rate a million times over and still halve what is left to 0.1 %.
_MOST_PROBES = 40

# A run with fewer requests on average shows nothing.
_LEAST_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Criterion:
    """What makes a rate good enough: a percentile of the latency within each budget, or a share of all in time."""

    kind: str
    """"percentile" or "attainment"."""
    share: float
    """In (0, 1]."""

    def __str__(self) -> str:
        return f"p{100 * self.share:g}" if self.kind == "percentile" else f"attainment:{self.share:g}"

    def met(self, result: LoadResult) -> bool:
        """Whether a run is good enough. A request without an answer counts as later than any budget.

        Requests without a deadline do not count.
        """
        outcomes = [one for one in result.outcomes if one.has_deadline]
        if not outcomes:
            return False
        if self.kind == "attainment":
            return sum(one.attained for one in outcomes) >= self.share * len(outcomes)
        latencies: dict[float, list[float]] = {}
        for one in outcomes:
            latencies.setdefault(one.budget, []).append(one.latency if one.answered else math.inf)
        return all(percentile(sorted(some), self.share) <= budget for budget, some in latencies.items())


@dataclass(frozen=True, slots=True)
class Probe:
    """One short run."""

    rate: float
    """Requests a second of the run."""
    passed: bool
    """Whether it met the criterion, by a generator that kept its schedule."""
    summary: LoadSummary


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The highest rate found."""

    criterion: str
    rate: float | None
    """Requests a second; None if not even the lowest rate tried passed."""
    too_high: float | None
    """The lowest rate that failed; None if the search ended before one was found."""
    limited_by: str
    """What limited the rate: "server", "generator" if it could not send that fast, or "search" if no rate failed."""
    stopped: bool
    """Whether it was stopped before it reached its resolution."""
    probes: tuple[Probe, ...]
    best: LoadResult | None
    """The run at `rate`."""


async def search_rate(
    plan: LoadPlan,
    criterion: Criterion,
    run: Callable[[LoadPlan], Awaitable[LoadResult]],
    *,
    resolution: float = 0.05,
    tell: Callable[[Probe], None] | None = None,
) -> SearchResult:
    """Doubles or halves the rate until one passes and one fails, then tries rates between them.

    All runs draw the same gaps, scaled to their rates, so that they differ as little as possible beside the rate.

    Args:
        plan: The plan of each run, but for the rate. Its own rate is the first to be tried.
        criterion: What a rate must meet.
        run: Runs a plan, such as `lambda plan: run_load(target, plan)`.
        resolution: Ends once the failing rate is at most this share above the passing one.
        tell: Called after each run.

    Raises:
        ValueError: The plan's arrivals have no rate to change, no request has a deadline, or the resolution is not
            positive.
        TomeError: A run failed before it began; see run_load.
    """
    rate = _first_rate(plan, resolution)
    lowest = _LEAST_REQUESTS / plan.duration
    probes: list[Probe] = []
    passing: float | None = None
    failing: float | None = None
    best: LoadResult | None = None
    limited_by = "search"
    stopped = False
    for _ in range(_MOST_PROBES):
        result, summary = await _measured(plan, rate, run)
        if result.stopped:
            stopped = True
            break
        probes.append(Probe(rate, criterion.met(result) and summary.kept_schedule, summary))
        if tell:
            tell(probes[-1])
        if probes[-1].passed:
            passing, best = rate, result
        else:
            # If the generator lags, the latencies are not those of the server, whether they are good or bad.
            failing, limited_by = rate, "server" if summary.kept_schedule else "generator"
        following = _next_rate(passing, failing, lowest, resolution)
        if following is None:
            break
        rate = following
    return SearchResult(str(criterion), passing, failing, limited_by, stopped, tuple(probes), best)


def _first_rate(plan: LoadPlan, resolution: float) -> float:
    """Returns the rate to begin with. Raises ValueError for what can't be searched."""
    if not isinstance(plan.arrivals, Renewal):
        raise ValueError(  # noqa: TRY004 # The plan's type is right; its arrivals are not.
            "a trace has its own rate; search with poisson, gamma or constant arrivals"
        )
    if not any(map(math.isfinite, plan.possible_budgets())):
        raise ValueError("a search needs budgets to keep, and no request has a deadline")
    if not resolution > 0:
        raise ValueError(f"a resolution is a share above 0, such as 0.05; got {resolution}")
    return plan.arrivals.rate


def _next_rate(passing: float | None, failing: float | None, lowest: float, resolution: float) -> float | None:
    """Returns the rate to try next; None if the search is done.

    Args:
        passing: The highest rate that passed.
        failing: The lowest rate that failed. One of the two is not None.
        lowest: The rate below which a run has too few requests.
        resolution: How near to each other the two must be, as a share.
    """
    if failing is None:
        assert passing is not None
        return 2 * passing
    if passing is None:
        return None if failing <= lowest else max(lowest, failing / 2)
    return None if failing <= passing * (1 + resolution) else math.sqrt(passing * failing)


async def _measured(
    plan: LoadPlan, rate: float, run: Callable[[LoadPlan], Awaitable[LoadResult]]
) -> tuple[LoadResult, LoadSummary]:
    """Runs a plan at a rate, and once more if the generator lagged: it may have been something else on the machine."""
    assert isinstance(plan.arrivals, Renewal)
    one = replace(plan, arrivals=replace(plan.arrivals, rate=rate))
    result = await run(one)
    summary = summarize(result)
    if not summary.kept_schedule and not result.stopped:
        result = await run(one)
        summary = summarize(result)
    return result, summary


def parse_criterion(text: str) -> Criterion:
    """Returns the criterion that "p99" or "attainment:0.99" stands for.

    Raises:
        ValueError: The text is something else.
    """
    kind, _, number = text.partition(":")
    scale = 1.0
    if kind.startswith("p") and not number:
        kind, number, scale = "percentile", kind[1:], 100.0
    try:
        share = float(number) / scale
    except ValueError:
        share = math.nan
    if kind not in ("percentile", "attainment") or not 0 < share <= 1:
        raise ValueError(f"not a criterion: {text!r}; write p99, or attainment:0.99")
    return Criterion(kind, share)
