"""A repository in which everything but one model is hostile: that one is served, the others are named in the log."""

import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from safetensors.torch import save_file
from torch import nn

from tests.server.api.rpc.wire import connected, refusal, until
from tests.server.hostile.attack import MIB, resident
from tests.server.models.conftest import ARCHITECTURE, KWARGS
from tests.server.models.conftest import tiny as tiny
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_server.models.spec import weights_digest

# What the device's process may take in all, of which torch itself is about half.
MEMORY = 1024 * MIB
FLAGS = ("--threads", "1", "--profile-time", "300ms", "--max-batch", "2", "--log-format", "json")


def config(**settings: Any) -> Callable[[Path], None]:
    text = yaml.safe_dump({"architecture": ARCHITECTURE, "kwargs": KWARGS} | settings)
    return lambda folder: _write(folder / "config.yaml", text.encode())


def kwargs(**changes: Any) -> Callable[[Path], None]:
    return config(kwargs={**KWARGS, **changes})


def report(text: str) -> Callable[[Path], None]:
    """A quality report of the very weights, with odd levels."""
    return lambda folder: _write(
        folder / "quality.json",
        f'{{"weights_sha256": "{weights_digest(folder / "weights.safetensors")}", "levels": {text}}}'.encode(),
    )


def endless(name: str) -> Callable[[Path], None]:
    """A file that is larger than any memory, and takes no space."""

    def make(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 2**40)

    return make


def linked(name: str, to: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def compressed(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with (
        zipfile.ZipFile(folder / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/0", "w", force_zip64=True) as part,
    ):
        for _ in range(20):
            part.write(bytes(10 * MIB))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "deep-report": lambda folder: _write(folder / "quality.json", b"[" * 1_000_000),
    "nan-report": report('[{"r": 0, "agreement": NaN}]'),
    "infinite-report": report('[{"r": 0, "agreement": 1e400}]'),
    "absurd-report": report('[{"r": 0, "agreement": 1.0}, {"r": 1, "agreement": 1e-308}]'),
    "endless-report": endless("quality.json"),
    "device-report": linked("quality.json", "/dev/zero"),
    "pipe-labels": pipe("labels.txt"),
    "endless-labels": endless("labels.txt"),
    "endless-settings": endless("config.yaml"),
    "pipe-settings": pipe("config.yaml"),
    "deep-settings": lambda folder: _write(folder / "config.yaml", b"[" * 100_000),
    "large-kwargs": kwargs(embed_dim=3 * 4096, depth=100),
    "large-image": kwargs(img_size=10**6),
    "next-to-no-crop": config(data={"crop_pct": 1e-9}),
    "endless-budget": config(default_budget="9999999999999999m"),
    "no-unicode": lambda folder: _write(
        folder / "config.yaml", f'architecture: {ARCHITECTURE}\ndescription: "\\ud800"\n'.encode()
    ),
    "device-weights": linked("weights.safetensors", "/dev/zero"),
    "pipe-weights": pipe("weights.safetensors"),
    "endless-header": lambda folder: _write(
        folder / "weights.safetensors", (2**27).to_bytes(8, "little") + b"{" * 2**20
    ),
    "compressed-weights": compressed,
}


@pytest.fixture
def repository(tiny: nn.Module, tmp_path: Path) -> Iterator[Path]:
    repository = tmp_path / "models"
    good = repository / "good"
    good.mkdir(parents=True)
    save_file(tiny.state_dict(), good / "weights.safetensors")
    config()(good)
    yield repository
    shutil.rmtree(repository)


def lines(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def answers(server: ServerProcess, model: str = "good") -> bool:
    tensor = pb.Tensor(shape=[32, 32, 3], data=bytes(32 * 32 * 3), data_type=pb.Tensor.DATA_TYPE_UINT8)
    with connected(server.target) as stub:
        return bool(stub.Predict(pb.PredictRequest(model=model, tensor=tensor, no_deadline=True)).predictions)


def test_one_good_model_among_hostile_ones_is_served_and_each_of_them_is_named_once(
    repository: Path, tmp_path: Path, own_server: Callable[..., ServerProcess]
) -> None:
    for name, spoil in HOSTILE.items():
        shutil.copytree(repository / "good", repository / name)
        spoil(repository / name)
    profiles = tmp_path / "profiles"
    server = own_server("--repository", str(repository), "--profiles", str(profiles), *FLAGS)
    assert answers(server)
    with connected(server.target) as stub:
        assert [model.name for model in stub.ListModels(pb.ListModelsRequest()).models] == ["good"]
        assert stub.GetModel(pb.GetModelRequest(model="good")).model.summary.name == "good"
        assert refusal(lambda: stub.GetModel(pb.GetModelRequest(model="nan-report"))).code is grpc.StatusCode.NOT_FOUND
    assert resident(_device(server), peak=True) < MEMORY
    log = lines(server)
    for name in HOSTILE:
        said = [line["event"] for line in log if line["event"].startswith(f"{name} isn't loaded: ")]
        assert len(said) == 1, (name, said)
        assert str(repository / name) in said[0]
        assert len(said[0]) < 1000
    assert "Traceback" not in json.dumps(log)
    # Loaded anew, it finds a hostile profile in the cache; the others are as faulty as before.
    [kept] = profiles.glob("good-*.json")
    document = json.loads(kept.read_text())
    kept.write_text(json.dumps(document | {"p95_seconds": [[1e308] * len(row) for row in document["p95_seconds"]]}))
    os.utime(repository / "good/weights.safetensors")
    server.process.send_signal(signal.SIGHUP)
    until(
        lambda: any("in the place of the one before" in line["event"] for line in lines(server)), "the new one serves"
    )
    assert answers(server)
    [warned] = [line["event"] for line in lines(server) if str(kept) in line["event"] and line["level"] == "warning"]
    assert "p95_seconds[0][0] must be a number" in warned
    assert json.loads(kept.read_text())["p95_seconds"][0][0] < 100  # measured anew
    assert server.terminate() == 0


def _device(server: ServerProcess) -> int:
    """Return the process id of the server's device."""
    pid = server.process.pid
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
