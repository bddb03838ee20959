"""The image, really built and run as the chart runs it: read-only root, its user, its volumes, its settings.

Docker's own base images can't be had everywhere, so it is built on a stand-in: Debian with the Python it has. Run as
root, with Debian's packages buildah and debootstrap.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import ROOT, Values, container, render, settings_text
from tome_client import Client

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

# Its Python, 3.11, is one that the project supports. As in Docker's image its headers are there, and no compiler.
DEBIAN, PYTHON = "bookworm", "3.11"
PACKAGES = "python3,python3-venv,python3-pip,libpython3-dev,ca-certificates"
BASE = f"docker.io/library/python:{PYTHON}-slim"
TAG = "localhost/tome-serving:test"
FOLDER = ROOT / "build/image"
# A CPU build of torch in a stand-in of 300 MB; with CUDA's libraries it would be four times that.
LARGEST = 1.6e9


def run(*command: str | Path, timeout: float = 900) -> str:
    done = subprocess.run([*command], capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def buildah(*arguments: str | Path) -> str:
    where = ("--root", FOLDER / "storage", "--runroot", FOLDER / "run", "--storage-driver", storage_driver())
    return run("buildah", *where, *arguments).strip()


@functools.cache
def storage_driver() -> str:
    """Return overlay where this file system can hold one, else vfs, which copies whole layers and is slow."""
    tried = FOLDER / "tried"
    command = (
        "buildah",
        "--root",
        tried,
        "--runroot",
        FOLDER / "run",
        "--storage-driver",
        "overlay",
        "from",
        "scratch",
    )
    works = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return "overlay" if works else "vfs"


def pip_of_this_machine() -> list[str]:
    """Return what lets pip, in the build, find packages where pip finds them here."""
    found: list[str] = []
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        if value := os.environ.get(name):
            found += ["--build-arg", f"{name}={value}"]
            found += [f"--volume={part}:{part}:ro" for part in value.split() if part.startswith("/")]
    for path in ("/etc/pip.conf", "/etc/ssl/certs"):
        if Path(path).exists():
            found.append(f"--volume={path}:{path}:ro")
    return found


@dataclass(frozen=True)
class Image:
    """A built image, and a container of it as a folder."""

    config: dict[str, Any]
    size: int
    root: Path


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None or os.geteuid() != 0:
            pytest.skip("needs root, and: apt-get install buildah debootstrap")
    base = FOLDER / "base"
    if not (base / "usr/bin/python").exists():
        shutil.rmtree(base, ignore_errors=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, base)
        (base / "usr/bin/python").symlink_to("python3")
    scratch = buildah("from", "scratch")
    buildah("add", "-q", scratch, base, "/")
    buildah("commit", "-q", "--rm", scratch, BASE)
    # Docker's format, for OCI's has no health check.
    arguments = (
        "--isolation=chroot",
        "--format=docker",
        "--pull-never",
        "--layers=false",
        f"--build-arg=PYTHON={PYTHON}",
    )
    buildah("build", *arguments, *pip_of_this_machine(), "--tag", TAG, ".")
    described = json.loads(buildah("inspect", "--type", "image", TAG))
    sizes = {name: one["size"] for one in json.loads(buildah("images", "--json")) for name in one["names"] or ()}
    made = buildah("from", "--pull-never", TAG)
    try:
        root = Path(buildah("mount", made))
        size = int(run("du", "-sxb", root).split()[0])
        print(f"the image is {size / 1e6:.0f} MB ({sizes[TAG]} by buildah) on a base of {sizes[BASE]}")
        yield Image(described["Docker"]["config"], size, root)
    finally:
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")


class Pod:
    """The image's server in a mount and process namespace of its own, as a pod of the chart has it."""

    def __init__(self, image: Image, folder: Path) -> None:
        ports = {"--listen": "127.0.0.1:0", "--metrics": "127.0.0.1:0"}
        values: Values = {
            "config": {"profile_time": "1s"},
            "drain": {"preStopSeconds": 1, "timeoutSeconds": 20},
            "args": [word for flag in ports.items() for word in flag],
        }
        manifests = render(values)
        self.container = container(manifests)
        settings = folder / "settings"
        settings.mkdir()
        (settings / "server.yaml").write_text(settings_text(manifests))
        settings.chmod(0o755)
        root = image.root
        user = "{runAsUser}:{runAsGroup}".format(**self.container["securityContext"])
        own = "uid={runAsUser},gid={runAsGroup}".format(**self.container["securityContext"])
        steps = [
            # Where Kubernetes mounts, it makes the place.
            *(f"mkdir -p {root}{mount['mountPath']}" for mount in self.container["volumeMounts"]),
            f"mount --bind {root} {root}",
            f"mount -o remount,ro,bind {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
        ]
        for mount in self.container["volumeMounts"]:
            if mount["name"] == "settings":
                steps.append(f"mount --bind {settings} {root}{mount['mountPath']}")
            else:
                steps.append(f"mount -t tmpfs -o size=100m,{own} none {root}{mount['mountPath']}")
        variables = " ".join(f"'{one}'" for one in image.config["Env"])
        inside = f"chroot --userspec={user} {root} /usr/bin/env -i {variables}"
        command = " ".join([*image.config["Entrypoint"], *self.container["args"]])
        steps.append(f"touch {root}/opt/written 2>&1 | grep -q Read-only")
        steps.append(f"exec {inside} {command}")
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec", "\n".join(steps)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.ready = json.loads(line)["ready"]
        self.inside = inside

    def ask(self, command: str) -> int:
        """Run a command in the pod, with its file system; return the exit status."""
        (server,) = run("pgrep", "-P", str(self.process.pid)).split()
        enter = ["nsenter", "-t", server, "-m", "-p", "bash", "-c", f"{self.inside} {command}"]
        return subprocess.run(enter, capture_output=True, check=False).returncode

    def terminate(self) -> int:
        """Send the server SIGTERM, as Kubernetes does; return the exit status."""
        (server,) = run("pgrep", "-P", str(self.process.pid)).split()
        os.kill(int(server), signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def pod(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    started = Pod(image, tmp_path_factory.mktemp("pod"))
    with started.process:
        yield started
        started.process.kill()


def test_the_image_is_no_larger_than_a_cpu_build_must_be(image: Image) -> None:
    assert image.size < LARGEST


def test_the_image_says_what_it_holds(image: Image) -> None:
    bill = json.loads((image.root / "opt/tome/sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    held = {part["name"].lower().replace("_", "-"): part["version"] for part in bill["components"]}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("timm", "grpcio", "numpy", "pillow", "safetensors"):
        assert held[name] == pinned[name]
    assert held["torch"] == f"{pinned['torch']}+cpu"
    assert not held.keys() & {"cyclonedx-bom", "pytest", "pip"}


def test_the_pods_server_becomes_ready_on_a_read_only_root_and_answers(pod: Pod, image: Image) -> None:
    sample = ROOT / "server/tome_server/models/bundled/fashion/samples/00000_ankle-boot.png"
    with Client(pod.ready["grpc"]) as client:
        assert client.predict(sample).predictions[0].label == "Ankle boot"
    assert image.config["User"] == "65532:65532"


def test_the_images_own_health_check_passes(pod: Pod, image: Image) -> None:
    kind, *check = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = pod.ready["grpc"].rpartition(":")[2]
    (python, flag, code) = check
    assert pod.ask(f'{python} {flag} "{code.replace("8500", port)}"') == 0
    assert pod.ask(f'{python} {flag} "{code.replace("8500", "1")}"') != 0


def test_the_pods_server_leaves_in_good_order_on_sigterm(pod: Pod, image: Image) -> None:
    assert image.config.get("StopSignal", "SIGTERM") == "SIGTERM"
    assert pod.terminate() == 0, pod.log.read_text()
    print(pod.log.read_text())
