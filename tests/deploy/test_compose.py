"""The local stack: a file that Compose takes, whose parts fit the image, the server and what they mount."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.deploy.chart import ROOT
from tome_api.durations import parse_duration
from tome_server.config.server import ServerConfig

FILE = ROOT / "deploy/compose.yaml"
TEXT = FILE.read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def mounts(service: str) -> dict[str, str]:
    """Return what lies where in a service's container."""
    pairs = (volume.split(":")[:2] for volume in SERVICES[service]["volumes"])
    return {inside: outside for outside, inside in pairs}


def test_compose_takes_the_file() -> None:
    PyCompose.from_yaml(TEXT).validate()


def test_what_compose_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_grace"):
        PyCompose.from_yaml(TEXT.replace("stop_grace_period", "stop_grace"))


def test_what_is_mounted_from_here_is_here() -> None:
    sources = [Path(source) for name in SERVICES for source in mounts(name).values() if source.startswith(".")]
    assert len(sources) >= 4
    for source in sources:
        assert (FILE.parent / source).exists(), source


def test_the_server_is_the_images() -> None:
    server = SERVICES["server"]
    config = ServerConfig()
    inside = [int(port.rpartition(":")[2]) for port in server["ports"]]
    assert inside == [int(str(address).rpartition(":")[2]) for address in (config.listen, config.metrics)]
    assert set(server["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert mounts("server").keys() == set(re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE))
    grace = parse_duration(server["stop_grace_period"])
    assert isinstance(grace, float)
    assert grace >= config.drain_timeout + 5


def test_nothing_listens_beyond_this_machine() -> None:
    for service in SERVICES.values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")


def test_prometheus_finds_the_server_and_grafana_finds_prometheus() -> None:
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    (targets,) = job["file_sd_configs"][0]["files"]
    folder = Path("/etc/prometheus")
    assert SERVICES["prometheus"]["configs"] == [{"source": "targets", "target": str(folder / targets)}]
    (group,) = yaml.safe_load(yaml.safe_load(TEXT)["configs"]["targets"]["content"])
    (address,) = group["targets"]
    name, _, port = address.partition(":")
    assert SERVICES[name]["ports"][1].endswith(f":{port}")
    for rules in configuration["rule_files"]:
        assert str(folder / rules) in mounts("prometheus")

    provisioning = ROOT / "deploy/grafana/provisioning"
    (datasource,) = yaml.safe_load(next(provisioning.glob("datasources/*.y*ml")).read_text())["datasources"]
    name, port = re.fullmatch(r"http://(\w+):(\d+)", datasource["url"]).groups()  # type: ignore[union-attr]
    assert SERVICES[name]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load(next(provisioning.glob("dashboards/*.y*ml")).read_text())["providers"]
    assert provider["options"]["path"] in mounts("grafana")
