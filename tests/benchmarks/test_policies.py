import json
from pathlib import Path

import pytest
from benchmarks import policies
from benchmarks.policies import DEFAULT, LOADS, Cell, Device, Row, Run, decision_microseconds, means_table, run_cell

from tome_server.scheduling.profile import Profile

RS = (0, 8)


def device() -> Device:
    p50 = ((0.012, 0.007), (0.042, 0.022))
    return Device("small", Profile((1, 4), RS, p50, p50), (90.0, 80.0), slo=0.2, seconds=5.0)


def test_every_policy_serves_the_same_requests_and_none_beats_the_bound() -> None:
    cell = Cell("small", 1.2, 4, True)
    again, runs, bound = run_cell((cell, device(), 100))
    assert again == cell
    assert list(runs) == list(device().policies)
    assert runs["r=0"].mean_r == 0
    assert runs["r_max"].mean_r == 8
    assert all(run.accuracy <= bound + 0.2 for run in runs.values())
    assert run_cell((cell, device(), 100)) == (again, runs, bound)


def row(*differences: float) -> Row:
    """A cell in which the default is so far ahead of one other, seed by seed."""
    runs = {
        DEFAULT: [Run(80.0 + ahead, 99.0, 4.0, 0.0) for ahead in differences],
        "plain r=0": [Run(20.0, 25.0, 0.0, 0.0)] * len(differences),
        "r=0": [Run(40.0, 50.0, 0.0, 0.0)] * len(differences),
        "r_max": [Run(80.0, 99.0, 8.0, 0.0)] * len(differences),
    }
    return Row(Cell("small", 1.2, 4, True), runs, [90.0] * len(differences))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [((0.5, 0.3), "first"), ((-0.5, 0.4), "noise"), ((-0.2, -0.21), "near"), ((-0.5, -0.51), "BEHIND")],
)
def test_the_verdict_heeds_noise_seed_by_seed(differences: tuple[float, ...], verdict: str) -> None:
    assert row(*differences).first == "r_max"
    assert row(*differences).verdict == verdict


def test_the_document_is_drawn_and_tabulated(tmp_path: Path) -> None:
    rows = [Row(Cell("small", load, 1, False), row(0.5, 0.3).runs, [90.0, 90.0]) for load in LOADS]
    document = json.loads(json.dumps(policies._document(rows, [(100, 80.0, 100.0)], 1.0)))
    assert document["cells"][0]["policies"][DEFAULT]["effective_accuracy"] == [80.4, 0.1]
    assert means_table(document)[2] == "| small, 55% | 80.4 | 20.0 | 40.0 | 80.0 | 90.0 |"
    pytest.importorskip("matplotlib")
    policies.draw(document, tmp_path / "policies.svg")
    assert "<svg" in (tmp_path / "policies.svg").read_text()


def test_decisions_are_timed() -> None:
    assert decision_microseconds(20, decisions=5) > 0
