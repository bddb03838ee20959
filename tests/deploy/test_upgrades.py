"""An upgrade of a running release stops no pods: rendered by helm 3 and helm 4, which see what runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import FULL, RELEASE, Values, helms, render, the
from tests.deploy.cluster import Cluster, config_map, deployment, started

AUTOSCALERS = ("hpa", "keda")
KSERVE: Values = {"kserve": {"enabled": True}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started() as one:
        yield one


@pytest.fixture(params=["3", "4"])
def helm(request: pytest.FixtureRequest) -> Path:
    for binary in helms():
        if binary.name.endswith(request.param):
            return binary
    pytest.skip(f"there is no helm {request.param}; run `make .venv/bin/helm{request.param}`")


def replicas(cluster: Cluster, helm: Path, values: Values) -> Any:
    """Return how many pods an upgrade asks for, or None where it leaves the number out."""
    return the("Deployment", cluster.upgrade(helm, values))["spec"].get("replicas")


@pytest.mark.parametrize("kind", AUTOSCALERS)
@pytest.mark.parametrize("before", ["none", *AUTOSCALERS])
def test_an_upgrade_to_an_autoscaler_keeps_the_pods_that_run(
    cluster: Cluster, helm: Path, before: str, kind: str
) -> None:
    cluster.hold(deployment(6, kind=before), config_map())
    assert replicas(cluster, helm, {"autoscaling": {"kind": kind, "minReplicas": 4}}) == 6


@pytest.mark.parametrize("kind", ["none", *AUTOSCALERS])
@pytest.mark.parametrize("chosen", [None, "live", "omit", 3])
def test_no_upgrade_leaves_the_number_out_while_more_than_one_pod_runs(
    cluster: Cluster, helm: Path, kind: str, chosen: Any
) -> None:
    """Kubernetes would take the missing number for 1."""
    cluster.hold(deployment(6, kind=kind), config_map())
    values = {"replicas": 6, "autoscaling": {"kind": kind, **({"replicas": chosen} if chosen else {})}}
    status, out, err = cluster.dry_run(helm, values, "template", "--is-upgrade")
    assert "\n  replicas: " in out if status == 0 else "would go from 6 pods to 1" in err
    assert (status != 0) == (chosen == "omit" and kind != "none")


def test_values_of_an_older_chart_keep_the_pods_that_run(cluster: Cluster, helm: Path) -> None:
    """With --reuse-values a release has none of the values that came later."""
    cluster.hold(deployment(6), config_map())
    assert replicas(cluster, helm, {"autoscaling": {"kind": "hpa", "replicas": None}, "replaces": None}) == 6


def test_a_first_installation_starts_with_the_autoscalers_least(cluster: Cluster) -> None:
    # Without a cluster as well: `helm template` shows what an installation makes.
    for kind in AUTOSCALERS:
        assert the("Deployment", render({"autoscaling": {"kind": kind, "minReplicas": 3}}))["spec"]["replicas"] == 3
    assert the("Deployment", render())["spec"]["replicas"] == 2


def test_the_number_of_an_autoscaled_deployment_can_be_chosen_or_left_out(cluster: Cluster, helm: Path) -> None:
    cluster.hold(deployment(6, kind="hpa"), config_map())
    assert replicas(cluster, helm, {"autoscaling": {"kind": "hpa", "replicas": 9}}) == 9
    for running in ([], [deployment(1, kind="hpa"), config_map()]):
        cluster.hold(*running)
        assert replicas(cluster, helm, {"autoscaling": {"kind": "hpa", "replicas": "omit"}}) is None


def test_a_deployment_that_was_scaled_to_nothing_stays_so_and_the_notes_say_it(cluster: Cluster, helm: Path) -> None:
    cluster.hold(deployment(0, kind="hpa"))
    assert replicas(cluster, helm, {"autoscaling": {"kind": "hpa"}}) == 0
    status, out, err = cluster.dry_run(helm, {"autoscaling": {"kind": "hpa"}}, "install")
    assert status == 0, err
    assert "no autoscaler starts the first one" in out


@pytest.mark.parametrize("kind", AUTOSCALERS)
def test_switching_the_autoscaler_off_stops_no_pods(cluster: Cluster, helm: Path, kind: str) -> None:
    cluster.hold(deployment(8, kind=kind), config_map())
    for refusal in cluster.refusals({"replicas": 2}):
        assert "set replicas=8" in refusal
    assert replicas(cluster, helm, {"replicas": 8}) == 8
    assert replicas(cluster, helm, {"replicas": 9}) == 9
    # From then on the number is the operator's.
    cluster.hold(deployment(8), config_map())
    assert replicas(cluster, helm, {"replicas": 2}) == 2


@pytest.mark.parametrize(
    "values",
    [KSERVE, {"fullnameOverride": "other"}, {"nameOverride": "other"}],
    ids=["KServe", "renamed", "renamed too"],
)
def test_an_upgrade_that_deletes_all_pods_must_name_what_it_deletes(
    cluster: Cluster, helm: Path, values: Values
) -> None:
    cluster.hold(deployment(6), config_map())
    for wrong in ({}, {"replaces": "Deployment/another"}, {"replaces": f"InferenceService/{FULL}"}):
        for refusal in cluster.refusals({**values, **wrong}):
            assert f"deletes Deployment {FULL}" in refusal
            assert f"replaces=Deployment/{FULL}" in refusal
    assert cluster.upgrade(helm, {**values, "replaces": f"Deployment/{FULL}"})


def test_leaving_kserve_must_name_what_it_deletes(cluster: Cluster, helm: Path) -> None:
    # KServe's own Deployment has the release's annotations, and an owner.
    predictor = deployment(6, name=f"{FULL}-predictor")
    predictor["metadata"]["ownerReferences"] = [{"kind": "InferenceService", "name": FULL}]
    cluster.hold(predictor, config_map())
    # What allowed the way to KServe doesn't allow the way back.
    for values in ({}, {"replaces": f"Deployment/{FULL}"}):
        for refusal in cluster.refusals(values):
            assert f"deletes InferenceService {FULL}" in refusal
    assert replicas(cluster, helm, {"replaces": f"InferenceService/{FULL}"}) == 2
    assert cluster.upgrade(helm, KSERVE)


def test_what_belongs_to_others_is_left_alone(cluster: Cluster, helm: Path) -> None:
    other = deployment(6, name="other", release="other")
    by_hand = deployment(6, name="by-hand")
    del by_hand["metadata"]["annotations"]
    cluster.hold(other, by_hand, config_map())
    assert cluster.upgrade(helm, KSERVE)
    cluster.hold(other, by_hand, deployment(2), config_map())
    assert replicas(cluster, helm, {}) == 2


def test_a_selector_that_cannot_be_changed_is_left_as_it_was(cluster: Cluster) -> None:
    cluster.hold(deployment(2), config_map())
    for refusal in cluster.refusals({"nameOverride": "other", "fullnameOverride": FULL}):
        assert "nameOverride" in refusal
        assert FULL in refusal


def notes(cluster: Cluster, values: Values) -> list[str]:
    """Return what each helm tells the user after an installation."""
    cluster.hold()
    answers = [cluster.dry_run(helm, values, "install") for helm in helms()]
    for status, _, err in answers:
        assert status == 0, err
    return [out.partition("\nNOTES:\n")[2] for _, out, _ in answers]


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"config": {"traces": "http://collector:4317"}}, "networkPolicy.egress"),
        (
            {"config": {"traces": "http://c:4317"}, "networkPolicy": {"egress": [{"ports": [{"port": 443}]}]}},
            "networkPolicy.egress",
        ),
        ({"profiles": {"create": True, "accessModes": ["ReadWriteOnce"]}}, "profiles.accessModes"),
        ({"autoscaling": {"kind": "hpa"}}, "monitoring.podMonitor.enabled"),
        ({"autoscaling": {"kind": "keda"}}, "not helm rollback"),
        ({"replaces": "Deployment/other"}, "--set replaces="),
    ],
    ids=str,
)
def test_notes_warn_of_what_may_fail_later(cluster: Cluster, values: Values, warning: str) -> None:
    for told, by_default in zip(notes(cluster, values), notes(cluster, {}), strict=True):
        assert warning in told
        assert RELEASE in by_default
        assert warning not in by_default


def test_traces_that_the_network_policy_lets_out_need_no_warning(cluster: Cluster) -> None:
    traced: Values = {"config": {"traces": "http://collector:4317"}}
    one_port, range_of_ports = {"ports": [{"port": 4317}]}, {"ports": [{"port": 4000, "endPort": 5000}]}
    all_ports = {"to": [{"podSelector": {}}]}
    egress = [{"egress": [rule]} for rule in (one_port, range_of_ports, all_ports)]
    for policy in (*egress, {"enabled": False}):
        for told in notes(cluster, {**traced, "networkPolicy": policy}):
            assert "WARNING" not in told
