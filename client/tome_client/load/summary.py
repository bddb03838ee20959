"""The figures of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tome_client.load.early_stopping import enough, least_sent
from tome_client.load.outcome import LoadResult, Outcome

# MLPerf Inference's Server scenario: this share of the requests must be in time, with this confidence.
PERCENTILE = 0.99
CONFIDENCE = 0.99

# The generator's lag, at the 99th percentile, may not exceed either: it is part of the latencies that are measured.
_MOST_LAG = 0.005
_MOST_LAG_SHARE = 0.1

# Of the standard normal distribution, for intervals of 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Share:
    """A share, with its confidence interval."""

    count: int
    of: int
    share: float
    low: float
    """The lower end of the 95 % confidence interval; `high` is the upper."""
    high: float


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution of durations, in seconds. The p-th percentile is the least duration that p % do not exceed."""

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True)
class Group:
    """All requests, or those of one budget."""

    budget: float | None
    """Seconds, infinite for the requests without a deadline; None of all together."""
    sent: int
    answered: int
    """Requests that were answered, late or not."""
    attainment: Share
    """Of the requests with a deadline: those answered within their budget, from when they were meant to be sent."""
    goodput: float
    """Requests a second that were answered within their budget; those without a deadline do not count."""
    latency: Percentiles | None
    """Of the answers, from when the requests were meant to be sent; None without answers."""
    mean_r: float | None
    """Over all answers that say how much was merged; None without such answers, like the next two."""
    tokens_saved: float | None
    """Share of the tokens entering the first block that were merged away by the last, over all answers."""
    flops_saved: float | None
    """Share of the unmerged model's operations that was saved, over all answers."""
    effective_accuracy: float | None
    """Share of all sent that were answered in time with the right label; None without labels. An answer to a request
    without a deadline is in time."""
    answered_accuracy: float | None
    """Share of the answered with the right label, late or not; None without labels or answers."""

    @property
    def unmerged(self) -> bool:
        """Whether there were answers and none said how much was merged, as with most servers that are not ours."""
        return self.answered > 0 and self.mean_r is None


@dataclass(frozen=True, slots=True)
class Ending:
    """How some of the requests ended."""

    code: str
    reason: str | None
    """The reason that the server gave beside the code."""
    count: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the run shows that 99 % of requests are answered in time, which MLPerf's Server scenario requires."""

    valid: bool
    missed: int
    """Requests that were late or failed."""
    least_sent: int
    """How many requests had to be sent for 99 % confidence, given the number missed."""
    reasons: tuple[str, ...]
    """Why it is not valid; empty if it is."""


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A run in figures."""

    duration: float
    """Seconds measured."""
    rate: float
    """Requests sent in a second."""
    total: Group
    budgets: tuple[Group, ...]
    """By budget, the smallest first."""
    endings: tuple[Ending, ...]
    """The most frequent first."""
    lag: Percentiles | None
    """How late the generator sent requests, in the process that was latest; None if it sent none."""
    most_lag: float
    """Seconds that the 99th percentile of `lag` must not exceed: 5 ms, or a tenth of the smallest budget."""
    kept_schedule: bool
    """Whether `lag` keeps to that."""
    stopped: bool
    """Whether the run was ended early."""
    verdict: Verdict


def summarize(result: LoadResult) -> LoadSummary:
    """Returns a run's figures."""
    outcomes = result.outcomes
    budgets = sorted({one.budget for one in outcomes})
    total = _group(None, outcomes, result.duration)
    lag = _worst_lag(outcomes)
    most_lag = min(_MOST_LAG, _MOST_LAG_SHARE * budgets[0]) if budgets else _MOST_LAG
    kept_schedule = lag is None or lag.p99 <= most_lag
    return LoadSummary(
        duration=result.duration,
        rate=len(outcomes) / result.duration if result.duration else 0.0,
        total=total,
        budgets=tuple(
            _group(budget, [one for one in outcomes if one.budget == budget], result.duration) for budget in budgets
        ),
        endings=tuple(
            Ending(code, reason, count)
            for (code, reason), count in Counter((one.code, one.reason) for one in outcomes).most_common()
        ),
        lag=lag,
        most_lag=most_lag,
        kept_schedule=kept_schedule,
        stopped=result.stopped,
        verdict=_verdict(total, kept_schedule=kept_schedule, stopped=result.stopped),
    )


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Returns the distribution of durations; None if there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p99, p999 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99, 0.999))
    return Percentiles(sum(ordered) / len(ordered), p50, p90, p99, p999, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """Returns the least of ascending values that `share` of them do not exceed (the nearest rank)."""
    # 0.99 of 1,000 values are 990; in floating point the product is a little more.
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def wilson(count: int, of: int) -> Share:
    """Returns a share with its 95 % confidence interval: Wilson's score interval (J. Am. Stat. Assoc. 22, 1927)."""
    if of == 0:
        return Share(0, 0, 0.0, 0.0, 1.0)
    share = count / of
    spread = _Z * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    middle, scale = share + _Z**2 / (2 * of), 1 + _Z**2 / of
    return Share(count, of, share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def _worst_lag(outcomes: Sequence[Outcome]) -> Percentiles | None:
    """Returns the lag of the process whose 99th percentile is the largest. All requests together would hide it."""
    lags: dict[int, list[float]] = {}
    for one in outcomes:
        lags.setdefault(one.process, []).append(one.lag)
    spreads = [spread for some in lags.values() if (spread := percentiles(some))]
    return max(spreads, key=lambda spread: spread.p99, default=None)


def _group(budget: float | None, outcomes: Sequence[Outcome], duration: float) -> Group:
    judged_by_time = [one for one in outcomes if one.has_deadline]
    attained = [one for one in judged_by_time if one.attained]
    mergings = [one.merging for one in outcomes if one.merging]
    labelled = [one for one in outcomes if one.right is not None]
    judged = [one for one in labelled if one.answered]
    tokens_in = sum(one.tokens_in for one in mergings)
    tokens_out = sum(one.tokens_out for one in mergings)
    done, saved = sum(one.flops for one in mergings), sum(one.flops_saved for one in mergings)
    return Group(
        budget=budget,
        sent=len(outcomes),
        answered=sum(one.answered for one in outcomes),
        attainment=wilson(len(attained), len(judged_by_time)),
        goodput=len(attained) / duration if duration else 0.0,
        latency=percentiles([one.latency for one in outcomes if one.answered]),
        mean_r=_ratio(sum(one.r for one in mergings), len(mergings)),
        tokens_saved=_ratio(tokens_in - tokens_out, tokens_in),
        flops_saved=_ratio(saved, done + saved),
        effective_accuracy=_ratio(sum(bool(one.right) and one.attained for one in labelled), len(labelled)),
        answered_accuracy=_ratio(sum(bool(one.right) for one in judged), len(judged)),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _verdict(total: Group, *, kept_schedule: bool, stopped: bool) -> Verdict:
    with_deadline = total.attainment.of
    missed = with_deadline - total.attainment.count
    needed = least_sent(missed, percentile=PERCENTILE, confidence=CONFIDENCE)
    reasons = []
    if stopped:
        reasons.append("the run was stopped early")
    if not kept_schedule:
        reasons.append("the load generator did not keep its schedule")
    if total.sent and not with_deadline:
        reasons.append("no request had a deadline")
    elif missed > (1 - PERCENTILE) * with_deadline:
        reasons.append(f"{missed / with_deadline:.2%} missed their budget, and 1 % may")
    elif not enough(with_deadline, missed, percentile=PERCENTILE, confidence=CONFIDENCE):
        sent = f"{with_deadline} were sent" if with_deadline == total.sent else f"{with_deadline} had a deadline"
        reasons.append(f"too few requests to tell: with {missed} missed {needed} are needed, and {sent}")
    return Verdict(not reasons, missed, needed, tuple(reasons))
