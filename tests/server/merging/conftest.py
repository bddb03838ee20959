from collections.abc import Iterator

import pytest
import torch

import tome_server.merging.timm_import  # noqa: F401  (before any test module imports timm)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Two torch threads collapse when anything else runs on this machine, and round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
