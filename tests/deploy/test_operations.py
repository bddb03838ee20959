"""docs/operations.md has what an operator looks for: each alert, and places that exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import CHART, ROOT
from tests.deploy.promql import SERVED
from tome_server.config.server import ServerConfig

PAGE = ROOT / "docs/operations.md"
TEXT = PAGE.read_text()
GROUPS = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
SECTIONS = dict(re.findall(r"^### (Tome\w+)\n\n(.+?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Return what can be linked to on a page, as headings are turned into links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    named = re.findall(r'<a id="([\w-]+)">', page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | {*named}


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    assert SECTIONS.keys() == ALERTS.keys()


@pytest.mark.parametrize("name", ALERTS)
def test_an_alerts_section_says_how_urgent_it_is_and_what_to_do(name: str) -> None:
    severity = {"page": "**Page.**", "ticket": "**Ticket.**"}[ALERTS[name]["labels"]["severity"]]
    assert SECTIONS[name].startswith(severity)
    assert len(SECTIONS[name].split()) > 30
    page, _, anchor = ALERTS[name]["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == PAGE
    assert anchor in anchors(PAGE)


def test_series_and_records_that_the_page_names_exist() -> None:
    records = {rule["record"] for rule in RULES if "record" in rule}
    named = set(re.findall(r"\btome:[\w:]+|\btome_\w+_(?:total|seconds|ratio|bucket|count|sum)\b", TEXT))
    assert named
    assert named <= records | SERVED


def test_values_that_the_page_names_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    named = re.findall(
        r"`((?:autoscaling|hub|profiles|auth|networkPolicy|grpcRoute|kserve|monitoring|startup)\.[\w.]+)`",
        TEXT.partition("## Every setting")[0],
    )
    assert len(named) > 10
    for name in named:
        found = values
        for step in name.split("."):
            found = found[step]


def test_commands_set_values_that_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    settings = ServerConfig.model_fields
    commands = re.findall(r"(?:--set |set_values\s)([\w.]+=[^\s`\"]+)", TEXT)
    assert len(commands) > 8
    for name in (assignment.partition("=")[0] for command in commands for assignment in command.split(",")):
        first, _, rest = name.partition(".")
        if first == "config":
            assert rest in settings, name
        else:
            found: Any = values
            for step in name.split("."):
                assert step in found, name
                found = found[step]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alerts_steps_never_part_the_cluster_from_the_release(name: str) -> None:
    """Helm 3 undoes what `kubectl scale` has done, Helm 4 refuses to go on; a rollback resets the number of pods."""
    assert not re.search(r"kubectl (scale|edit|patch|set)|helm rollback", SECTIONS[name])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_links_lead_somewhere(link: str) -> None:
    path, _, anchor = link.partition("#")
    page = PAGE.parent / path if path else PAGE
    assert page.exists(), f"there is no {page.relative_to(ROOT)}"
    if anchor:
        assert anchor in anchors(page)
