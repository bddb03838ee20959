"""Runs helm on the chart, and takes what it renders apart."""

import functools
import json
import os
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
def binary() -> Path:
    """Return the helm that `make` put beside Python, or one on the PATH."""
    beside = Path(sys.executable).parent / "helm"
    found = beside if beside.exists() else shutil.which("helm")
    if found is None:
        assert "CI" not in os.environ, "there is no helm; run `make .venv/bin/helm`"
        pytest.skip("there is no helm; run `make .venv/bin/helm`")
    return Path(found)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm."""
    return subprocess.run([binary(), *arguments], capture_output=True, text=True, check=False)


@functools.cache
def _template(values: str, files: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        chosen = [argument for name in (*(str(CHART / name) for name in files), file.name) for argument in ("-f", name)]
        return helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *chosen)


def refusal(values: Values) -> str:
    """Return what helm says of values that it must refuse."""
    done = _template(json.dumps(values), ())
    assert done.returncode != 0, "helm rendered what it must refuse"
    return done.stderr


def render(values: Values | None = None, *files: str) -> list[Manifest]:
    """Render the chart with values files of its own, and `values` on top."""
    done = _template(json.dumps(values or {}), files)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


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
