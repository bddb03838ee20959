"""The chart renders what Kubernetes takes, and refuses values that it can't stand for."""

import collections
import copy
import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.deploy.chart import CHART, EVERYTHING, Manifest, Values, helms, parsed, refusals, render, run, text

# The oldest that the chart takes, and the newest that can be checked.
KUBERNETES = ("1.30", "1.37")
RENDERED: dict[str, tuple[Values, tuple[str, ...]]] = {
    "defaults": ({}, ()),
    "CPU": ({}, ("values-cpu.yaml",)),
    "GPU": ({}, ("values-gpu.yaml",)),
    "everything": (EVERYTHING, ()),
    "TLS and REST": ({"tls": {"secretName": "s", "clients": True}, "rest": {"enabled": True}}, ()),
    "HPA": ({"autoscaling": {"kind": "hpa"}}, ()),
    "KServe": ({"kserve": {"enabled": True}}, ()),
    "KServe with everything": ({**EVERYTHING, "kserve": {"enabled": True}}, ()),
    "KServe on GPUs": ({"kserve": {"enabled": True}}, ("values-gpu.yaml",)),
}
CUSTOM = ("GRPCRoute", "InferenceService", "PodMonitor", "PrometheusRule", "ScaledObject", "ServingRuntime")
POD = ("containers", "volumes", "nodeSelector", "tolerations", "affinity", "imagePullSecrets")
OBJECT = {"type": "object", "required": ["name", "labels"]}
NAME = {"type": "string", "minLength": 1}
# Gateway API v1: of a GRPCRoute what the chart uses, strictly.
GRPC_ROUTE = {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "gateway.networking.k8s.io/v1"},
        "kind": {},
        "metadata": OBJECT,
        "spec": {
            "required": ["parentRefs", "rules"],
            "additionalProperties": False,
            "properties": {
                "parentRefs": {"type": "array", "minItems": 1, "items": {"required": ["name"]}},
                "hostnames": {"type": "array", "maxItems": 16, "items": NAME},
                "rules": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "additionalProperties": False,
                        "properties": {
                            "matches": {
                                "type": "array",
                                "items": {
                                    "additionalProperties": False,
                                    "properties": {
                                        "method": {
                                            "required": ["service"],
                                            "additionalProperties": False,
                                            "properties": {"type": {"const": "Exact"}, "service": NAME},
                                        }
                                    },
                                },
                            },
                            "backendRefs": {
                                "type": "array",
                                "items": {
                                    "required": ["name", "port"],
                                    "additionalProperties": False,
                                    "properties": {"name": NAME, "port": {"type": "integer"}},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}
# KServe: likewise. Pods and containers in them are checked as Kubernetes' own.
SERVING_RUNTIME = {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1alpha1"},
        "kind": {},
        "metadata": OBJECT,
        "spec": {
            "required": ["containers", "supportedModelFormats"],
            "additionalProperties": False,
            "properties": {
                **{key: {} for key in POD},
                "annotations": {"additionalProperties": {"type": "string"}},
                "labels": {"additionalProperties": {"type": "string"}},
                "supportedModelFormats": {
                    "items": {
                        "required": ["name"],
                        "additionalProperties": False,
                        "properties": {"name": NAME, "version": NAME, "autoSelect": {"type": "boolean"}},
                    }
                },
                "protocolVersions": {"items": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}},
                "multiModel": {"const": False},
            },
        },
    },
}
METRIC = {
    "required": ["type", "external"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "External"},
        "external": {
            "required": ["metric", "target"],
            "additionalProperties": False,
            "properties": {
                "metric": {
                    "required": ["backend", "serverAddress", "query"],
                    "additionalProperties": False,
                    "properties": {"backend": {"const": "prometheus"}, "serverAddress": NAME, "query": NAME},
                },
                "target": {
                    "additionalProperties": False,
                    "properties": {"type": {"const": "Value"}, "value": {"type": "string"}},
                },
            },
        },
    },
}
PREDICTOR = {
    "required": ["model"],
    "properties": {
        "minReplicas": {"type": "integer"},
        "maxReplicas": {"type": "integer"},
        "autoScaling": {"additionalProperties": False, "properties": {"metrics": {"items": METRIC}}},
        "model": {
            "required": ["modelFormat", "runtime"],
            "additionalProperties": False,
            "properties": {"runtime": NAME, "modelFormat": OBJECT | {"required": ["name"]}, "protocolVersion": NAME},
        },
    },
}


def all_of(case: str) -> list[Manifest]:
    values, files = RENDERED[case]
    return render(values, *files)


def check_pod(spec: dict[str, Any], version: str) -> None:
    """Check what stands in a custom resource as it would stand in a pod."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
    pod["spec"] = {"containers": [{"name": "c", "image": "i"}], **spec}
    kubernetes_validate.validate(pod, version, strict=True)


def test_helm_lint_finds_nothing() -> None:
    for helm in helms():
        for options in ((), ("-f", CHART / "values-cpu.yaml"), ("-f", CHART / "values-gpu.yaml")):
            done = run(helm, "lint", "--strict", CHART, *options)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", RENDERED)
def test_kubernetes_takes_what_is_rendered(case: str, version: str) -> None:
    for manifest in all_of(case):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_validation_is_strict() -> None:
    manifest = copy.deepcopy(next(one for one in all_of("defaults") if one["kind"] == "Deployment"))
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("case", RENDERED)
def test_custom_resources_have_no_field_that_their_owners_do_not_know(case: str) -> None:
    models = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}
    for manifest in all_of(case):
        if kind := models.get(manifest["kind"]):
            # What the model doesn't know it would leave out.
            taken = kind.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert taken == manifest


def test_grpc_routes_and_kserve_resources_are_of_the_form_that_their_documentation_gives() -> None:
    for case in ("everything", "KServe", "KServe with everything", "KServe on GPUs"):
        for manifest in all_of(case):
            if manifest["kind"] == "GRPCRoute":
                jsonschema.validate(manifest, GRPC_ROUTE)
            elif manifest["kind"] == "ServingRuntime":
                jsonschema.validate(manifest, SERVING_RUNTIME)
                check_pod({key: manifest["spec"][key] for key in POD if key in manifest["spec"]}, KUBERNETES[1])
            elif manifest["kind"] == "InferenceService":
                predictor = manifest["spec"]["predictor"]
                jsonschema.validate(predictor, PREDICTOR)
                rest = {key: value for key, value in predictor.items() if key not in PREDICTOR["properties"]}
                check_pod(rest, KUBERNETES[1])


@pytest.mark.parametrize("case", RENDERED)
def test_everything_carries_the_releases_labels_and_no_name_is_used_twice(case: str) -> None:
    manifests = all_of(case)
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(names) == len(set(names))
    for one in manifests:
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 3}, "Additional property replica is not allowed"),
        ({"replicas": -1}, "replicas"),
        ({"device": "tpu"}, "device"),
        ({"config": {"polcy": "price"}}, "Additional property polcy is not allowed"),
        ({"config": {"policy": "prize"}}, "config.policy"),
        ({"config": {"batching": {"max_batch": 0}}}, "config.batching.max_batch"),
        ({"config": {"batching": {"max_delay": "2 minutes"}}}, "config.batching.max_delay"),
        ({"config": {"models": {}}}, "config.models"),
        ({"config": {"limits": {"max_image_bytes": "3MB"}}}, "config.limits.max_image_bytes"),
        # The chart's own.
        ({"config": {"listen": "0.0.0.0:9000"}}, "Additional property listen is not allowed"),
        ({"config": {"drain_timeout": "5s"}}, "Additional property drain_timeout is not allowed"),
        ({"autoscaling": {"kind": "vpa"}}, "autoscaling.kind"),
        ({"autoscaling": {"targets": {"rShare": 50}}}, "autoscaling.targets.rShare"),
        ({"autoscaling": {"kind": "hpa", "minReplicas": 5, "maxReplicas": 3}}, "maxReplicas"),
        ({"drain": {"preStopSeconds": 0}}, "drain.preStopSeconds"),
        ({"image": {"digest": "latest"}}, "image.digest"),
        ({"grpcRoute": {"enabled": True}}, "grpcRoute.parentRefs"),
        ({"resources": {"limit": {}}}, "Additional property limit is not allowed"),
        ({"service": {"port": 0}}, "service.port"),
        ({"podDisruptionBudget": {"maxUnavailable": "half"}}, "podDisruptionBudget.maxUnavailable"),
        # Would otherwise start, wait for a network that isn't let out, and fail.
        ({"config": {"models": [{"source": "vit_base_patch16_224"}]}}, "hub.enabled"),
        ({"tls": {"clients": True}}, "tls.secretName"),
        ({"config": {"rest": True}}, "Additional property rest is not allowed"),
        ({"strategy": {"maxSurge": 0, "maxUnavailable": 0}}, "strategy"),
        # Ports that meet: of the Service, and of the server with the probes that ask it.
        ({"rest": {"enabled": True, "port": 8500}}, "rest.port"),
        ({"rest": {"enabled": True}, "service": {"port": 8080}}, "service.port"),
        ({"args": ["--metrics", "0.0.0.0:8500"]}, "--metrics"),
        ({"args": ["--listen=0.0.0.0:8501"]}, "--listen"),
        ({"args": ["--device", "cuda"]}, "--device"),
        # Would start no pod, or pods that don't find what they need.
        ({"device": "cuda"}, "nvidia.com/gpu"),
        ({"device": "cuda", "resources": {"limits": {"cpu": 4}}}, "nvidia.com/gpu"),
        ({"config": {"models": [{"source": "v", "checkpoint": "/models/v.pth"}]}}, "config.models[0].checkpoint"),
        ({"config": {"models": [{"labels": "/models/labels.txt"}]}}, "config.models[0].labels"),
        ({"config": {"models": [{}, {"quality": "/models/../models/q.json"}]}}, "config.models[1].quality"),
        ({"config": {"repository": "/models", "models": []}}, "config.repository"),
        ({"config": {"repository": "/models/b"}, "extraVolumeMounts": [{"mountPath": "/models/a"}]}, "/models/b"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "podDisruptionBudget.maxUnavailable"),
        ({"podDisruptionBudget": {"maxUnavailable": "0%"}}, "podDisruptionBudget.maxUnavailable"),
        # Names: Services' have no dots, and numbers lose digits on the way.
        ({"fullnameOverride": "v1.2"}, "fullnameOverride"),
        ({"nameOverride": "v1.2"}, "nameOverride"),
        ({"nameOverride": 1234567}, "nameOverride"),
        ({"autoscaling": {"replicas": 0}}, "autoscaling.replicas"),
        ({"autoscaling": {"replicas": "some"}}, "autoscaling.replicas"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused_and_named(values: Values, said: str) -> None:
    for refusal in refusals(values):
        assert said in refusal


@pytest.mark.parametrize(
    "values",
    [
        {"device": "cuda", "resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}},
        {"device": "cuda", "resources": {"claims": [{"name": "gpu"}]}},
        {"device": "cuda", "runtimeClassName": "nvidia"},
        {"config": {"repository": "/models"}, "modelsVolume": {"emptyDir": {}}},
        {"config": {"repository": "/models/b"}, "extraVolumeMounts": [{"name": "models", "mountPath": "/models"}]},
        # In an image that was built with them.
        {"config": {"models": [{"source": "v", "checkpoint": "/weights/v.pth"}]}},
        {"podDisruptionBudget": {"enabled": False, "maxUnavailable": 0}},
        {"rest": {"enabled": False, "port": 8500}},
        {"args": ["--log-level", "debug"]},
    ],
    ids=str,
)
def test_values_that_go_together_are_taken(values: Values) -> None:
    assert render(values)


def test_a_release_whose_name_has_a_dot_needs_another_name() -> None:
    for refusal in refusals({}, release="v1.2"):
        assert "set fullnameOverride" in refusal
    assert render({"fullnameOverride": "v1-2"}, release="v1.2")


def without(required: bool, values: Values, schema: Manifest, depth: int | None = None) -> Values:
    """Return values that take away the defaults that are required, at one depth, or all those that are not."""
    taken: Values = {}
    for key, value in values.items():
        if (key in schema.get("required", ())) == required and depth in (None, 1):
            taken[key] = None
        elif isinstance(value, dict) and "properties" in schema["properties"].get(key, {}):
            taken[key] = without(required, value, schema["properties"][key], depth and depth - 1)
    return taken


def test_null_takes_a_default_away_or_is_refused_by_name() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert render(without(False, values, schema))
    for depth, some in ((1, {"config", "image", "rest"}), (2, {"kind", "port"}), (3, {"rShare", "serverAddress"})):
        for refusal in refusals(without(True, values, schema, depth)):
            assert all(f"{key} is required" in refusal for key in some), refusal


# Release names and values that YAML reads as a number, a truth value or nothing.
ODD = ("123", "1e3", "0x1f", "0777", "y", "no", "on", "true", "null")


def named(name: str) -> list[Values]:
    """Return values that use a name wherever they can."""
    everywhere: Values = {
        **EVERYTHING,
        "nameOverride": name,
        "fullnameOverride": name,
        "serviceAccount": {"name": name},
        "priorityClassName": name,
        "runtimeClassName": name,
        "imagePullSecrets": [{"name": name}],
        "tls": {"secretName": name},
        "auth": {"secretName": name},
        "hub": {"enabled": True, "existingClaim": name},
        "profiles": {"create": True, "storageClassName": name},
        "podLabels": {"c": name},
        "nodeSelector": {"pool": name},
        "autoscaling": {"kind": "keda", "keda": {"authenticationRef": name}},
    }
    return [
        everywhere,
        {**everywhere, "autoscaling": {"kind": "hpa"}},
        {**everywhere, "kserve": {"enabled": True}},
        {**everywhere, "profiles": {"existingClaim": name}, "serviceAccount": {"create": False, "name": name}},
    ]


@pytest.mark.parametrize("odd", ODD)
def test_names_that_yaml_reads_otherwise_stay_strings(odd: str) -> None:
    for values, ordinary in zip(named(odd), named("ordinary"), strict=True):
        # Parsers disagree about what is a number, so each must stand in quotes. The chart's own `true` needs none.
        assert unquoted(text(values, release=odd))[odd] == unquoted(text(ordinary, release="ordinary"))[odd]
        for manifest in parsed(text(values, release=odd)):
            if manifest["kind"] not in CUSTOM:
                kubernetes_validate.validate(manifest, KUBERNETES[1], strict=True)


def unquoted(manifests: str) -> collections.Counter[str]:
    """Count the scalars that stand without quotes."""
    tokens = yaml.scan(manifests, yaml.SafeLoader)
    return collections.Counter(token.value for token in tokens if isinstance(token, yaml.ScalarToken) and token.plain)


@pytest.mark.parametrize("values", [EVERYTHING, {"kserve": {"enabled": True}}], ids=["Services", "InferenceService"])
def test_names_of_services_begin_with_a_letter_and_are_short_enough(values: Values) -> None:
    for name in ("123", "9" * 53, "a" * 53):
        manifests = render({**values, "nameOverride": "x"}, release=name)
        named = [one["metadata"]["name"] for one in manifests if one["kind"] in ("Service", "InferenceService")]
        assert named
        for service in named:
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", service)
        for route in (one for one in manifests if one["kind"] == "GRPCRoute"):
            assert route["spec"]["rules"][0]["backendRefs"][0]["name"] in named


def claim(values: Values, release: str = "demo") -> Manifest:
    """Return the claim for profiles, which the pods must name."""
    manifests = render(values, release=release)
    (found,) = [one for one in manifests if one["kind"] == "PersistentVolumeClaim"]
    (deployment,) = [one for one in manifests if one["kind"] == "Deployment"]
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"claimName": found["metadata"]["name"]} in [volume.get("persistentVolumeClaim") for volume in volumes]
    return found


def test_a_claim_that_cannot_be_changed_gets_another_name_when_it_should_be() -> None:
    changes: list[Values] = [{}, {"storageClassName": "fast"}, {"accessModes": ["ReadWriteOnce"]}, {"size": "1Gi"}]
    claims = [claim({"profiles": {"create": True, **change}}) for change in changes]
    assert len({one["metadata"]["name"] for one in claims}) == len(claims)
    assert all(len(one["metadata"]["name"]) <= 63 for one in claims)
    again = claim({"profiles": {"create": True}, "replicas": 7, "config": {"policy": "fixed:8"}})
    assert again["metadata"]["name"] == claims[0]["metadata"]["name"]
    # Names that are cut off alike stay apart.
    long = [claim({"profiles": {"create": True}}, release="r" * 51 + end)["metadata"]["name"] for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(name) <= 63 for name in long)
