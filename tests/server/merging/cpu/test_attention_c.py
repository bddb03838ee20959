"""Attention in C against torch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tome_server.merging.attention import attention, size_bias
from tome_server.merging.cpu import attention_c

NEEDS = "needs a CPU with AVX-512, in bfloat16 with AMX, and a C compiler at installation"
in_each_type = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.skipif(dtype not in attention_c.DTYPES, reason=NEEDS), id=str(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
layouts = st.sampled_from(["of a projection", "contiguous", "dim first", "heads shared"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same [B, heads, N, dim], otherwise in memory; of shared heads all are as the first."""
    if layout == "of a projection":
        projected = torch.full((x.shape[0], x.shape[2], 3, *x.shape[1::2]), torch.nan, dtype=x.dtype)
        projected[:, :, 1] = x.transpose(1, 2)
        return projected.permute(2, 0, 3, 1, 4)[1]
    if layout == "heads shared":
        return x[:, :1].expand(x.shape)
    return x.contiguous() if layout == "contiguous" else x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


@pytest.fixture
def in_c(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the C code has given, call by call."""
    given: list[Tensor] = []
    run = attention_c.attend

    def record(*args: object) -> Tensor:
        given.append(run(*args))  # type: ignore[arg-type]
        return given[-1]

    monkeypatch.setattr(attention_c, "attend", record)
    return given


@in_each_type
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 150),
    st.tuples(layouts, layouts, layouts),
    st.sampled_from(["none", "sizes", "of one image"]),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.integers(0, 2**32 - 1),
)
def test_attention_in_c_is_that_of_torch(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    queries: int,
    tokens: int,
    dim: int,
    laid: tuple[str, str, str],
    biased: str,
    strength: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        laid_out(torch.randn(batch, heads, n, dim, generator=generator).to(dtype), layout)
        for n, layout in zip((queries, tokens, tokens), laid, strict=True)
    )
    bias = None
    if biased != "none":
        sizes = torch.randint(1, 40, (batch if biased == "sizes" else 1, tokens), generator=generator).float()
        bias = size_bias(sizes, dtype)
    scale = strength * dim**-0.5
    found = attention_c.attend(q, k, v, bias, scale)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), None if bias is None else bias.double(), scale=scale
    )
    by_torch = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    # Where logits are large their own rounding shows, in torch's as well. In bfloat16 weights are rounded, and results.
    tolerance = 4 * float((by_torch - exact).abs().max()) + 4e-6
    if dtype == torch.bfloat16:
        tolerance = 2**-7 * float(v.abs().max())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


@in_each_type
def test_attention_is_in_c_for_inference_on_one_thread(in_c: list[Tensor], dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 16).to(dtype)

    def attend(dtype: torch.dtype = dtype, dropout: float = 0.0) -> Tensor:
        return attention(q.to(dtype), k.to(dtype), v.to(dtype), None, dropout=dropout, scale=0.25)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        attend()
        assert len(in_c) == 1
        attend(torch.float64)
        attend(torch.float16)
        attend(dropout=0.5)
        q.requires_grad_(True)
        attend().sum().backward()
        assert len(in_c) == 1
        with torch.inference_mode():
            attend()
        assert len(in_c) == 2
        torch.set_num_threads(2)
        with torch.inference_mode():
            attend()
        assert len(in_c) == 2
    finally:
        torch.set_num_threads(threads)


@in_each_type
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_what_is_not_a_number_reaches_in_c_those_that_it_reaches_by_torch(
    bad: float, where: str, dtype: torch.dtype
) -> None:
    q, k, v = torch.randn(3, 2, 3, 21, 16, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    {"queries": q, "keys": k, "values": v}[where][1, 2, 20, 3] = bad
    found, expected = attention_c.attend(q, k, v, None, 0.25), F.scaled_dot_product_attention(q, k, v, scale=0.25)
    assert not expected.isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())


@in_each_type
def test_a_key_of_no_weight_at_all_leaves_the_others_theirs(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 1, 7, 16).abs().to(dtype)
    k[0, 0, 6] = -torch.inf
    torch.testing.assert_close(
        attention_c.attend(q, k, v, None, 0.25), attention(q, k[:, :, :6], v[:, :, :6], None, dropout=0.0, scale=0.25)
    )


@in_each_type
def test_an_image_attends_the_same_in_any_batch(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 5, 2, 37, 24).to(dtype)
    bias = size_bias(torch.randint(1, 9, (5, 37)).float(), dtype)
    together = attention_c.attend(q, k, v, bias, 0.2)
    for i in range(5):
        alone = attention_c.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], bias[i : i + 1], 0.2)
        assert torch.equal(alone[0], together[i])


@pytest.mark.skipif(torch.float32 not in attention_c.DTYPES, reason=NEEDS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.zeros(1, 3, 9, 16)},
        {"k": torch.zeros(2, 1, 9, 16)},
        {"v": torch.zeros(2, 3, 8, 16)},
        {"k": torch.zeros(2, 3, 9, 8), "v": torch.zeros(2, 3, 9, 8)},
        {"v": torch.zeros(2, 3, 9, 16, dtype=torch.float64)},
        {"v": torch.zeros(2, 3, 9, 16, device="meta")},
        {"q": torch.zeros(2, 3, 9, 16, dtype=torch.float64)},
    ],
    ids=["images", "heads", "tokens", "channels", "values in float64", "values elsewhere", "queries in float64"],
)
def test_tensors_that_do_not_fit_each_other_never_reach_attention_in_c(
    wrong: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads and writes memory by these sizes alone."""
    monkeypatch.setattr(attention_c, "_attention", None)
    given = {name: torch.zeros(2, 3, 9, 16) for name in "qkv"} | wrong
    with pytest.raises(AssertionError):
        attention_c.attend(**given, bias=None, scale=1.0)


@pytest.mark.skipif(torch.float32 not in attention_c.DTYPES, reason=NEEDS)
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 1, 8),
        torch.zeros(3, 1, 1, 9),
        torch.zeros(2, 3, 1, 9),
        torch.zeros(2, 1, 9, 9),
        torch.zeros(2, 1, 1, 9, device="meta"),
    ],
    ids=["tokens", "images", "heads", "queries", "elsewhere"],
)
def test_a_mask_that_does_not_fit_never_reaches_attention_in_c(mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_c, "_attention", None)
    q, k, v = torch.zeros(3, 2, 3, 9, 16)
    with pytest.raises((AssertionError, RuntimeError)):
        attention_c.attend(q, k, v, mask, 1.0)
