"""Benchmarks that start processes of their own, once through at their smallest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


def report(module: str, *flags: str) -> Any:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", *flags]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_server_told_to_stop_answers_what_is_in_flight_and_is_measured() -> None:
    told = report("server", "--runs", "1", "--calls", "40", "--", "--threads", "1", "--profile-time", "1s")
    [run] = told["each"]
    assert run["answered"] == 40
    assert 0 < run["in_flight"] <= 40
    assert run["exit_status"] == 0
    # The libraries of a process that runs models are several times as large as the other's.
    assert 0 < 3 * run["front_warm"] < run["device_warm"]
    assert run["stop"] > 0


def test_each_way_to_wait_is_timed_beside_as_many_as_asked_for() -> None:
    told = report("threads", "--rounds", "1", "--batch", "1", "--r", "0,8", "--busy", "0,1", "--calls", "2")
    rows = told["rows"]
    assert [(row["threads"], row["waiting"], row["busy"]) for row in rows if row["r"] == 0] == [
        (1, "asleep", 0), (1, "asleep", 1), (2, "asleep", 0), (2, "asleep", 1), (2, "briefly", 0), (2, "briefly", 1),
    ]  # fmt: skip
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in rows)


def test_a_checkout_is_compared_with_itself() -> None:
    here = str(Path(__file__).parents[2])
    model = ("--model", "vit_tiny_patch16_224", "--batch", "1", "--r", "0,8", "--threads", "1", "--rounds", "2")
    rows = report("versions", "--other", here, *model)["rows"]
    assert [row["r"] for row in rows] == [0, 8]
    assert all(row["other_ms"] > 0 and row["ours_ms"] > 0 and row["speedup"] > 0 for row in rows)


def test_what_a_request_costs_is_measured_at_both_servers_for_each_kind_of_image() -> None:
    told = report("requests", "--rounds", "1", "--calls", "40", "--callers", "4")
    kinds = ["PNG 28x28", "JPEG 224x224", "JPEG 500x375", "pixels 64x64"]
    assert [(cost["kind"], cost["server"]) for cost in told] == [
        (kind, by) for kind in kinds for by in ("bare", "tome")
    ]
    for cost in told:
        assert cost["rate"] > 0
        assert 0 < cost["loop"] < cost["process"]
        assert (cost["models"] > 0) == (cost["server"] == "tome")
