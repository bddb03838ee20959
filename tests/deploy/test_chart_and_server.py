"""What the chart says of the server is what the server does: settings, ports, probes, drain, metrics."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from starlette.routing import Route

from tests.deploy.chart import CHART, EVERYTHING, FULL, ROOT, Values, container, helms, render, run, settings_text, the
from tests.deploy.promql import SERVED, selected
from tome_server.api.rest.routes import application
from tome_server.api.rpc import health, oip_servicer
from tome_server.api.rpc.server import SERVICE
from tome_server.config.server import ServerConfig, read_config
from tome_server.observability.metrics import Metrics, Missed

FILES = ("values.yaml", "values-cpu.yaml", "values-gpu.yaml")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FILES_OF_OTHERS = {
    "rules.yml": "deploy/prometheus/rules.yml",
    "dashboard.json": "deploy/grafana/dashboards/tome-serving.json",
}
KSERVE: Values = {"kserve": {"enabled": True}}


def settings_of(values: Values, folder: Path, *files: str) -> ServerConfig:
    """Return what the server makes of the file that the chart gives it."""
    path = folder / "server.yaml"
    path.write_text(settings_text(render(values, *files)))
    return read_config(path)


def seconds(manifest_duration: str) -> int:
    return int(manifest_duration.removesuffix("s"))


@pytest.mark.parametrize("file", FILES)
def test_the_server_takes_the_settings_of_each_values_file(file: str, tmp_path: Path) -> None:
    config = settings_of({}, tmp_path, file)
    assert config.device in ("cpu", "cuda")
    assert config.connections.max_age == 300


def test_settings_arrive_as_they_were_written(tmp_path: Path) -> None:
    given = {
        "models": [{"source": "bundled:fashion", "name": "no", "default_budget": "80ms"}],
        # Numbers that pass through floats on the way may come out as 2.5e+07, which is no whole number.
        "limits": {"max_image_pixels": 25_000_000, "max_image_bytes": 123_456_789},
        "policy": "fixed:8",
        "batching": {"max_delay": "1.5ms"},
        "reflection": False,
    }
    config = settings_of({"config": given, "auth": {"secretName": "s", "key": "list"}}, tmp_path)
    assert config.models[0].name == "no"
    assert config.models[0].default_budget == 0.08
    assert config.limits.max_image_pixels == 25_000_000
    assert config.limits.max_image_bytes == 123_456_789
    assert config.policy == "fixed:8"
    assert config.batching.max_delay == 0.0015
    assert config.reflection is False
    assert config.auth is not None
    assert config.auth.tokens == Path("/etc/tome-auth/list")


def test_a_repository_can_take_the_place_of_the_list_of_models(tmp_path: Path) -> None:
    volume = {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    values: Values = {"config": {"repository": "/models", "models": []}, "modelsVolume": volume}
    config = settings_of(values, tmp_path)
    assert (config.repository, config.models) == (Path("/models"), ())
    assert "/models" in [mount["mountPath"] for mount in container(render(values))["volumeMounts"]]


def test_schema_and_table_of_settings_are_the_servers() -> None:
    command = [sys.executable, ROOT / "deploy/reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_sets_itself_what_its_users_cannot() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]
    theirs = ServerConfig.model_fields.keys() - schema.keys()
    rendered = yaml.safe_load(settings_text(render({**EVERYTHING, "tls": {"secretName": "certificate"}})))
    assert theirs == rendered.keys() - schema.keys()
    assert schema.keys() <= ServerConfig.model_fields.keys()


@pytest.mark.parametrize("values", [{}, KSERVE], ids=["Deployment", "KServe"])
def test_ports_are_those_that_the_server_listens_on(values: Values, tmp_path: Path) -> None:
    manifests = render({**EVERYTHING, **values})
    config = settings_of({**EVERYTHING, **values}, tmp_path)
    grpc, metrics = (int(str(address).rpartition(":")[2]) for address in (config.listen, config.metrics))
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert list(ports.values()) == [grpc, metrics]
    assert f"EXPOSE {grpc} {metrics}" in DOCKERFILE
    policy = the("NetworkPolicy", manifests)["spec"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == [grpc, metrics]
    endpoint = the("PodMonitor", manifests)["spec"]["podMetricsEndpoints"][0]
    assert ports[endpoint["port"]] == metrics
    assert endpoint["path"] == "/metrics"


def test_services_and_routes_lead_to_the_pods() -> None:
    manifests = render(EVERYTHING)
    deployment = the("Deployment", manifests)["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    named = {port["name"] for port in container(manifests)["ports"]}
    for suffix in ("", "-headless"):
        service = the("Service", manifests, suffix)["spec"]
        assert service["selector"].items() <= labels
        assert {port["targetPort"] for port in service["ports"]} <= named
    assert the("Service", manifests, "-headless")["spec"]["clusterIP"] == "None"
    for kind, *where in (
        ("PodDisruptionBudget", "selector", "matchLabels"),
        ("NetworkPolicy", "podSelector", "matchLabels"),
        ("PodMonitor", "selector", "matchLabels"),
        ("Deployment", "selector", "matchLabels"),
    ):
        selector = the(kind, manifests)["spec"]
        for step in where:
            selector = selector[step]
        assert selector
        assert selector.items() <= labels, kind
    for constraint in deployment["template"]["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels
    backend = the("GRPCRoute", manifests)["spec"]["rules"][0]["backendRefs"][0]
    service = the("Service", manifests)
    assert backend == {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}


@pytest.mark.parametrize("values", [{}, KSERVE], ids=["Deployment", "KServe"])
def test_probes_ask_services_whose_health_the_server_tells(values: Values) -> None:
    server = container(render(values))
    asked = {kind: server[kind]["grpc"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked["readinessProbe"]["service"] == SERVICE
    # "" is the server as a whole.
    assert asked["startupProbe"]["service"] == asked["livenessProbe"]["service"] == ""
    (port,) = {probe["port"] for probe in asked.values()}
    assert port == server["ports"][0]["containerPort"]


def test_with_tls_probes_ask_paths_that_the_server_answers() -> None:
    nobody: Any = SimpleNamespace(engine=SimpleNamespace(metrics=Metrics()), ready=False)
    (health_paths,) = [{route.path for route in application(None, nobody, None).routes if isinstance(route, Route)}]
    server = container(render({"tls": {"secretName": "s"}}))
    named = {port["name"]: port["containerPort"] for port in server["ports"]}
    asked = {kind: server[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    for probe in asked.values():
        assert probe["path"] in health_paths
        assert named[probe["port"]] == 8501
    assert asked["startupProbe"] == asked["readinessProbe"] != asked["livenessProbe"]


def test_tls_files_are_those_of_the_secret(tmp_path: Path) -> None:
    values: Values = {"tls": {"secretName": "certificate", "clients": True}}
    manifests = render(values)
    tls = settings_of(values, tmp_path).tls
    assert tls is not None
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}
    # As Kubernetes and cert-manager name them.
    names = {"certificate": "tls.crt", "key": "tls.key", "client_ca": "ca.crt"}
    assert tls.model_dump() == {setting: Path(mounts["tls"]) / name for setting, name in names.items()}
    volumes = the("Deployment", manifests)["spec"]["template"]["spec"]["volumes"]
    assert [volume["secret"]["secretName"] for volume in volumes if volume["name"] == "tls"] == ["certificate"]
    alone: Values = {"tls": {"secretName": "certificate"}}
    server_only = settings_of(alone, tmp_path).tls
    assert server_only is not None
    assert server_only.model_dump() == tls.model_dump() | {"client_ca": None}
    assert "appProtocol" not in the("Service", render(values))["spec"]["ports"][0]


def test_rest_is_offered_only_where_it_is_wanted(tmp_path: Path) -> None:
    assert settings_of({}, tmp_path).rest is False
    assert len(the("Service", render())["spec"]["ports"]) == 1
    values: Values = {"rest": {"enabled": True}}
    assert settings_of(values, tmp_path).rest is True
    (_, http) = the("Service", render(values))["spec"]["ports"]
    assert (http["port"], http["targetPort"]) == (8080, "metrics")


def test_the_startup_probe_allows_what_is_asked_for() -> None:
    for timeout in (10, 299, 300, 3600):
        probe = container(render({"startup": {"timeoutSeconds": timeout}}))["startupProbe"]
        assert timeout <= probe["periodSeconds"] * probe["failureThreshold"] <= timeout + probe["periodSeconds"]
        # A rollout that waits for it isn't reported as failed.
        rollout = the("Deployment", render({"startup": {"timeoutSeconds": timeout}}))["spec"]
        assert rollout["progressDeadlineSeconds"] > timeout


def test_routes_let_through_what_is_for_clients() -> None:
    matches = the("GRPCRoute", render(EVERYTHING))["spec"]["rules"][0]["matches"]
    assert {match["method"]["service"] for match in matches} == {SERVICE, oip_servicer.SERVICE, health.SERVICE}


@pytest.mark.parametrize(("pre_stop", "drain"), [(5, 30), (15, 120)])
def test_the_grace_period_holds_pre_stop_and_drain(pre_stop: int, drain: int, tmp_path: Path) -> None:
    values: Values = {"drain": {"preStopSeconds": pre_stop, "timeoutSeconds": drain}}
    manifests = render(values)
    assert settings_of(values, tmp_path).drain_timeout == drain
    assert container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"] == pre_stop
    grace = the("Deployment", manifests)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= pre_stop + drain + 5
    kserve = the("InferenceService", render({**values, **KSERVE}))["spec"]["predictor"]
    assert kserve["terminationGracePeriodSeconds"] == grace


@pytest.mark.parametrize("values", [{}, KSERVE], ids=["Deployment", "KServe"])
def test_pods_may_do_nothing_but_serve(values: Values) -> None:
    manifests = render({**EVERYTHING, **values})
    server = container(manifests)["securityContext"]
    (user, group) = map(int, re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0])
    assert server == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if values:
        pod = the("InferenceService", manifests)["spec"]["predictor"]
    else:
        pod = the("Deployment", manifests)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    account = the("ServiceAccount", manifests)
    assert account["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["securityContext"]["fsGroup"] == group


def test_what_the_server_writes_lies_on_volumes(tmp_path: Path) -> None:
    config = settings_of({}, tmp_path)
    mounts = [mount["mountPath"] for mount in container(render())["volumeMounts"] if not mount.get("readOnly")]
    variables = dict(re.findall(r"^ *(?:ENV )?([A-Z_]+)=(/\S+)", DOCKERFILE, re.MULTILINE))
    assert str(config.profiles).startswith(tuple(mounts))
    for needed in ("HF_HOME", "HOME"):
        assert variables[needed] in mounts
    # The image's own volume, so that both places are one.
    assert re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)[0] in mounts


@pytest.mark.parametrize("values", [EVERYTHING, {**EVERYTHING, **KSERVE}], ids=["Deployment", "KServe"])
def test_every_mount_has_its_volume_and_every_volume_its_mount(values: Values) -> None:
    manifests = render(values)
    runtimes = [one["spec"] for one in manifests if one["kind"] == "ServingRuntime"]
    pod = runtimes[0] if runtimes else the("Deployment", manifests)["spec"]["template"]["spec"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    mounts = [mount["name"] for mount in container(manifests)["volumeMounts"]]
    assert sorted(volumes) == sorted(mounts)
    assert len(set(volumes)) == len(volumes)


def test_new_settings_take_new_pods() -> None:
    def checksum(values: Values) -> str:
        template = the("Deployment", render(values))["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/settings"])

    assert checksum({"config": {"policy": "fixed:8"}}) != checksum({})
    assert checksum({"replicas": 5}) == checksum({})


def test_the_image_is_the_devices_unless_named() -> None:
    version = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    assert container(render())["image"] == f"tome-serving:{version}-cpu"
    assert container(render({}, "values-gpu.yaml"))["image"] == f"tome-serving:{version}-cuda"
    assert container(render({"image": {"tag": "x"}}))["image"] == "tome-serving:x"
    digest = "sha256:" + "a" * 64
    assert container(render({"image": {"tag": "x", "digest": digest}}))["image"] == f"tome-serving@{digest}"


def test_a_gpu_is_asked_for_where_models_run_on_one(tmp_path: Path) -> None:
    assert settings_of({}, tmp_path, "values-gpu.yaml").device == "cuda"
    resources = container(render({}, "values-gpu.yaml"))["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1


def test_names_stay_within_what_kubernetes_allows() -> None:
    for manifest in render({"fullnameOverride": "x" * 80}):
        assert len(manifest["metadata"]["name"]) <= 63


def queries(values: Values) -> dict[str, str]:
    """Return the autoscaler's queries by the name of their target."""
    manifests = render(values)
    if "kserve" in values:
        metrics = the("InferenceService", manifests)["spec"]["predictor"]["autoScaling"]["metrics"]
        return {name: one["external"]["metric"]["query"] for name, one in zip(TARGETS, metrics, strict=True)}
    triggers = the("ScaledObject", manifests)["spec"]["triggers"]
    return {name: one["metadata"]["query"] for name, one in zip(TARGETS, triggers, strict=True)}


TARGETS = ("rShare", "refusedShare", "busy")
KEDA: Values = {"autoscaling": {"kind": "keda"}}


def test_autoscalers_ask_for_metrics_that_the_server_has() -> None:
    asked = queries(KEDA)
    assert asked == queries({**KEDA, **KSERVE})
    for query in asked.values():
        chosen = selected(query)
        assert chosen
        assert chosen.keys() <= SERVED
        for one in (selector for alike in chosen.values() for selector in alike):
            assert {matcher.name for matcher in one.matchers.matchers} >= {"namespace", "app_kubernetes_io_instance"}
    # Of the reasons for a miss, those that more replicas would help.
    (missed, _) = selected(asked["refusedShare"])["tome_slo_missed_total"]
    (reasons,) = (matcher.value for matcher in missed.matchers.matchers if matcher.name == "reason")
    assert set(reasons.split("|")) <= set(Missed)


def test_the_adapter_for_hpas_answers_with_kedas_queries() -> None:
    adapter = yaml.safe_load((ROOT / "deploy/helm/prometheus-adapter.yaml").read_text())["rules"]["external"]
    matchers = 'namespace="vision",app_kubernetes_io_instance="demo"'
    asked = [rule["metricsQuery"].replace("<<.LabelMatchers>>", matchers).strip() for rule in adapter]
    assert asked == [query.strip() for query in queries(KEDA).values()]
    for rule in adapter:
        assert selected(rule["seriesQuery"]).keys() <= SERVED
    hpa = the("HorizontalPodAutoscaler", render({"autoscaling": {"kind": "hpa"}}))["spec"]
    metrics = [metric["external"] for metric in hpa["metrics"]]
    assert {one["metric"]["name"] for one in metrics} == {rule["name"]["as"] for rule in adapter}
    for one in metrics:
        assert one["metric"]["selector"]["matchLabels"] == {"app_kubernetes_io_instance": "demo"}
    assert hpa["scaleTargetRef"]["name"] == FULL


def test_hpa_and_keda_have_the_same_targets_and_behaviour() -> None:
    given = {"rShare": 0.4, "refusedShare": 0.02, "busy": 0.7}
    hpa = the("HorizontalPodAutoscaler", render({"autoscaling": {"kind": "hpa", "targets": given}}))["spec"]
    keda = the("ScaledObject", render({"autoscaling": {"kind": "keda", "targets": given}}))["spec"]
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    by_metric = {one["external"]["metric"]["name"]: one["external"]["target"] for one in hpa["metrics"]}
    assert by_metric == {
        "tome_autoscaling_r_share": {"type": "Value", "value": "0.4"},
        "tome_autoscaling_refused_share": {"type": "Value", "value": "0.02"},
        "tome_autoscaling_busy": {"type": "Value", "value": "0.7"},
    }
    assert [one["metadata"]["threshold"] for one in keda["triggers"]] == ["0.4", "0.02", "0.7"]
    assert {one["metricType"] for one in keda["triggers"]} == {"Value"}


def test_series_carry_the_labels_that_autoscalers_select_by() -> None:
    monitor = the("PodMonitor", render(EVERYTHING))["spec"]
    # Prometheus writes a pod's label app.kubernetes.io/instance so.
    assert "app.kubernetes.io/instance" in monitor["podTargetLabels"]
    # The job that the rules know servers by, whatever the release is called.
    assert {"targetLabel": "job", "replacement": "tome-serving"} in monitor["podMetricsEndpoints"][0]["relabelings"]


def test_rules_are_those_of_the_repository() -> None:
    rule = the("PrometheusRule", render({"monitoring": {"prometheusRule": {"enabled": True}}}))
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())


def test_the_dashboard_is_the_repositorys_and_marked_for_grafana() -> None:
    config_map = the("ConfigMap", render(EVERYTHING), "-dashboard")
    source = (ROOT / "deploy/grafana/dashboards/tome-serving.json").read_text()
    assert json.loads(config_map["data"]["tome-serving.json"]) == json.loads(source)
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_a_packaged_chart_has_what_lies_outside_its_folder(tmp_path: Path) -> None:
    for helm in helms():
        folder = tmp_path / helm.name
        done = run(helm, "package", CHART, "--destination", folder)
        assert done.returncode == 0, done.stderr
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            for name, source in FILES_OF_OTHERS.items():
                member = archive.extractfile(f"tome-serving/files/{name}")
                assert member is not None
                assert member.read() == (ROOT / source).read_bytes()
