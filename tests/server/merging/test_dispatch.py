"""Which kernel matches, merges and attends."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from tome_server.merging import dispatch, matching
from tome_server.merging.attention import attention
from tome_server.merging.cpu import attention_c, matching_c
from tome_server.merging.matching import Matching


class Kernel:
    """One that does what torch does, and counts its calls."""

    def __init__(self, serves: bool) -> None:
        self._serves, self.calls = serves, 0

    def serves(self, *arguments: object) -> bool:  # noqa: ARG002
        return self._serves

    def match(self, keys: Tensor, r: int, prefix: int) -> Matching:
        return matching.match(keys, r, prefix)

    def combine(self, x: Tensor, size: Tensor, matched: Matching) -> tuple[Tensor, Tensor]:
        return matching.combine(x, size, matched)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        self.calls += 1
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)


@pytest.mark.parametrize("module", ["encoder", "cpu.kernels"])
def test_the_cpus_kernels_are_registered_whichever_module_is_imported_first(module: str) -> None:
    code = f"import tome_server.merging.{module}; from tome_server.merging import dispatch as d; "
    code += "print([kernel.__name__ for kernel in (*d.MATCHING_KERNELS, *d.ATTENTION_KERNELS)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([matching_c.__name__, attention_c.__name__])


def test_the_first_kernel_that_takes_the_tensors_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    never, first, second = Kernel(False), Kernel(True), Kernel(True)
    monkeypatch.setattr(dispatch, "MATCHING_KERNELS", [never, first, second])
    monkeypatch.setattr(dispatch, "ATTENTION_KERNELS", [never, first, second])
    assert dispatch.matcher_for(torch.ones(1)) is first
    attention(*torch.ones(3, 1, 1, 4, 2), None, dropout=0.0, scale=1.0)
    assert (never.calls, first.calls, second.calls) == (0, 1, 0)


def test_torchs_operators_are_used_where_no_kernel_takes_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Kernel(False)
    monkeypatch.setattr(dispatch, "MATCHING_KERNELS", [never])
    monkeypatch.setattr(dispatch, "ATTENTION_KERNELS", [never])
    assert dispatch.matcher_for(torch.ones(1)) is matching
    q, k, v = torch.randn(3, 1, 1, 4, 2)
    assert attention(q, k, v, None, dropout=0.0, scale=1.0).shape == q.shape
    assert never.calls == 0


def test_no_kernel_is_used_in_what_torch_records(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(True)
    monkeypatch.setattr(dispatch, "ATTENTION_KERNELS", [kernel])
    q, k, v = torch.randn(3, 1, 1, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: attention(x, k, v, None, dropout=0.0, scale=1.0), q, check_trace=False)
    assert kernel.calls == 0
