"""Names of devices, on a machine that has a GPU or none; torch's word for that is scripted."""

from collections.abc import Iterator

import pytest
import torch

from tome_server.errors import ConfigError
from tome_server.execution.choose_device import choose_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_that_is_there_is_used_and_attends_without_cudnn(name: str, gpus: None) -> None:
    assert choose_device(name) == torch.device("cuda" if name == "auto" else name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_that_is_not_there_is_refused_in_words(gpus: None) -> None:
    with pytest.raises(ConfigError, match="'cuda:2': torch sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", ""])
def test_no_other_device_is_one(name: str) -> None:
    with pytest.raises(ConfigError, match="is none of auto, cpu, cuda, cuda:N"):
        choose_device(name)
