from __future__ import annotations

import math

import pytest

from tests.client.load.outcomes import answered, failed, result
from tome_client.load import summarize
from tome_client.load.summary import Ending, percentile, percentiles, wilson


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_published_one(count: int, of: int, low: float, high: float) -> None:
    share = wilson(count, of)
    assert (share.count, share.of, share.share) == (count, of, count / of)
    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)


def test_nothing_of_nothing_may_be_anything() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(number) for number in range(1, 1001)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 0.999, 1)] == [500, 900, 990, 999, 1000]
    assert [percentile([1, 2, 3], share) for share in (0.0, 0.34, 0.67, 1.0)] == [1, 2, 3, 3]
    spread = percentiles(reversed(values))
    assert (spread.mean, spread.p50, spread.p999, spread.max) == (500.5, 500, 999, 1000)
    assert percentiles([]) is None


def test_in_time_are_the_answers_within_the_budget_and_no_others() -> None:
    summary = summarize(result([answered(latency=0.1), answered(latency=0.101), failed(), failed(code="UNAVAILABLE")]))
    assert (summary.total.sent, summary.total.answered) == (4, 2)
    assert (summary.total.attainment.count, summary.total.attainment.share) == (1, 0.25)
    assert summary.total.goodput == pytest.approx(0.1)
    assert summary.rate == pytest.approx(0.4)
    assert summary.total.latency.max == 0.101


def test_only_requests_with_a_deadline_count_for_attainment_and_verdict() -> None:
    bulk = [answered(budget=math.inf, latency=60, right=True), failed(budget=math.inf, right=False)]
    summary = summarize(result([*bulk, answered(right=True), failed(right=False)]))
    assert (summary.total.sent, summary.total.answered) == (4, 2)
    assert (summary.total.attainment.count, summary.total.attainment.of) == (1, 2)
    assert summary.total.goodput == pytest.approx(0.1)
    assert summary.total.effective_accuracy == 0.5
    assert [group.budget for group in summary.budgets] == [0.1, math.inf]
    assert summary.verdict.missed == 1
    assert summary.kept_schedule
    assert summarize(result(bulk)).verdict.reasons == ("no request had a deadline",)
    many = summarize(result([*[answered()] * 100, *bulk]))
    assert many.verdict.reasons == ("too few requests to tell: with 0 missed 459 are needed, and 100 had a deadline",)


def test_merging_is_averaged_over_the_answers() -> None:
    total = summarize(result([answered(r=0), answered(r=8), failed()])).total
    assert total.mean_r == 4
    assert total.tokens_saved == pytest.approx(96 / 400)
    assert total.flops_saved == pytest.approx(200 / 2000)


def test_late_and_unanswered_requests_are_as_good_as_wrong_ones() -> None:
    outcomes = [answered(right=True), answered(right=True, latency=1), answered(right=False), failed(right=False)]
    total = summarize(result(outcomes)).total
    assert total.effective_accuracy == 0.25
    assert total.answered_accuracy == pytest.approx(2 / 3)


def test_without_labels_there_is_no_accuracy() -> None:
    total = summarize(result([answered(), failed()])).total
    assert (total.effective_accuracy, total.answered_accuracy) == (None, None)


def test_each_budget_has_its_own_figures() -> None:
    outcomes = [answered(budget=0.2, r=0), failed(budget=0.05), answered(budget=0.05, latency=0.01, r=8)]
    tight, loose = summarize(result(outcomes)).budgets
    assert (tight.budget, tight.sent, tight.attainment.share, tight.mean_r) == (0.05, 2, 0.5, 8)
    assert (loose.budget, loose.sent, loose.attainment.share, loose.mean_r) == (0.2, 1, 1.0, 0)


def test_endings_are_counted_by_code_and_reason() -> None:
    outcomes = [answered(), failed(reason="EXPIRED"), failed(reason="INFEASIBLE"), failed(reason="EXPIRED"), failed()]
    assert summarize(result(outcomes)).endings[0] == Ending("DEADLINE_EXCEEDED", "EXPIRED", 2)
    assert set(summarize(result(outcomes)).endings[1:]) == {
        Ending("OK", None, 1),
        Ending("DEADLINE_EXCEEDED", "INFEASIBLE", 1),
        Ending("DEADLINE_EXCEEDED", None, 1),
    }


def test_enough_requests_in_time_are_valid() -> None:
    verdict = summarize(result([answered()] * 661 + [failed()])).verdict
    assert (verdict.valid, verdict.missed, verdict.least_sent, verdict.reasons) == (True, 1, 662, ())


def test_too_few_or_too_late_requests_are_invalid_and_say_why() -> None:
    few = summarize(result([answered()] * 660 + [failed()])).verdict
    assert few.reasons == ("too few requests to tell: with 1 missed 662 are needed, and 661 were sent",)
    late = summarize(result([answered()] * 900 + [answered(latency=1)] * 100)).verdict
    assert late.reasons == ("10.00% missed their budget, and 1 % may",)
    assert not few.valid
    assert not late.valid


def test_a_run_that_was_stopped_is_invalid() -> None:
    assert summarize(result([answered()] * 500, stopped=True)).verdict.reasons == ("the run was stopped early",)


@pytest.mark.parametrize(
    ("budget", "lag", "kept"), [(1, 0.0049, True), (1, 0.0051, False), (0.02, 0.0021, False), (0.02, 0.0019, True)]
)
def test_a_generator_that_lags_makes_the_run_invalid(budget: float, lag: float, kept: bool) -> None:
    outcomes = [answered(budget=budget, latency=0.01)] * 980 + [answered(budget=budget, latency=0.01, lag=lag)] * 20
    summary = summarize(result(outcomes))
    assert summary.kept_schedule is kept
    assert summary.verdict.reasons == (() if kept else ("the load generator did not keep its schedule",))


def test_no_requests_at_all_are_a_summary_too() -> None:
    summary = summarize(result([], duration=0.0, stopped=True))
    assert (summary.rate, summary.total.sent, summary.lag, summary.budgets) == (0.0, 0, None, ())
    assert not summary.verdict.valid
