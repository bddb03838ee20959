"""Runs helm 3 and helm 4 on the chart, and takes apart what they render."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/tome-serving"
RELEASE, NAMESPACE, FULL = "demo", "vision", "demo-tome-serving"

Manifest = dict[str, Any]
Values = dict[str, Any]

# Everything that the chart can make, at once.
EVERYTHING: Values = {
    "auth": {"secretName": "tokens"},
    "autoscaling": {"kind": "keda", "keda": {"authenticationRef": "prometheus"}},
    "grpcRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["vision.example"]},
    "hub": {"enabled": True, "existingClaim": "hub"},
    "imagePullSecrets": [{"name": "registry"}],
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"team": "vision"}},
        "prometheusRule": {"enabled": True, "labels": {"team": "vision"}},
        "dashboard": {"enabled": True},
    },
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "shop"}}}],
        "scrapers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "egress": [{"ports": [{"port": 4317, "protocol": "TCP"}]}],
    },
    "nodeSelector": {"pool": "vision"},
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "profiles": {"create": True, "storageClassName": "shared"},
    "modelsVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    "args": ["--log-level", "debug"],
}  # fmt: skip


@functools.cache
def helms() -> tuple[Path, ...]:
    """Return the helms that `make` put beside Python, or those on the PATH."""
    beside = Path(sys.executable).parent
    found = [
        Path(helm) for name in ("helm3", "helm4") if (helm := shutil.which(name, path=beside) or shutil.which(name))
    ]
    if len(found) < 2:
        say = f"of helm 3 and helm 4 there are {len(found)}; run `make .venv/bin/helm3 .venv/bin/helm4`"
        assert "CI" not in os.environ, say
        if not found:
            pytest.skip(say, allow_module_level=True)
    return tuple(found)


def run(helm: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one helm."""
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=False)


def options(values: str, files: tuple[str, ...]) -> list[str]:
    """Return the options that give helm values files of the chart, and `values` on top."""
    return [*(word for name in files for word in ("-f", str(CHART / name))), "-f", values]


@functools.cache
def _template(helm: Path, values: str, files: tuple[str, ...], release: str) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        return run(helm, "template", release, CHART, "--namespace", NAMESPACE, *options(file.name, files))


def said(stderr: str) -> str:
    """Return what helm says against values, in helm 3's form: helm 4 writes paths and unknown names in another."""
    dotted = re.sub(r"'/([\w/]+)'", lambda path: path[1].replace("/", "."), stderr)
    missing = re.sub(r"missing propert\w+ (.+)", lambda names: re.sub(r"'(\w+)'", r"\1 is required", names[1]), dotted)
    return re.sub(r"additional properties '(\w+)' not allowed", r"Additional property \1 is not allowed", missing)


def refusals(values: Values, *files: str, release: str = RELEASE) -> list[str]:
    """Return what each helm says of values that it must refuse."""
    answers = [_template(helm, json.dumps(values), files, release) for helm in helms()]
    for done in answers:
        assert done.returncode != 0, "helm rendered what it must refuse"
    return [said(done.stderr) for done in answers]


def text(values: Values | None = None, *files: str, release: str = RELEASE) -> str:
    """Return what helm 3 and helm 4 render alike, with values files of the chart and `values` on top."""
    answers = [_template(helm, json.dumps(values or {}), files, release) for helm in helms()]
    for done in answers:
        assert done.returncode == 0, done.stderr
    assert len({done.stdout.strip() for done in answers}) == 1, "helm 3 and helm 4 render the chart differently"
    return answers[0].stdout


def render(values: Values | None = None, *files: str, release: str = RELEASE) -> list[Manifest]:
    """Render the chart with values files of its own, and `values` on top."""
    return parsed(text(values, *files, release=release))


def parsed(manifests: str) -> list[Manifest]:
    """Return the manifests of a rendered chart."""
    return [manifest for manifest in yaml.safe_load_all(manifests) if manifest]


def the(kind: str, manifests: list[Manifest], suffix: str = "") -> Manifest:
    """Return the one manifest of a kind."""
    found = [one for one in manifests if one["kind"] == kind and one["metadata"]["name"] == FULL + suffix]
    assert len(found) == 1, f"{len(found)} of {kind} {FULL}{suffix}"
    return found[0]


def container(manifests: list[Manifest]) -> Manifest:
    """Return the server's container, be it Deployment's or KServe's."""
    runtimes = [one for one in manifests if one["kind"] == "ServingRuntime"]
    pod = runtimes[0]["spec"] if runtimes else the("Deployment", manifests)["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return dict(only)


def settings_text(manifests: list[Manifest]) -> str:
    """Return the server's configuration file."""
    return str(the("ConfigMap", manifests)["data"]["server.yaml"])
