"""The chart renders what Kubernetes takes, and refuses values that it can't stand for."""

import copy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.deploy.chart import CHART, EVERYTHING, Manifest, Values, helm, refusal, render

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
    for files in ((), ("values-cpu.yaml",), ("values-gpu.yaml",)):
        done = helm("lint", "--strict", str(CHART), *(word for name in files for word in ("-f", str(CHART / name))))
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
        ({"replica": 3}, "'replica' not allowed"),
        ({"replicas": -1}, "/replicas"),
        ({"device": "tpu"}, "/device"),
        ({"config": {"polcy": "price"}}, "'polcy' not allowed"),
        ({"config": {"policy": "prize"}}, "/config/policy"),
        ({"config": {"batching": {"max_batch": 0}}}, "/config/batching/max_batch"),
        ({"config": {"batching": {"max_delay": "2 minutes"}}}, "/config/batching/max_delay"),
        ({"config": {"models": {}}}, "/config/models"),
        ({"config": {"limits": {"max_image_bytes": "3MB"}}}, "/config/limits/max_image_bytes"),
        # The chart's own.
        ({"config": {"listen": "0.0.0.0:9000"}}, "'listen' not allowed"),
        ({"config": {"drain_timeout": "5s"}}, "'drain_timeout' not allowed"),
        ({"autoscaling": {"kind": "vpa"}}, "/autoscaling/kind"),
        ({"autoscaling": {"targets": {"rShare": 50}}}, "/autoscaling/targets/rShare"),
        ({"autoscaling": {"kind": "hpa", "minReplicas": 5, "maxReplicas": 3}}, "maxReplicas"),
        ({"drain": {"preStopSeconds": 0}}, "/drain/preStopSeconds"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"grpcRoute": {"enabled": True}}, "/grpcRoute/parentRefs"),
        ({"resources": {"limit": {}}}, "'limit' not allowed"),
        ({"service": {"port": 0}}, "/service/port"),
        ({"podDisruptionBudget": {"maxUnavailable": "half"}}, "/podDisruptionBudget/maxUnavailable"),
        # Would otherwise start, wait for a network that isn't let out, and fail.
        ({"config": {"models": [{"source": "vit_base_patch16_224"}]}}, "hub.enabled"),
        ({"tls": {"clients": True}}, "tls.secretName"),
        ({"config": {"rest": True}}, "'rest' not allowed"),
        ({"strategy": {"maxSurge": 0, "maxUnavailable": 0}}, "strategy"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused_and_named(values: Values, said: str) -> None:
    assert said in refusal(values)
