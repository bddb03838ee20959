"""Attention: sizes folded into the keys against sizes as a mask."""

import pytest
import torch

from tests.server.merging.outputs import assert_close
from tests.server.merging.small_models import KINDS
from tome_server.merging import merge
from tome_server.merging.attention import attention, size_bias, size_column

FAMILIES = (
    "class token",
    "map pool with prefix",
    "wide heads",
    "gate, all norms",
    "parallel scaling",
    "three parallel things",
    "norms after",
    "DINOv3",
    "EVA-02, norms after and inside, rotated",
    "RoPE, mixed",
    "Sapiens2, shared keys",
    "NaFlex, axial",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_gives_the_same_whether_sizes_are_folded_or_a_mask(name: str) -> None:
    kind = KINDS[name]
    model, images, rs = kind.build(), kind.images(4), [9, 0, 5, 9]
    with torch.inference_mode():
        expected = merge(model)(images, rs, return_tokens=True, return_token_map=True)
        given = merge(model, fold_sizes=True)(images, rs, return_tokens=True, return_token_map=True)
        without = merge(model, proportional_attention=False)(images, rs)
        never = merge(model, proportional_attention=False, fold_sizes=True)(images, rs)
    assert_close(given, expected, 1e-9)
    assert not torch.allclose(given.logits, without.logits)
    assert torch.equal(never.logits, without.logits)


@pytest.mark.parametrize("dim", [1, 7, 8, 24, 64, 80])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 9), (9, 9), (197, 197)])
def test_both_ways_add_the_logarithm_of_sizes_to_the_logits(queries: int, tokens: int, dim: int) -> None:
    q, k, v = (torch.randn(2, 3, n, dim, dtype=torch.float64) for n in (queries, tokens, tokens))
    sizes = torch.randint(1, 20, (2, tokens)).double()
    logits = 0.3 * q @ k.mT + sizes.log()[:, None, None, :]
    expected = logits.softmax(dim=-1) @ v
    for bias in (size_bias(sizes, torch.float64), size_column(sizes, torch.float64)):
        torch.testing.assert_close(attention(q, k, v, bias, dropout=0.0, scale=0.3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_rounds_no_more_than_a_mask_does(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(4, 3, 161, 64, dtype=torch.float64).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 40, (4, 161)).float()
    exact = attention(
        q.double(), k.double(), v.double(), size_bias(sizes.double(), torch.float64), dropout=0.0, scale=0.125
    )
    mask, column = (
        (attention(q, k, v, bias, dropout=0.0, scale=0.125).double() - exact).norm()
        for bias in (size_bias(sizes, dtype), size_column(sizes, dtype))
    )
    assert column <= 1.5 * mask
