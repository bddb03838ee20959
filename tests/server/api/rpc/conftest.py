from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.api.rpc.wire import connected
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb


@pytest.fixture(scope="session")
def stub(server: ServerProcess) -> Iterator[Any]:
    with connected(server.target) as stub:
        yield stub


@pytest.fixture(scope="session")
def model(stub: Any) -> pb.Model:
    return stub.GetModel(pb.GetModelRequest()).model


@pytest.fixture(scope="session")
def file(samples: dict[Path, str]) -> Path:
    """A sample image, 28 by 28, which is the model's size."""
    return min(samples)


@pytest.fixture(scope="session")
def grey(file: Path) -> np.ndarray:
    """[28, 28] uint8: the sample's pixels."""
    with Image.open(file) as image:
        return np.asarray(image.convert("L"))


@pytest.fixture(scope="session")
def good(file: Path) -> pb.PredictRequest:
    return pb.PredictRequest(image=file.read_bytes(), r=0, top_k=10)
