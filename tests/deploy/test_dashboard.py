"""The Grafana dashboard: current with its code, of Grafana's own types, and about series that exist."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.deploy.promql import SERVED, selected
from tests.deploy.test_rules import RECORDED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/grafana"
BOARD = json.loads((FOLDER / "dashboards/tome-serving.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target["expr"]) for panel in PANELS for target in panel["targets"]]
NAMES = [f"{panel['title']}-{target['refId']}" for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", FOLDER / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_current(code: ModuleType) -> None:
    assert (FOLDER / "dashboards/tome-serving.json").read_text() == code.rendered(), "run: make reference"


@pytest.mark.parametrize(("panel", "expression"), QUERIES, ids=NAMES)
def test_a_query_reads_series_that_exist_of_what_was_chosen_and_its_panel_says_so(
    panel: dict[str, Any], expression: str
) -> None:
    for series, selectors in selected(expression).items():
        assert series in SERVED | RECORDED.keys()
        assert f"`{series}`" in panel["description"].split("Reads ")[1]
        if series == "tome:slo:objective":
            continue
        for selector in selectors:
            chosen = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            assert chosen.pop("job") == "$job"
            assert chosen.pop("model", None) == (None if "requests_pending" in series else "$model")
            assert chosen in ({}, {"promise": "kept"} if series == "tome_latency_promises_total" else {})


def test_panels_have_a_title_a_text_and_a_place_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in BOARD["panels"]:
        where = panel["gridPos"]
        cells = {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["title"]
        assert len(panel["description"].split("\n\nReads ")[0]) > 20
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_data_source_servers_and_models_can_be_chosen() -> None:
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "model"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("job", "model"):
        query = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables[name]["query"])
        assert query is not None
        assert query[1] in SERVED
        assert query[2] == name


def test_what_was_promised_is_shown() -> None:
    shown = {series for _, expression in QUERIES for series in selected(expression)}
    promised = ("merge_r_bucket", "speedup_ratio_bucket", "flops_saved_total", "tokens_merged_total")
    for series in (*promised, "halved_batches_total"):
        assert f"tome_{series}" in shown
    (heat,) = (panel for panel in PANELS if panel["type"] == "heatmap")
    assert heat["targets"][0]["format"] == "heatmap"


def test_grafana_s_own_types_fit(tmp_path: Path) -> None:
    tools = ROOT / ".venv/grafana/node_modules"
    if not (tools / ".bin/tsc").exists():
        pytest.skip("needs Grafana's types: make .venv/grafana, where npm or pip can reach their registry")
    (tmp_path / "node_modules").symlink_to(tools)
    check = tmp_path / "check.ts"

    def errors(board: object) -> str:
        check.write_text(f"{(FOLDER / 'types.ts').read_text()}\nexport const board: Board = {json.dumps(board)}\n")
        command = [tools / ".bin/tsc", "--noEmit", "--strict", "--module", "esnext", "--moduleResolution", "bundler"]
        return subprocess.run([*command, check], capture_output=True, text=True, check=False).stdout

    assert errors(BOARD) == ""
    # The types refuse what is wrong: a member that no enumeration has, and an option that no panel of the kind has.
    for wrong in ('"mode": "scheme"', '"calculate": false'):
        text = json.dumps(BOARD)
        assert wrong in text
        assert "error TS" in errors(json.loads(text.replace(wrong, wrong.replace('": ', 'x": '))))


def test_provisioning_reads_the_dashboard_and_asks_as_often_as_is_scraped() -> None:
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/tome-serving.yml").read_text())["providers"]
    assert provider["type"] == "file"
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", scraped)
