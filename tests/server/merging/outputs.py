"""Comparing all that a merged model gives."""

import torch

from tome_server.merging import MergedOutput

PARTS = ("logits", "features", "tokens", "sizes", "token_map")


def equal(given: MergedOutput, expected: MergedOutput) -> bool:
    """Return whether both are the same to the bit."""
    return given.tokens_per_block == expected.tokens_per_block and all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in ((getattr(given, part), getattr(expected, part)) for part in PARTS)
    )


def assert_close(given: MergedOutput, expected: MergedOutput, tolerance: float) -> None:
    """Compare outputs of calls that asked for everything, wherever they are."""
    for part in PARTS:
        there, here = getattr(given, part).cpu(), getattr(expected, part)
        torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)
