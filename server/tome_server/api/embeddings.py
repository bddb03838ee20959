"""Features in the form that the request asked for, for both protocols."""

import numpy as np


def embeddings(values: np.ndarray, *, normalize: bool, float16: bool) -> np.ndarray:
    """Return features [..., D] as little-endian float32 or float16.

    `normalize` divides them by their Euclidean length. float16 turns values beyond ±65,504 into infinities. Features of
    length 0 stay 0, and normalising infinite ones leaves only zeros and NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if normalize:
            length = np.linalg.norm(values, axis=-1, keepdims=True)
            values = values / np.maximum(length, np.finfo(np.float32).tiny)
        return values.astype("<f2" if float16 else "<f4")
