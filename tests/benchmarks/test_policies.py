import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import policies
from benchmarks.devices import devices
from benchmarks.policies import DEFAULT, Cell, Row, Run, decision_microseconds, means_table, run_cell, surface

CELL = Cell("cpu", 3, 1.2, 4, 2)


def test_every_policy_serves_the_same_requests_and_none_beats_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "REQUESTS", 200)
    again, runs, bound = run_cell((CELL, 100))
    assert again == CELL
    assert list(runs) == list(policies.policies(devices()[0]))
    assert runs["r=0"].mean_r == 0
    assert runs["r_max"].mean_r == 16
    assert all(run.accuracy <= bound + 0.2 for run in runs.values())
    assert run_cell((CELL, 100)) == (again, runs, bound)


def test_the_surface_has_every_cell_once_and_its_quick_version_some_of_each() -> None:
    cells, quick = surface(), surface(quick=True)
    assert len(set(cells)) == len(cells) == 6 * 8 * 7 * 3 * 3
    assert len(set(quick)) == len(quick) == 240
    for by in ("device", "k", "load", "cv2", "classes"):
        counts = [sum(getattr(cell, by) == value for cell in quick) for value in {getattr(cell, by) for cell in quick}]
        assert len(set(counts)) == 1


def row(*differences: float) -> Row:
    """A cell in which the default is so far ahead of one other, seed by seed."""
    runs = {
        DEFAULT: [Run(80.0 + ahead, 99.0, 4.0, 2.0) for ahead in differences],
        "plain r=0": [Run(20.0, 25.0, 0.0, 2.0)] * len(differences),
        "r=0": [Run(40.0, 50.0, 0.0, 2.0)] * len(differences),
        "r_max": [Run(80.0, 99.0, 8.0, 2.0)] * len(differences),
    }
    return Row(CELL, runs, [90.0] * len(differences))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [((0.5, 0.3), "first"), ((-1.5, 0.4), "near"), ((-0.2, -0.21), "near"), ((-0.5, -0.51), "BEHIND")],
)
def test_the_verdict_heeds_noise_seed_by_seed(differences: tuple[float, ...], verdict: str) -> None:
    assert row(*differences).first == "r_max"
    assert row(*differences).verdict == verdict


def test_a_cell_in_which_another_leads_is_judged_by_further_seeds_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Cell("gpu", 3, 1.2, 4, 2)
    rows = [row(-0.5, -0.51), replace(row(0.1, 0.1), cell=other)]
    asked = []

    def run(cells: Iterable[Cell], seeds: Iterable[int], _: int) -> list[Row]:
        asked.append((list(cells), list(seeds)))
        return [row(0.4, 0.5, 0.6)]

    monkeypatch.setattr(policies, "run", run)
    doubtful, sound = policies.confirmed(rows, 3, 1)
    assert asked == [([CELL], [202, 203, 204])]
    assert sound is rows[1]
    assert (len(doubtful.bound), doubtful.verdict) == (5, "first")
    assert doubtful.ahead("r_max")[0] == pytest.approx(0.098)


def test_the_document_is_drawn_and_tabulated(tmp_path: Path) -> None:
    rows = [
        Row(Cell("cpu", k, load, 1, 1), row(0.5, 0.3).runs, [90.0, 90.0])
        for k in policies.KS
        for load in policies.LOADS
    ]
    document = json.loads(json.dumps(policies._document(rows, [(100, 80.0, 100.0)], 1.0)))
    assert document["cells"][0]["policies"][DEFAULT]["effective_accuracy"] == [80.4, 0.1]
    assert "behind in 0" in document["summary"][0]
    assert means_table(document, "load")[2] == "| 50% | 80.4 | 20.0 | 40.0 | 80.0 | 90.0 | 0 of 8 |"
    pytest.importorskip("matplotlib")
    policies.draw(document, tmp_path / "policies.svg")
    assert "<svg" in (tmp_path / "policies.svg").read_text()


def test_decisions_are_timed() -> None:
    assert decision_microseconds(20, decisions=5) > 0
