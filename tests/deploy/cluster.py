"""What helm sees of a cluster while it renders: a server with the part of Kubernetes' API that `lookup` reads."""

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.deploy.chart import CHART, FULL, NAMESPACE, RELEASE, Manifest, Values, helms, parsed, run

# The kinds that the cluster knows, by group and version.
KINDS = {
    "v1": ("ConfigMap", "PersistentVolumeClaim", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment",),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "keda.sh/v1alpha1": ("ScaledObject",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "serving.kserve.io/v1alpha1": ("ServingRuntime",),
    "serving.kserve.io/v1beta1": ("InferenceService",),
}


def root(group_version: str) -> str:
    """Return the path under which the API serves a group's version."""
    return f"/apis/{group_version}" if "/" in group_version else f"/api/{group_version}"


def plural(kind: str) -> str:
    """Return what paths call objects of a kind."""
    return kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")


def discovery() -> dict[str, Manifest]:
    """Return what the API says of its kinds, by path."""
    groups: dict[str, list[Manifest]] = {}
    answers: dict[str, Manifest] = {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
    }
    for group_version, kinds in KINDS.items():
        verbs = ["get", "list", "create", "patch", "delete"]
        resources = [{"name": plural(kind), "namespaced": True, "kind": kind, "verbs": verbs} for kind in kinds]
        about = {"kind": "APIResourceList", "groupVersion": group_version, "resources": resources}
        answers[root(group_version)] = about
        group, _, version = group_version.rpartition("/")
        if group:
            groups.setdefault(group, []).append({"groupVersion": group_version, "version": version})
    listed = [{"name": group, "versions": versions} for group, versions in groups.items()]
    answers["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    return answers


DISCOVERY = discovery()
PATHS = {
    kind: f"{root(group_version)}/namespaces/{NAMESPACE}/{plural(kind)}"
    for group_version, kinds in KINDS.items()
    for kind in kinds
}


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        """Answer with the object or the list that the path names."""
        path = self.path.partition("?")[0]
        found: Any = {**DISCOVERY, **self.server.answers}.get(path)
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(found or missing).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


class _Server(ThreadingHTTPServer):
    answers: dict[str, Manifest]


@dataclass
class Cluster:
    """An API server that holds objects, and a release that helm may upgrade or install."""

    url: str
    answers: dict[str, Manifest] = field(default_factory=dict)

    def hold(self, *objects: Manifest) -> None:
        """Hold these objects and no others."""
        self.answers.clear()
        for kind, path in PATHS.items():
            items = [one for one in objects if one["kind"] == kind]
            self.answers[path] = {"kind": f"{kind}List", "apiVersion": "v1", "items": items}
            self.answers.update({f"{path}/{one['metadata']['name']}": one for one in items})

    def dry_run(self, helm: Path, values: Values, *arguments: str) -> tuple[int, str, str]:
        """Return what a helm makes of the values: its status, standard output and standard error."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            where = ("--namespace", NAMESPACE, "--kube-apiserver", self.url, "--kubeconfig", "/dev/null")
            options = ("--dry-run=server", "--disable-openapi-validation", "-f", file.name)
            done = run(helm, *arguments, RELEASE, CHART, *where, *options)
        return done.returncode, done.stdout, done.stderr

    def upgrade(self, helm: Path, values: Values) -> list[Manifest]:
        """Return what an upgrade to the values would apply."""
        status, out, err = self.dry_run(helm, values, "template", "--is-upgrade")
        assert status == 0, err
        return parsed(out)

    def refusals(self, values: Values) -> list[str]:
        """Return what each helm says of an upgrade that it must refuse."""
        answers = [self.dry_run(helm, values, "template", "--is-upgrade") for helm in helms()]
        assert all(status != 0 for status, _, _ in answers), "helm rendered what it must refuse"
        return [err for _, _, err in answers]


@contextlib.contextmanager
def started() -> Iterator[Cluster]:
    """Start an API server on a free port of the loopback interface."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        cluster = Cluster(f"http://127.0.0.1:{server.server_port}")
        server.answers = cluster.answers
        cluster.hold()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield cluster
        finally:
            server.shutdown()
            thread.join()


def deployment(replicas: int, *, kind: str = "none", name: str = FULL, release: str = RELEASE) -> Manifest:
    """Return a Deployment as a release left it, where an autoscaler of that kind chose the number of pods."""
    annotations = {
        "meta.helm.sh/release-name": release,
        "meta.helm.sh/release-namespace": NAMESPACE,
        "tome-serving/autoscaling": kind,
    }
    labels = {"app.kubernetes.io/name": "tome-serving", "app.kubernetes.io/instance": release}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "annotations": annotations,
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
        },
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}},
    }


def config_map() -> Manifest:
    """Return the ConfigMap that every release has."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": FULL, "namespace": NAMESPACE}, "data": {}}
