"""`tome-server demo` as its first reader runs it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_proxy import HttpProxy, running_proxy
from tome_server.cli import demo


@pytest.fixture(scope="module")
def proxy() -> Iterator[HttpProxy]:
    with running_proxy() as running:
        yield running


@pytest.fixture(scope="module")
def report(proxy: HttpProxy) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tome_server", "demo", "--json"],
        env=proxy.environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tome-server demo: starting a server" in done.stderr
    assert "tome-server demo: ready after " in done.stderr
    return json.loads(done.stdout)


def test_every_sample_is_shown_unmerged_and_merged(report: dict[str, Any], samples: dict[Path, str]) -> None:
    rows = report["rows"]
    rs = sorted({row["r"] for row in rows})
    assert rs[0] == 0
    assert len(rs) == 3
    shown = [(row["image"], row["label"], row["r"]) for row in rows]
    assert sorted(shown) == sorted((file.name, label, r) for file, label in samples.items() for r in rs)


def test_merging_saves_work_and_most_predictions_stay_right(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["tokens_in"] == 197
        assert (row["tokens_out"] == 197) == (row["r"] == 0)
        assert (row["flops_saved"] > 0) == (row["r"] > 0)
        assert row["latency_ms"] > 0
        assert 0 < row["score"] <= 1
    for r in {row["r"] for row in report["rows"]}:
        right = [row["prediction"] == row["label"] for row in report["rows"] if row["r"] == r]
        assert sum(right) >= 0.7 * len(right)


def test_streams_are_measured_at_every_r(report: dict[str, Any], samples: dict[Path, str]) -> None:
    assert [stream["r"] for stream in report["streams"]] == sorted({row["r"] for row in report["rows"]})
    for stream in report["streams"]:
        assert stream["images"] > 0
        assert stream["images"] % len(samples) == 0
        assert stream["images_per_second"] > 0


def test_the_less_time_there_is_the_more_is_merged_or_refused(report: dict[str, Any], samples: dict[Path, str]) -> None:
    deadlines = report["deadlines"]
    budgets = [race["budget_ms"] for race in deadlines]
    assert budgets == sorted(budgets, reverse=True)
    assert len(budgets) == 3
    for race in deadlines:
        assert race["images"] == report["streams"][0]["images"]
        assert race["answered"] + race["refused"] == race["images"]
        assert (race["mean_r"] is None) == (race["answered"] == 0)
        assert (race["flops_saved"] > 0) == bool(race["mean_r"])
    # The machine may do anything meanwhile; but that the least time left nothing to do would be strange.
    ample, *_, least = deadlines
    assert least["refused"] > 0 or least["mean_r"] > ample["mean_r"]


def test_the_counters_agree_with_what_is_shown(report: dict[str, Any]) -> None:
    rows, deadlines, metrics = report["rows"], report["deadlines"], report["metrics"]
    # Streams report a total; an image at the same r costs what its row says.
    cost = {row["r"]: row for row in rows}
    shown = rows + [cost[stream["r"]] for stream in report["streams"] for _ in range(stream["images"])]
    dense = rows[0]["flops"] + rows[0]["flops_saved"]
    answered = len(shown) + sum(race["answered"] for race in deadlines)
    saved = sum(row["flops_saved"] for row in shown) + sum(race["flops_saved"] for race in deadlines)
    assert report["counters_agree"] is True
    assert metrics["tome_requests_total"] == len(shown) + sum(race["images"] for race in deadlines)
    assert metrics["tome_tokens_input_total"] == 197 * answered
    assert metrics["tome_flops_saved_total"] == saved
    assert metrics["tome_flops_total"] == answered * dense - saved
    # What each r merges away of the images that were given a deadline isn't shown.
    merged = sum(row["tokens_in"] - row["tokens_out"] for row in shown)
    assert metrics["tome_tokens_merged_total"] >= merged
    assert metrics.keys() == {
        "tome_requests_total",
        "tome_tokens_input_total",
        "tome_tokens_merged_total",
        "tome_flops_total",
        "tome_flops_saved_total",
    }


def test_a_proxy_of_the_environment_is_not_asked_for_what_is_on_this_machine(
    report: dict[str, Any], proxy: HttpProxy
) -> None:
    assert report["rows"]
    assert not proxy.asked


STUB = """#!{python}
import json, pathlib, sys, time
print(json.dumps({{"level": "info", "event": "measuring how fast fashion is"}}), file=sys.stderr, flush=True)
while not pathlib.Path({told!r}).exists():
    time.sleep(0.01)
print(json.dumps({{"ready": {{"seconds": 1.0}}}}), flush=True)
time.sleep(600)
"""


def test_a_server_that_takes_long_is_waited_for_and_what_it_does_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told, stub, said = tmp_path / "told", tmp_path / "stub", []
    stub.write_text(STUB.format(python=sys.executable, told=str(told)))
    stub.chmod(0o755)

    def tell(what: str) -> None:
        said.append(what)
        if "measuring" in what:
            told.touch()

    monkeypatch.setattr(demo, "_tell", tell)
    monkeypatch.setattr(demo, "REPORT_EVERY", 0.05)
    monkeypatch.setattr(sys, "executable", str(stub))
    server = demo._server()
    assert server.__enter__() == {"seconds": 1.0}
    assert "waiting for the server, 0 s so far; it says: measuring how fast fashion is" in said
    with pytest.raises(demo._DemoError, match="stopped with status -15: it said nothing"):
        server.__exit__(None, None, None)


def test_a_server_that_does_not_start_is_quoted_without_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "stub"
    stub.write_text(
        f"#!{sys.executable}\nimport sys\n"
        """sys.exit('{"level": "info", "event": "loading fashion"}\\ntome-server: no memory is left')"""
    )
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    with pytest.raises(demo._DemoError, match=r"^the server did not start: tome-server: no memory is left$"):
        demo._server().__enter__()
