"""Features as callers ask for them, whatever protocol they ask by."""

import numpy as np


def embeddings(values: np.ndarray, *, normalize: bool, float16: bool) -> np.ndarray:
    """Return features [..., D] as little-endian float32 or float16, divided by their Euclidean length if asked to.

    What float16 can't hold, beyond 65,504 by amount, becomes infinite; features of length 0 stay 0, and of infinite
    ones nothing but zeros and NaN is left.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if normalize:
            length = np.linalg.norm(values, axis=-1, keepdims=True)
            values = values / np.maximum(length, np.finfo(np.float32).tiny)
        return values.astype("<f2" if float16 else "<f4")
