"""Models that come and go while others are served, by the real server and Triton's own client."""

import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.server.api.rpc import triton
from tests.server.api.rpc.wire import until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_server.models.bundled import BUNDLED

FILES = ("config.yaml", "weights.safetensors", "labels.txt", "quality.json")


def store(repository: Path, name: str) -> Path:
    """Put a model into the repository."""
    folder = repository / name
    folder.mkdir(parents=True)
    for file in FILES:
        shutil.copy(BUNDLED / "fashion" / file, folder)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("first", "second"):
        store(tmp_path / "models", name)
    return tmp_path / "models"


@pytest.fixture
def controlled(repository: Path, own_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server of both models that lets clients load and unload them."""
    config = repository.parent / "server.yaml"
    config.write_text("repository: models\nmodel_control: true\n")
    return own_server("--config", str(config), "--profile-time", "300ms")


@contextmanager
def load_on(target: str, model: str, image: bytes) -> Iterator["Counter[str]"]:
    """Have requests for a model sent one after the other meanwhile; yields how often each status came."""
    statuses: Counter[str] = Counter()
    stop = threading.Event()

    def send() -> None:
        with grpc.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while not stop.is_set():
                try:
                    stub.Predict(pb.PredictRequest(model=model, image=image), timeout=60)
                    statuses["OK"] += 1
                except grpc.RpcError as error:
                    statuses[error.code().name] += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield statuses
    finally:
        stop.set()
        sender.join()


def test_a_model_can_be_unloaded_and_loaded_again_while_another_is_served(
    controlled: ServerProcess, samples: dict[Path, str]
) -> None:
    image = next(iter(samples)).read_bytes()
    with (
        triton.client.InferenceServerClient(controlled.target) as client,
        load_on(controlled.target, "first", image) as others,
        load_on(controlled.target, "second", image) as own,
    ):
        until(lambda: others["OK"] > 3 and own["OK"] > 3, "answers")
        client.unload_model("second")
        until(lambda: own["NOT_FOUND"] > 0, "a refusal")
        assert not client.is_model_ready("second")
        assert [model.name for model in client.get_model_repository_index().models] == ["first"]
        with pytest.raises(triton.InferenceServerException, match="no model is named 'second'"):
            client.unload_model("second")
        client.load_model("second")
        assert client.is_model_ready("second")
        before = own["OK"]
        until(lambda: own["OK"] > before, "an answer")
    assert set(others) == {"OK"}
    assert set(own) <= {"OK", "NOT_FOUND", "UNAVAILABLE"}


def test_a_model_is_replaced_without_a_request_lost(
    controlled: ServerProcess, repository: Path, samples: dict[Path, str]
) -> None:
    image = next(iter(samples)).read_bytes()
    labels = (repository / "second" / "labels.txt").read_text()
    with (
        triton.client.InferenceServerClient(controlled.target) as client,
        load_on(controlled.target, "second", image) as own,
    ):
        until(lambda: own["OK"] > 3, "answers")
        (repository / "second" / "labels.txt").write_text(labels.upper())
        client.load_model("second")
    assert set(own) == {"OK"}
    with grpc.insecure_channel(controlled.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        described = stub.GetModel(pb.GetModelRequest(model="second")).model
        assert "".join(f"{label}\n" for label in described.labels) == labels.upper()


def test_the_version_that_is_served_is_told_and_honoured(
    tmp_path: Path, own_server: Callable[..., ServerProcess], samples: dict[Path, str]
) -> None:
    models, image = tmp_path / "models", np.array([next(iter(samples)).read_bytes()], object)
    for version in ("1", "3"):
        store(models / "ours", version)
    (models / "ours" / "config.yaml").write_text("version: 1\n")
    config = tmp_path / "server.yaml"
    config.write_text("repository: models\nmodel_control: true\n")
    server = own_server("--config", str(config), "--profile-time", "300ms")
    tensor = triton.client.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(image)

    def check(client: Any, served: str, other: str) -> None:
        for asked in (served, ""):
            assert (
                client.infer("ours", [tensor], model_version=asked, client_timeout=100).get_response().model_version
                == served
            )
            assert [*client.get_model_metadata("ours", asked).versions] == [served]
            assert client.get_model_config("ours", asked).config.name == "ours"
            assert client.is_model_ready("ours", asked)
        assert [(one.name, one.version) for one in client.get_model_repository_index().models] == [("ours", served)]
        assert [one.version for one in client.get_inference_statistics("ours").model_stats] == [served]
        assert not client.is_model_ready("ours", other)
        for call in (
            lambda: client.infer("ours", [tensor], model_version=other),
            lambda: client.get_model_metadata("ours", other),
            lambda: client.get_model_config("ours", other),
        ):
            text = f"NOT_FOUND.*ours has no version '{other}' in service; version {served} is"
            with pytest.raises(triton.InferenceServerException, match=text):
                call()

    with triton.client.InferenceServerClient(server.target) as client:
        check(client, "1", "3")
        (models / "ours" / "config.yaml").write_text("version: 3\n")
        client.load_model("ours")
        check(client, "3", "1")


def test_what_cannot_be_loaded_is_refused_in_words_and_what_was_served_stays(
    controlled: ServerProcess, repository: Path, samples: dict[Path, str]
) -> None:
    (repository / "second" / "weights.safetensors").write_bytes(b"nonsense")
    with triton.client.InferenceServerClient(controlled.target) as client:
        with pytest.raises(triton.InferenceServerException, match=r"INTERNAL.*weights"):
            client.load_model("second")
        with pytest.raises(triton.InferenceServerException, match="NOT_FOUND"):
            client.load_model("../second")
        with pytest.raises(triton.InferenceServerException, match="NOT_FOUND"):
            client.unload_model("third")
        with pytest.raises(triton.InferenceServerException, match="model_name: is missing"):
            client.unload_model("")
        assert client.is_model_ready("second")


def test_a_models_own_limits_and_defaults_hold_and_are_told(
    controlled: ServerProcess, repository: Path, samples: dict[Path, str]
) -> None:
    image = next(iter(samples)).read_bytes()  # of 784 pixels
    file = repository / "second" / "config.yaml"
    plain = file.read_text()
    file.write_text(
        f"{plain}policy: max_batch\ndefault_min_r: 2\ndefault_max_r: 4\nlimits: {{max_image_pixels: 783}}\n"
        "batching: {max_batch: 2, max_delay: 3ms, max_pending: 5}\n"
    )

    def answered(model: str, **fields: Any) -> pb.PredictResponse:
        return stub.Predict(pb.PredictRequest(model=model, **fields), timeout=60)

    with (
        triton.client.InferenceServerClient(controlled.target) as client,
        grpc.insecure_channel(controlled.target) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        client.load_model("second")
        config = client.get_model_config("second").config
        assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (2, 3000)
        told = {name: value.string_value for name, value in config.parameters.items()}
        assert told.items() >= {
            "policy": "max_batch",
            "max_pending": "5",
            "max_image_pixels": "783",
            "max_image_bytes": "16777216",
            "default_min_r": "2",
            "default_max_r": "4",
        }.items()  # fmt: skip
        others = {
            name: value.string_value for name, value in client.get_model_config("first").config.parameters.items()
        }
        assert others.items() >= {"policy": "price", "max_pending": "256", "max_image_pixels": "50000000"}.items()
        assert "default_max_r" not in others
        with pytest.raises(grpc.RpcError, match="at most 783 pixels are accepted"):
            answered("second", image=image)
        # What is chosen between the bounds depends on how fast this machine is just now.
        assert answered("first", image=image, max_r=0).merging.r == 0
        tensor = pb.Tensor(data_type=pb.Tensor.DATA_TYPE_FLOAT32, shape=[3, 28, 28], data=bytes(4 * 3 * 28 * 28))
        assert answered("second", tensor=tensor).merging.r in (2, 4)
        assert answered("second", tensor=tensor, min_r=0, max_r=0).merging.r == 0
        for wrong, says in (
            ("policy: fixed:3", r"config.yaml: policy: fixed:3: the model is served at r = 0, 2"),
            ("limits: {max_image_bytes: 1GiB}", r"config.yaml: limits.max_image_bytes: 1,073,741,824 bytes is more"),
            ("batching: {max_batch: 0}", r"config.yaml:\d+: batching.max_batch: "),
            ("default_max_r: 1000", r"config.yaml: default_max_r: must lie in 0\.\."),
        ):
            file.write_text(f"{plain}{wrong}\n")
            with pytest.raises(triton.InferenceServerException, match=says):
                client.load_model("second")
        assert answered("second", tensor=tensor).merging.r in (2, 4)


def test_a_model_beyond_the_memory_budget_is_refused_and_the_others_stay(
    repository: Path, own_server: Callable[..., ServerProcess]
) -> None:
    config = repository.parent / "server.yaml"
    # Each takes about 9.1 MiB.
    config.write_text("repository: models\nmodel_control: true\nmemory_budget: 20MiB\n")
    server = own_server("--config", str(config), "--profile-time", "300ms")
    store(repository, "third")
    with triton.client.InferenceServerClient(server.target) as client:
        with pytest.raises(triton.InferenceServerException, match=r"third takes 9 MiB of weights; .* 2 MiB are left"):
            client.load_model("third")
        assert client.is_model_ready("first")
        client.unload_model("first")
        client.load_model("third")
        assert client.is_model_ready("third")


def test_hanging_up_serves_what_the_repository_holds_now(controlled: ServerProcess, repository: Path) -> None:
    store(repository, "third")
    shutil.rmtree(repository / "first")
    labels = (repository / "second" / "labels.txt").read_text()
    (repository / "second" / "labels.txt").write_text(labels.upper())
    controlled.process.send_signal(signal.SIGHUP)
    with triton.client.InferenceServerClient(controlled.target) as client:
        until(lambda: client.is_model_ready("third"), "a third model")
        until(lambda: not client.is_model_ready("first"), "the end of the first")
    with grpc.insecure_channel(controlled.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert stub.GetModel(pb.GetModelRequest(model="second")).model.labels[0] == labels.splitlines()[0].upper()
        assert [model.name for model in stub.ListModels(pb.ListModelsRequest()).models] == ["second", "third"]


def test_a_faulty_model_keeps_no_other_from_coming_or_going(controlled: ServerProcess, repository: Path) -> None:
    store(repository, "a-faulty")
    spoil(repository / "a-faulty")
    store(repository, "z-good")
    (repository / "lost+found").mkdir()
    controlled.process.send_signal(signal.SIGHUP)
    with triton.client.InferenceServerClient(controlled.target) as client:
        until(lambda: client.is_model_ready("z-good"), "the good model")
        with pytest.raises(triton.InferenceServerException, match=r"INTERNAL.*head.weight is a sparse tensor"):
            client.load_model("a-faulty")
        # What is served stays when its files are spoilt; what has gone goes nevertheless.
        spoil(repository / "second")
        shutil.rmtree(repository / "first")
        controlled.process.send_signal(signal.SIGHUP)
        until(lambda: not client.is_model_ready("first"), "the end of the first")
        assert client.is_model_ready("second")
        assert client.is_model_ready("z-good")
    log = controlled.log.read_text()
    assert f"a-faulty isn't loaded: checkpoint {repository}/a-faulty/weights.pth: head.weight is a sparse tensor" in log
    assert f"second isn't loaded, and stays as it was: checkpoint {repository}/second/weights.pth: head" in log
    assert f"{repository}/lost+found is passed over" in log
    assert "Traceback" not in log
    assert "never retrieved" not in log


def spoil(folder: Path) -> None:
    """Put weights there of which only torch can tell that they are of no use."""
    weights = load_file(folder / "weights.safetensors")
    (folder / "weights.safetensors").unlink()
    (folder / "quality.json").unlink()
    torch.save(weights | {"head.weight": weights["head.weight"].to_sparse()}, folder / "weights.pth")


def test_a_server_starts_without_the_faulty_models_of_its_repository(
    repository: Path, own_server: Callable[..., ServerProcess], samples: dict[Path, str]
) -> None:
    spoil(repository / "first")
    (repository / "lost+found").mkdir()
    (repository / "wrong").mkdir()
    (repository / "wrong" / "config.yaml").write_text("architectur: vit_tiny_patch16_224\n")
    server = own_server("--repository", str(repository), "--profile-time", "300ms")
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert [model.name for model in stub.ListModels(pb.ListModelsRequest()).models] == ["second"]
        assert stub.Predict(pb.PredictRequest(image=next(iter(samples)).read_bytes()), timeout=60).model == "second"
    log = server.log.read_text()
    assert f"first isn't loaded: checkpoint {repository}/first/weights.pth: head.weight is a sparse tensor" in log
    assert f"wrong isn't loaded: {repository}/wrong/config.yaml:1: " in log
    assert "architectur is not a setting; did you mean 'architecture'?" in log


def test_a_server_whose_models_are_all_faulty_does_not_start(
    repository: Path, own_server: Callable[..., ServerProcess], samples: dict[Path, str]
) -> None:
    for name in ("first", "second"):
        spoil(repository / name)
    with pytest.raises(RuntimeError, match=r"repository .* holds no model that can be served"):
        own_server("--repository", str(repository), "--profile-time", "300ms")


def test_clients_of_a_server_that_was_not_told_so_cannot_load_models(server: ServerProcess) -> None:
    with triton.client.InferenceServerClient(server.target) as client:
        for call in (client.load_model, client.unload_model):
            with pytest.raises(triton.InferenceServerException, match=r"UNIMPLEMENTED.*model_control"):
                call("fashion")
