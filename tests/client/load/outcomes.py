"""Outcomes and results made up for tests."""

from __future__ import annotations

from collections.abc import Iterable

from tests.client.peer import MODEL
from tome_api.v1 import inference_pb2
from tome_client.load import LoadPlan, LoadResult, Outcome, Renewal, Sample, parse_budgets
from tome_client.results import Merging, Timing, model_info

TIMING = Timing(decode=0.001, queue=0.002, compute=0.003, total=0.006, slack=0.01, batch_size=2, predicted=0.003)
PLAN = LoadPlan([Sample("a.png", b"")], Renewal(10), parse_budgets("100ms"), duration=10)


def answered(
    at: float = 0.0,
    latency: float = 0.05,
    *,
    budget: float = 0.1,
    r: int = 4,
    right: bool | None = None,
    lag: float = 0.0,
) -> Outcome:
    merging = Merging(r=r, tokens_in=200, tokens_out=200 - 12 * r, flops=1000 - 25 * r, flops_saved=25 * r)
    return Outcome(at, lag, latency, budget, "a.png", "OK", merging=merging, timing=TIMING, right=right)


def failed(
    at: float = 0.0,
    code: str = "DEADLINE_EXCEEDED",
    reason: str | None = None,
    *,
    budget: float = 0.1,
    right: bool | None = None,
) -> Outcome:
    return Outcome(at, 0.0, 0.01, budget, "a.png", code, reason, right=right)


def result(outcomes: Iterable[Outcome], *, duration: float = 10.0, stopped: bool = False) -> LoadResult:
    model = model_info(inference_pb2.GetModelResponse(model=MODEL))
    return LoadResult(PLAN, model, tuple(outcomes), duration, stopped)
