from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from tests.client.load.outcomes import PLAN, answered, failed, result
from tome_client import PredictOptions
from tome_client.load import Arrival, Criterion, LoadPlan, LoadResult, Trace, parse_budgets, search_rate, summarize
from tome_client.load.record import plan_fields, run_fields, search_fields, write_requests


def test_a_run_is_json_with_what_was_asked_for_and_the_figures() -> None:
    run = result([answered(right=True), failed(reason="EXPIRED")])
    fields = json.loads(json.dumps(run_fields(run, summarize(run)), allow_nan=False))
    assert (fields["model"], fields["policy"]) == ("fashion", "floor")
    assert fields["plan"]["arrivals"] == {"rate": 10, "cv2": 1.0}
    assert fields["plan"]["budgets"] == [{"budget": 0.1, "weight": 1.0}]
    assert fields["summary"]["total"]["attainment"]["share"] == 0.5
    assert fields["summary"]["verdict"]["least_sent"] == 662


def test_a_request_without_a_deadline_has_no_budget(tmp_path: Path) -> None:
    plan = replace(PLAN, budgets=parse_budgets("mix:50ms,none=2"))
    assert plan_fields(plan)["budgets"] == [{"budget": 0.05, "weight": 1.0}, {"budget": None, "weight": 2.0}]
    write_requests(tmp_path / "requests.csv", [answered(budget=math.inf)])
    with (tmp_path / "requests.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["budget"], row["attained"], row["code"]) == ("", "", "OK")


def test_a_plan_names_the_options_that_were_given() -> None:
    options = PredictOptions(model="m", r=None, min_quality=0.9, budget=timedelta(seconds=1))
    fields = plan_fields(replace(PLAN, options=options, arrivals=Trace((Arrival(1, 0.5),))))
    assert fields["options"] == {"model": "m", "min_quality": 0.9, "budget": 1.0}
    assert fields["arrivals"]["trace"] == 1


async def test_a_search_is_json_with_its_best_run() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        return result([answered() if plan.arrivals.rate < 15 else failed()])

    found = await search_rate(PLAN, Criterion("attainment", 1.0), run)
    fields = json.loads(json.dumps(search_fields(found), allow_nan=False))
    assert fields["rate"] == found.rate
    assert fields["probes"][0]["passed"]
    assert fields["run"]["summary"]["total"]["answered"] == 1


def test_requests_are_lines_in_the_order_of_sending(tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.csv", [failed(at=2.0, reason="EXPIRED"), answered(at=1.0, r=8, lag=0.001)])
    with (tmp_path / "requests.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["at"], first["lag"], first["latency"], first["budget"]) == (
        "1.000000",
        "0.001000",
        "0.050000",
        "0.100000",
    )
    assert (first["code"], first["attained"], first["r"], first["tokens_out"], first["queue"]) == (
        "OK",
        "True",
        "8",
        "104",
        "0.002000",
    )
    assert (second["code"], second["reason"], second["r"], second["slack"]) == ("DEADLINE_EXCEEDED", "EXPIRED", "", "")
