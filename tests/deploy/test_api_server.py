"""What only an API server can show: upgrades, rollbacks and the runbook's commands, with helm 3 and helm 4.

These tests need an API server that KUBECONFIG names, and kubectl. Each makes a namespace and deletes it again.
No pod has to start and no controller has to run: `kubectl scale` does what an autoscaler does.
"""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import CHART, helms, run

pytestmark = pytest.mark.nightly


def kubectl(*arguments: str) -> str:
    """Run kubectl, which must succeed."""
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, check=True).stdout


@dataclass
class Release:
    """A release in a namespace of its own."""

    helm: Path
    namespace: str
    name: str = "vision"

    @property
    def deployment(self) -> str:
        """The name of its Deployment."""
        return f"{self.name}-tome-serving"

    @property
    def server_side(self) -> bool:
        """Whether this helm applies manifests on the server."""
        return self.helm.name == "helm4"

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run helm in the namespace."""
        return run(self.helm, *arguments, "--namespace", self.namespace)

    def upgrade(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Upgrade as the documentation does: what isn't named stays as it was."""
        return self.command("upgrade", self.name, str(CHART), "--reset-then-reuse-values", *options)

    def pods(self) -> int:
        """Return how many pods the Deployment asks for."""
        found = json.loads(kubectl("get", "deployment", self.deployment, "-n", self.namespace, "-o", "json"))
        return int(found["spec"]["replicas"])

    def autoscale(self, pods: int) -> None:
        """Change the number of pods as an autoscaler does."""
        kubectl("scale", "deployment", self.deployment, "-n", self.namespace, f"--replicas={pods}")

    def image(self) -> str:
        """Return the server's image."""
        found = json.loads(kubectl("get", "deployment", self.deployment, "-n", self.namespace, "-o", "json"))
        return str(found["spec"]["template"]["spec"]["containers"][0]["image"])


def done(result: subprocess.CompletedProcess[str]) -> str:
    """Return what helm printed; it must have succeeded."""
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(params=["3", "4"])
def release(request: pytest.FixtureRequest) -> Iterator[Release]:
    if "KUBECONFIG" not in os.environ:
        pytest.skip("there is no API server to try this on: KUBECONFIG isn't set")
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    found = [helm for helm in helms() if helm.name.endswith(request.param)]
    if not found:
        pytest.skip(f"there is no helm {request.param}; run `make .venv/bin/helm{request.param}`")
    namespace = f"tome-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", namespace)
    try:
        yield Release(found[0], namespace)
    finally:
        kubectl("delete", "namespace", namespace, "--wait=false")


def installed(release: Release, *options: str) -> Release:
    """Install the chart with values."""
    done(release.command("install", release.name, str(CHART), *options))
    return release


AUTOSCALED = ("--set", "autoscaling.kind=hpa,autoscaling.minReplicas=4,autoscaling.maxReplicas=20")


def test_an_autoscaler_is_switched_on_and_off_without_stopping_a_pod(release: Release) -> None:
    installed(release, "--set", "replicas=6")
    assert release.pods() == 6
    done(release.upgrade(*AUTOSCALED))
    assert release.pods() == 6
    release.autoscale(8)
    done(release.upgrade("--set", "config.policy=fixed:8"))
    assert release.pods() == 8
    refused = release.upgrade("--set", "autoscaling.kind=none")
    assert refused.returncode != 0
    assert "set replicas=8" in refused.stderr
    done(release.upgrade("--set", "autoscaling.kind=none,replicas=8"))
    assert release.pods() == 8
    # The autoscaler still counts as the number's manager.
    done(release.upgrade("--set", "replicas=6", *(["--force-conflicts"] if release.server_side else [])))
    assert release.pods() == 6
    done(release.upgrade("--set", "replicas=5"))
    assert release.pods() == 5


def test_going_back_keeps_the_pods_that_the_autoscaler_runs(release: Release, tmp_path: Path) -> None:
    installed(release, "--set", "image.tag=good,replicas=6")
    done(release.upgrade(*AUTOSCALED))
    done(release.upgrade("--set", "image.tag=bad"))
    release.autoscale(12)
    values = tmp_path / "values.yaml"
    values.write_text(done(release.command("get", "values", release.name, "--revision", "2", "-o", "yaml")))
    done(release.command("upgrade", release.name, str(CHART), "--reset-values", "-f", str(values)))
    assert release.image().endswith(":good")
    assert release.pods() == 12


@pytest.mark.parametrize("revision", ["1", "2"])
def test_a_rollback_never_leaves_one_pod(release: Release, revision: str) -> None:
    installed(release, "--set", "image.tag=good,replicas=6")
    done(release.upgrade(*AUTOSCALED))
    done(release.upgrade("--set", "image.tag=bad"))
    release.autoscale(12)
    if release.server_side:
        refused = release.command("rollback", release.name, revision)
        assert refused.returncode != 0
        assert "conflict" in refused.stderr
        assert release.pods() == 12
        done(release.command("rollback", release.name, revision, "--force-conflicts"))
    else:
        done(release.command("rollback", release.name, revision))
    assert release.image().endswith(":good")
    assert release.pods() == 6
    # The release is whole again.
    done(release.upgrade("--set", "config.policy=fixed:8"))


def test_a_rollback_to_an_autoscaler_never_leaves_one_pod(release: Release) -> None:
    installed(release, *AUTOSCALED)
    done(release.upgrade("--set", "autoscaling.kind=none,replicas=6"))
    done(release.command("rollback", release.name, "1"))
    assert release.pods() == 4


def test_pods_are_added_by_values_and_the_version_taken_back(release: Release) -> None:
    """The steps of TomeErrorBudgetBurnFast."""
    installed(release, "--set", "image.tag=good,replicas=4")
    done(release.upgrade("--set", "image.tag=bad"))
    done(release.upgrade("--set", "replicas=9"))
    assert release.pods() == 9
    done(release.upgrade("--set", "image.tag=good"))
    assert (release.pods(), release.image().rpartition(":")[2]) == (9, "good")


def test_the_profiles_storage_class_can_be_changed_and_changed_back(release: Release) -> None:
    def claims() -> list[Any]:
        found = json.loads(kubectl("get", "persistentvolumeclaims", "-n", release.namespace, "-o", "json"))["items"]
        # One that pods still hold stays until they are gone.
        return [one["spec"].get("storageClassName") for one in found if "deletionTimestamp" not in one["metadata"]]

    installed(release, "--set", "profiles.create=true,profiles.storageClassName=slow")
    done(release.upgrade("--set", "profiles.storageClassName=fast"))
    assert claims() == ["fast"]
    done(release.upgrade("--set", "profiles.size=1Gi,profiles.accessModes={ReadWriteOnce}"))
    assert claims() == ["fast"]


def test_kserve_is_refused_on_a_running_release(release: Release) -> None:
    installed(release)
    refused = release.upgrade("--set", "kserve.enabled=true")
    assert refused.returncode != 0
    assert f"replaces=Deployment/{release.deployment}" in refused.stderr
    assert release.pods() == 2


@pytest.mark.parametrize("name", ["123", "1e3", "no", "y", "true"])
def test_names_that_yaml_reads_otherwise_can_be_installed(release: Release, name: str) -> None:
    release.name = name
    installed(release, "--set-string", f"serviceAccount.name={name},nameOverride={name},fullnameOverride={name}")
    assert kubectl("get", "deployment", name, "-n", release.namespace, "-o", "name")
