"""Recording rules and alerts: right on made-up series, and about series that exist."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import SERVED, selected
from tome_server.observability.metrics import Missed, Rejected

FOLDER = Path(__file__).parents[2] / "deploy/prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def promtool(*arguments: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool: apt-get install -y --no-install-recommends prometheus")
    done = subprocess.run([tool, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_rules_and_alerts_do_what_their_unit_tests_say() -> None:
    promtool("test", "rules", "rules_test.yml")


@pytest.mark.parametrize("name", [*RECORDED, *ALERTS])
def test_a_rule_reads_series_that_are_served_or_recorded(name: str) -> None:
    expression = RECORDED.get(name) or ALERTS[name]["expr"]
    for series, selectors in selected(expression).items():
        assert series in SERVED | RECORDED.keys() | {"up"}
        for matcher in (matcher for selector in selectors for matcher in selector.matchers.matchers):
            assert matcher.name in ("reason", "job", "policy")
            if matcher.name == "reason":
                assert matcher.value in set({"tome_slo_missed_total": Missed, "tome_rejected_total": Rejected}[series])


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS.keys())
def test_an_alert_says_how_bad_it_is_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"


def test_every_alert_is_seen_to_fire_and_not_to_fire() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test.get("alert_rule_test", ())]
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == ALERTS.keys()
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == ALERTS.keys()


def test_burn_rates_are_of_one_objective() -> None:
    for name in ("TomeErrorBudgetBurnFast", "TomeErrorBudgetBurnSlow"):
        assert len(selected(ALERTS[name]["expr"])["tome:slo:objective"]) == 4
